"""Loads libtessera_torch and says what torch must know about its operators: shapes without data (fake tensors), vmap
and FLOP counts. Autograd and autocast are in the library itself, so that C++ callers have them too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.library import register_fake, register_vmap
from torch.utils.flop_counter import register_flop_formula

import torch
from torch import Tensor

_LIBRARY = "libtessera_torch.so"


def _load() -> str:
    # The one place that reads the environment: developers point it to a library in a build folder.
    path = os.environ.get("TESSERA_TORCH_LIBRARY")
    if not path:
        # Beside this file; of an editable installation, whose package has two folders, in the other one.
        places = [os.path.join(folder, _LIBRARY) for folder in sys.modules[__package__].__path__]
        path = next(filter(os.path.isfile, places), places[0])
    if not os.path.isfile(path):
        raise ImportError(
            f"tessera: got no operator library at {path}; allowed: {_LIBRARY} beside the package (pip install), or its "
            "path in the environment variable TESSERA_TORCH_LIBRARY"
        )
    torch.ops.load_library(path)
    return path


LIBRARY_PATH = _load()

_t = torch.ops.tessera
forward = _t.forward.default
infer = _t.infer.default
backward = _t.backward.default
decode = _t.decode.default
weights = _t.weights.default
merge = _t.merge.default
varlen_forward = _t.varlen_forward.default
varlen_backward = _t.varlen_backward.default
dilated_forward = _t.dilated_forward.default
dilated_backward = _t.dilated_backward.default
PATTERN = tuple(a.name for a in forward._schema.arguments[3:8])  # a pattern's arguments, as BlockPattern.op_args


# ---- fake tensors: what comes out, without data


def _empty_as(like: Tensor, sizes: tuple, dtype: torch.dtype) -> Tensor:
    """[B, S, H, D] that lies in memory as ``like`` does (empty_like_layout of torch/convert.cc)."""
    if like.dim() == 4 and like.stride(2) > like.stride(1):
        return like.new_empty((sizes[0], sizes[2], sizes[1], sizes[3]), dtype=dtype).transpose(1, 2)
    return like.new_empty(sizes, dtype=dtype)


def _lse_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_ranks(rank: int, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dim() != rank:
            raise ValueError(f"{name}: got {t.dim()} dimensions; allowed: {rank}")


# Tensors that may lie on the CPU wherever q does: small numbers, read when an operator is called.
_ON_CPU = {
    "indptr", "indices", "bitmap_index", "bitmaps", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "page_table", "rng",
}  # fmt: skip


def _check_devices(op: Any, args: Sequence[Any], kwargs: dict[str, Any], first: str = "q") -> None:
    """All tensors where ``first`` is. Else a call that mixes meta tensors with others would end here, and give memory
    that nobody wrote."""
    device = argument(op, first, args, kwargs).device
    for a in op._schema.arguments:
        value = argument(op, a.name, args, kwargs)
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor) and t.device != device and not (a.name in _ON_CPU and t.device.type == "cpu"):
                raise ValueError(f"{a.name}: got a tensor on {t.device}; allowed: a tensor on {device}, as {first}")


def _like(t: Tensor) -> Tensor:
    return _empty_as(t, tuple(t.shape), t.dtype)


def _fake(*ops: Any, first: str = "q") -> Any:
    """Registers a function as the fake one of each operator."""

    def register(function: Any) -> Any:
        for op in ops:

            def fake(*args: Any, op: Any = op, **kwargs: Any) -> tuple[Tensor, ...]:
                _check_devices(op, args, kwargs, first)
                return function(*args, **kwargs)

            register_fake(op.name())(fake)
        return function

    return register


@_fake(decode)
def _decode_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    _check_ranks(4, q=q, v_cache=v_cache)
    return _forward_fake(q, k_cache, v_cache)


@_fake(forward, infer, dilated_forward)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    _check_ranks(4, q=q, v=v)
    b, s, h, _ = q.shape
    return _empty_as(q, (b, s, h, v.shape[3]), q.dtype), q.new_empty((b, h, s), dtype=_lse_type(q))


@_fake(varlen_forward)
def _varlen_forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    _check_ranks(3, q=q, v=v)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_type(q))


def _backward_fake(op: Any) -> Any:
    def fake(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        gradients = []
        q = argument(op, "q", args, kwargs)
        for want, result in zip(argument(op, "wanted", args, kwargs), op._schema.returns):
            name = result.name[1:]
            t = argument(op, name, args, kwargs)
            if not want or t is None:
                gradients.append((q if t is None or name not in ("q", "k", "v") else t).new_empty(0))
            else:
                gradients.append(_like(t) if name in ("q", "k", "v") else t.new_empty(t.shape))
        return tuple(gradients)

    return fake


for _op in (backward, varlen_backward, dilated_backward):
    _fake(_op)(_backward_fake(_op))


@_fake(merge, first="out_a")
def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, ...]:
    return _like(out_a), lse_a.new_empty(lse_a.shape)


@_fake(weights)
def _weights_fake(
    q: Tensor, k: Tensor, indptr: Tensor, indices: Tensor, bitmap_index: Tensor | None, bitmaps: Tensor | None,
    shape: Sequence[int], *args: Any, **kwargs: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_ranks(4, q=q, k=k)
    # All heads and batches: a pattern that they share counts once for each.
    n = indices.shape[0] * (q.shape[0] // shape[5]) * (q.shape[2] // shape[4])
    return q.new_empty((n, 4), dtype=torch.int64), q.new_empty((n, shape[2], shape[3]), dtype=torch.float32)


def pattern_lists(patterns: Sequence[Any]) -> tuple[list, list, list, list, list[int]]:
    """Patterns as operators take several: lists of each tensor (empty where there are no bitmaps), shapes flattened."""
    no_index, no_bits = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    return (
        [p.indptr for p in patterns],
        [p.indices for p in patterns],
        [no_index if p.bitmap_index is None else p.bitmap_index for p in patterns],
        [no_bits if p.bitmaps is None else p.bitmaps for p in patterns],
        [n for p in patterns for n in p.op_args[4]],
    )


def argument(op: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The argument of that name of a call of ``op``, its default if it was not given."""
    if name in kwargs:
        return kwargs[name]
    for i, a in enumerate(op._schema.arguments):
        if a.name == name:
            return args[i] if i < len(args) else a.default_value
    raise KeyError(name)


# ---- vmap: over tensors of the batch the mapped dimension joins the batch; where it cannot (patterns, per-head
# numbers, seeds, gradients of shared biases), one call for each


def _spell(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by position, defaults included."""
    return [argument(op, a.name, args, kwargs) for a in op._schema.arguments]


def _at(x: Any, dim: Any, i: int) -> Any:
    if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_at(y, d, i) for y, d in zip(x, dim)]
    return x if dim is None else x.select(dim, i)


def _one_by_one(op: Any, info: Any, dims: Sequence[Any], values: Sequence[Any]) -> tuple[Any, tuple[int, ...]]:
    results = [op(*(_at(x, d, i) for x, d in zip(values, dims))) for i in range(info.batch_size)]
    return tuple(torch.stack(r) for r in zip(*results)), (0,) * len(results[0])


_BATCHED = ("dout", "dlse", "q", "k", "v", "k_cache", "v_cache", "out", "lse", "out_a", "lse_a", "out_b", "lse_b")


def _register_vmap(op: Any) -> None:
    names = [a.name for a in op._schema.arguments]

    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, tuple[int, ...]]:
        values = _spell(op, args, kwargs)
        dims = list(in_dims) + [None] * (len(values) - len(in_dims))
        if kwargs:
            raise ValueError(f"{op}: got keyword arguments under vmap; allowed: positional ones")
        given = dict(zip(names, values))
        mapped = [
            n
            for n, d in zip(names, dims)
            if d is not None and not (isinstance(d, (list, tuple)) and not any(x is not None for x in d))
        ]
        foldable = all(n in _BATCHED for n in mapped) and not given.get("dropout_p")
        foldable &= all(given.get(n) is None for n in ("page_table", "key_lengths", "block_bias", "attn_bias"))
        foldable &= not any(given.get("wanted", ())[3:]) and not (given.get("sinks") is not None and "wanted" in given)
        foldable &= given.get("alibi_slopes") is None and (given.get("pattern_shape") or (1,) * 9)[5] == 1
        if not foldable or op in (varlen_forward, varlen_backward):
            return _one_by_one(op, info, dims, values)
        n = info.batch_size
        folded = []
        for name, x, d in zip(names, values, dims):
            if name in _BATCHED and x is not None:
                x = x.unsqueeze(0).expand(n, *x.shape) if d is None else x.movedim(d, 0)
                if name not in ("dlse", "lse", "lse_a", "lse_b") and x.dim() == 5 and x.stride(-1) != 1:
                    x = x.contiguous()
                x = x.flatten(0, 1)
            folded.append(x)
        results = op(*folded)
        unfolded = []
        for r in results:
            if r.dim() > 1:
                unfolded.append(r.unflatten(0, (n, r.shape[0] // n)))
            else:  # a gradient that is not wanted
                unfolded.append(r.new_empty((n, 0)))
        return tuple(unfolded), (0,) * len(unfolded)

    register_vmap(f"tessera::{op._schema.name.split('::')[1]}", rule)


for _op in (
    forward,
    infer,
    backward,
    decode,
    merge,
    varlen_forward,
    varlen_backward,
    dilated_forward,
    dilated_backward,
):
    _register_vmap(_op)


# ---- FLOP counts for torch.utils.flop_counter: effective ones, of admitted pairs only


def _block_pairs(indices: Tensor, shape: Sequence[int], batch: int, heads: int) -> int:
    """Without data: the kept blocks as if all were full."""
    return indices.shape[0] * shape[2] * shape[3] * (batch // shape[5]) * (heads // shape[4])


def _pairs(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    given = {a.name: argument(op, a.name, args, kwargs) for a in op._schema.arguments}
    q, names = given["q"], [a.name for a in _t.admitted_pairs.default._schema.arguments][2:]
    if q.device.type != "cpu" or isinstance(q, FakeTensor) or isinstance(given["indptr"], FakeTensor):
        return _block_pairs(given["indices"], given["pattern_shape"], q.shape[0], q.shape[2])
    return _t.admitted_pairs.default(q.shape[0], q.shape[2], *(given[n] for n in names))


def _register_flops(op: Any, pairs: Any, *, backward_pass: bool) -> None:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        q = argument(op, "q", args, kwargs)
        v = argument(op, "v_cache" if op is decode else "v", args, kwargs)
        d, dv = q.shape[-1], v.shape[-1]
        # A pair: q k and p v; backward: scores again, dp, dv, dq and dk.
        return pairs(op, args, kwargs) * (2 * (3 * d + 2 * dv) if backward_pass else 2 * (d + dv))

    register_flop_formula(op.overloadpacket, get_raw=True)(count)


def _dilated_pairs(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    names = [a.name for a in _t.dilated_pairs.default._schema.arguments]
    return _t.dilated_pairs.default(*(argument(op, n, args, kwargs) for n in names))


def _varlen_pairs(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    given = {a.name: argument(op, a.name, args, kwargs) for a in op._schema.arguments}
    lists = [given[n] for n in ("indptr", "indices", "bitmap_index", "bitmaps")]
    pairs, heads, shapes = 0, given["q"].shape[1], given["pattern_shapes"]
    for i, (indptr, indices, bitmap_index, bitmaps) in enumerate(zip(*lists)):
        shape = shapes[9 * i : 9 * i + 9]
        if isinstance(given["q"], FakeTensor) or isinstance(indptr, FakeTensor):
            pairs += _block_pairs(indices, shape, 1, heads)
            continue
        masks = {n: given[n] for n in ("causal", "window_left", "window_right")}
        pairs += _t.admitted_pairs.default(1, heads, indptr, indices, bitmap_index, bitmaps, shape, **masks)
    return pairs


for _op, _count in (
    (forward, _pairs),
    (infer, _pairs),
    (decode, _pairs),
    (backward, _pairs),
    (dilated_forward, _dilated_pairs),
    (dilated_backward, _dilated_pairs),
    (varlen_forward, _varlen_pairs),
    (varlen_backward, _varlen_pairs),
):
    _register_flops(_op, _count, backward_pass="backward" in _op._schema.name)
