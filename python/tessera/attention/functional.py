"""Attention over block patterns as functions. Tensors are ``[B, S, H, D]`` (``layout="bshd"``) or ``[B, H, S, D]``
(``"bhsd"``): both are strides of what lies in memory, nothing is copied; the last dimension must be contiguous.

fp32, bf16, fp16 with fp32 sums and softmax; fp64 runs a plain, slow reference. Under autocast q, k and v go to the
autocast dtype, biases stay as they are. Errors of the caller are ValueError or TypeError naming the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from .. import _ops
from ..pattern import BlockPattern
from ..pattern.checks import check_bool, check_int, is_bool_scalar

_forward, _infer = _ops.forward, _ops.infer
_compiling = torch.compiler.is_compiling
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


class AttentionWeights(NamedTuple):
    """Normalised weights of the kept blocks only.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> pattern = tessera.patterns.local_window(512, block=64, window=128)
        >>> weights = tessera.attention_weights(q, k, pattern)
        >>> weights.block_values.shape == (pattern.num_blocks * 4, 64, 64)
        True
    """

    block_indices: Tensor  # int64 [blocks, 4]: batch, head, block row, block column
    block_values: Tensor  # fp32 [blocks, block_q, block_k]; 0 where masked and past the ends
    block_size: tuple[int, int]  # block_q, block_k
    shape: tuple[int, int, int, int]  # B, H, Sq, Sk


class _Common(TypedDict, total=False):
    """Options that every attention takes, for type checkers; their meaning is in the functions' own signatures."""

    causal: bool | None
    scale: float | None
    window: int | tuple[int | None, int | None] | None
    softcap: float
    alibi_slopes: Tensor | None


class _BlockSparse(_Common, total=False):
    attn_bias: Tensor | None
    block_bias: Tensor | None
    key_lengths: Tensor | None
    dropout_p: float
    sinks: Tensor | None
    q_offset: int | None
    k_offset: int
    layout: str


class _Decode(_Common, total=False):
    key_lengths: Tensor | None
    page_table: Tensor | None
    sinks: Tensor | None
    block_bias: Tensor | None
    attn_bias: Tensor | None
    layout: str


class _Varlen(_Common, total=False):
    dropout_p: float
    sinks: Tensor | None


class _Dilated(_Common, total=False):
    pattern: str | None
    density: float | None
    block: int
    budget: str
    pattern_window: int | None
    pattern_rates: Sequence[int]
    global_tokens: int | None
    stride: int | None
    pattern_seed: int
    attn_bias: Tensor | None
    key_lengths: Tensor | None
    dropout_p: float
    layout: str


def _type_error(name: str, value: Any, allowed: str) -> TypeError:
    return TypeError(f"{name}: got {type(value).__name__}; allowed: {allowed}")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):  # or symbols of a traced graph
        return cast(float, value)
    if not (isinstance(value, bool) or is_bool_scalar(value)):
        try:
            return value.__float__()  # numbers of NumPy and the like
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass
    raise _type_error(name, value, "a number")


def _check_given(**tensors: Any) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise _type_error(name, t, "torch.Tensor")
        if t.is_nested:
            raise ValueError(
                f"{name}: got a nested tensor; allowed: a strided one (varlen_attention takes packed sequences)"
            )


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, BlockPattern):
        raise _type_error(name, pattern, "tessera.BlockPattern")


def _check_layout(layout: Any) -> bool:
    """Whether tensors come as [B, H, S, D]."""
    if layout == "bhsd":
        return True
    if layout == "bshd":
        return False
    raise ValueError(f'layout: got {layout!r}; allowed: "bshd" or "bhsd"')


def as_bshd(layout: Any, **tensors: Tensor) -> dict[str, Tensor]:
    """Tensors by name without gradients as [B, S, H, D]; TypeError or ValueError that names one."""
    swap = _check_layout(layout)
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise _type_error(name, t, "torch.Tensor")
    return {name: (_to_bshd(name, t) if swap else t).detach() for name, t in tensors.items()}


def other_layout(q: Tensor, k: Tensor, pattern: BlockPattern, layout: str) -> str:
    """What an error adds where q and k, [B, S, H, D] as ``layout`` has it, fit the pattern in the other one only."""
    if q.is_nested or k.is_nested or q.dim() != 4 or k.dim() != 4:
        return ""
    if pattern.shape == (q.shape[2], k.shape[2]) != (q.shape[1], k.shape[1]):
        return f'; q looks like the other layout: layout="{"bshd" if layout == "bhsd" else "bhsd"}"?'
    return ""


def _to_bshd(name: str, t: Tensor) -> Tensor:
    if t.dim() != 4:
        raise ValueError(f"{name}: got {t.dim()} dimensions; allowed: 4, [B, H, S, D]")
    return t.transpose(1, 2)


def _window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of an int, as the pattern `local_window` reads it, or of a pair."""
    if window is None:
        return None, None
    if isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise ValueError(f"window: got {len(window)} numbers; allowed: an integer or (left, right)")
        left, right = (None if w is None else check_int("window", w, 0) for w in window)
        return left, right
    width = check_int("window", window, 0)
    return (width, None) if causal else (width // 2, width // 2)


def _check_list(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise _type_error(name, values, "a list of integers")
    return tuple(check_int(name, x) for x in values)


def _check_tensor(name: str, value: Any) -> Tensor:
    _check_given(**{name: value})
    return cast(Tensor, value)


def _check_position(name: str, value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else check_int(name, value)


def _check_dropout(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise _type_error(name, value, "a number in [0, 1)")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}; allowed: 0 <= {name} < 1")
    return cast(float, value)


# Every option of a call by its name, which is that of the operators: what it is where nothing is said, its check.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "causal": (None, check_bool),
    "scale": (None, _check_number),
    "window": (None, None),  # for the operators left and right of it, which depend on causality
    "softcap": (0.0, _check_number),
    "dropout_p": (0.0, _check_dropout),
    "q_offset": (None, _check_position),
    "k_offset": (0, _check_position),
    **dict.fromkeys(
        ("attn_bias", "block_bias", "key_lengths", "alibi_slopes", "sinks", "page_table"), (None, _check_tensor)
    ),
}


def pack_options(carried: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Options of a call as operators take them: those that say something, checked. carried: causality of the pattern,
    which holds where nothing is said."""
    packed = {}
    for name, value in given.items():
        default, check = _OPTIONS[name]
        if value is not default:
            packed[name] = value if check is None else check(name, value)
    if "window" in packed:
        left, right = _window(packed.pop("window"), packed.get("causal", carried))
        packed["window_left"], packed["window_right"] = left, right
    if packed.get("dropout_p"):  # seed and offset of this call, from torch's default generator
        packed["rng"] = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    return packed


def _wants_grad(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return any(isinstance(x, Tensor) and x.requires_grad for x in options.values())


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern,
    *, return_lse: Literal[False] = False, **options: Unpack[_BlockSparse],
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern,
    *, return_lse: Literal[True], **options: Unpack[_BlockSparse],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern,
    *, return_lse: bool, **options: Unpack[_BlockSparse],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    block_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_offset: int | None = None,
    k_offset: int = 0,
    return_lse: bool = False,
    layout: str = "bshd",
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + biases) v`` with one softmax over all keys that a row's pattern admits.

    Args:
        q: ``[B, Sq, H, D]`` (or ``[B, H, Sq, D]``, see ``layout``).
        k: ``[B, Sk, Hkv, D]``, ``H % Hkv == 0`` (grouped-query attention).
        v: ``[B, Sk, Hkv, Dv]``.
        pattern: of (Sq, Sk); its heads are 1 or H, its batches 1 or B.
        causal: admits keys at positions up to the query's. None: as the pattern, which carries its causality; False for
            a causal pattern is an error. Queries end where keys end (``q_offset`` and patterns with a position change
            that).
        scale: finite; default ``1 / sqrt(D)``.
        attn_bias: floating, ``[B or 1, H or 1, Sq or 1, Sk or 1]``, added to the scores; has a gradient. -inf: not a
            key. In a row whose keys all have -1e6 or less the result is right and the gradient is not (as of
            ``scaled_dot_product_attention``): lse, in fp32, has no room beside such a number.
        block_bias: fp32 ``[B or 1, H or 1, pattern.num_blocks]``, added to all scores of a kept block; has a gradient.
            Of a pattern with heads or batches the last dimension counts the blocks of all of them, in the order of
            ``pattern.indices``; head h of batch b reads its own entries ``[b, h, i]`` only, the others do nothing.
        key_lengths: int32 or int64 ``[B]``, valid keys (padding after them).
        window: tokens: ``(left, right)`` admits keys at most so far before and after the query (None: no limit); an int
            stands for ``(w, None)`` if causal, else ``(w // 2, w // 2)``.
        dropout_p: in [0, 1), on the normalised weights; follows ``torch.manual_seed``.
        softcap: > 0: scores become ``softcap * tanh(score / softcap)``, before biases.
        alibi_slopes: fp32 ``[H]`` or ``[B, H]``: adds ``-slope * |distance|``; no gradient.
        sinks: fp32 ``[H]``: a logit that joins the denominator only; has a gradient.
        q_offset, k_offset: positions of the first query (default: where the pattern stands, else ``Sk - Sq``) and key.
            A pattern that is causal, or rows of a longer one, was made for one distance between them: another one is an
            error, unless every pair that is admitted there is kept.
        return_lse: also returns lse, fp32 ``[B, H, Sq]`` (natural log; -inf for a row that sees no key), with gradient.

    Returns:
        out, as q but with Dv columns; 0 in rows that see no key. Or (out, lse).

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> pattern = tessera.patterns.local_window(512, block=64, window=128, causal=True)
        >>> tessera.block_sparse_attention(q, k, v, pattern).shape
        torch.Size([1, 512, 4, 32])
    """
    if not (type(q) is Tensor and type(k) is Tensor and type(v) is Tensor and type(pattern) is BlockPattern):
        _check_given(q=q, k=k, v=v)
        _check_pattern("pattern", pattern)
    if return_lse is not True and return_lse is not False:
        return_lse = check_bool("return_lse", return_lse)
    options = pack_options(pattern.causal, {
        "causal": causal, "scale": scale, "attn_bias": attn_bias, "block_bias": block_bias, "key_lengths": key_lengths,
        "window": window, "dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
        "q_offset": q_offset, "k_offset": k_offset,
    })  # fmt: skip
    if swap := layout != "bshd" and _check_layout(layout):
        q, k, v = _to_bshd("q", q), _to_bshd("k", k), _to_bshd("v", v)
    op = _forward if _compiling() or _wants_grad(q, k, v, options) else _infer
    try:
        out, lse = op(q, k, v, *pattern.op_args, **options)
    except ValueError as error:
        if hint := other_layout(q, k, pattern, layout):
            raise ValueError(f"{error}{hint}") from None
        raise
    if swap:
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


@overload
def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pattern: BlockPattern,
    *, return_lse: Literal[False] = False, **options: Unpack[_Decode],
) -> Tensor: ...  # fmt: skip
@overload
def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pattern: BlockPattern,
    *, return_lse: Literal[True], **options: Unpack[_Decode],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pattern: BlockPattern,
    *, return_lse: bool, **options: Unpack[_Decode],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pattern: BlockPattern,
    *,
    key_lengths: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool | None = True,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_bias: Tensor | None = None,
    attn_bias: Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a key/value cache; no gradients.

    Args:
        q: ``[B, Sq, H, D]``, the newest Sq tokens (few of them on many keys are split over keys).
        k_cache, v_cache: ``[B, Sk, Hkv, D]``, ``[B, Sk, Hkv, Dv]``; with ``page_table`` pages ``[pages, block_k, Hkv,
            D]`` and ``Dv`` (always in this order).
        pattern: of (Sq, Sk), Sk the capacity of the cache. A pattern made for queries at the end of the capacity is
            right there only: with shorter key_lengths it is an error unless it keeps everything (:class:`KVCache` and
            ``pattern.for_queries`` give the rows of a step).
        key_lengths: int32 or int64 ``[B]``, keys of the cache that are valid, the new ones included; the queries stand
            at the end of them.
        page_table: int32 ``[B, ceil(Sk / block_k)]``.

    Others and result as :func:`block_sparse_attention`.

    Example:
        >>> q, k, v = (torch.randn(1, n, 4, 32) for n in (1, 300, 300))
        >>> pattern = tessera.patterns.dense(1, 300)
        >>> tessera.decode(q, k, v, pattern).shape
        torch.Size([1, 1, 4, 32])
    """
    _check_given(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_pattern("pattern", pattern)
    return_lse = check_bool("return_lse", return_lse)
    options = pack_options(pattern.causal, {
        "key_lengths": key_lengths, "page_table": page_table, "causal": causal, "scale": scale, "window": window,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks, "block_bias": block_bias,
        "attn_bias": attn_bias,
    })  # fmt: skip
    if key_lengths is not None:
        options["align_to_key_lengths"] = True
    swap = _check_layout(layout)
    if swap:
        q = _to_bshd("q", q)
        if page_table is None:
            k_cache, v_cache = _to_bshd("k_cache", k_cache), _to_bshd("v_cache", v_cache)
    out, lse = _ops.decode(q, k_cache, v_cache, *pattern.op_args, **options)
    if swap:
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, patterns: Sequence[BlockPattern],
    *, return_lse: Literal[False] = False, **options: Unpack[_Varlen],
) -> Tensor: ...  # fmt: skip
@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, patterns: Sequence[BlockPattern],
    *, return_lse: Literal[True], **options: Unpack[_Varlen],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, patterns: Sequence[BlockPattern],
    *, return_lse: bool, **options: Unpack[_Varlen],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    patterns: Sequence[BlockPattern],
    *,
    causal: bool | None = None,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Packed sequences: sequence i is rows ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1]`` of q, likewise of k and v.

    Args:
        q: ``[total_q, H, D]``; k: ``[total_k, Hkv, D]``; v: ``[total_k, Hkv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[N + 1]`` from 0.
        patterns: list or tuple of N BlockPattern; pattern i has the lengths of packed sequence i. One object may stand
            in several places. Heads 1 or H, batches 1.

    Others as :func:`block_sparse_attention`.

    Returns:
        out ``[total_q, H, Dv]``, or (out, lse), lse fp32 ``[H, total_q]``.

    Example:
        >>> q, k, v = (torch.randn(300, 4, 32) for _ in range(3))  # sequences of 100 and 200 tokens
        >>> ends = torch.tensor([0, 100, 300])
        >>> patterns = [tessera.patterns.causal(n, block=64) for n in (100, 200)]
        >>> tessera.varlen_attention(q, k, v, ends, ends, patterns).shape
        torch.Size([300, 4, 32])
    """
    _check_given(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if isinstance(patterns, BlockPattern) or not isinstance(patterns, Sequence):
        raise _type_error("patterns", patterns, "a list with a BlockPattern for each packed sequence")
    for i, p in enumerate(patterns):
        _check_pattern(f"patterns[{i}]", p)
    options = pack_options(bool(patterns) and all(p.causal for p in patterns), {
        "causal": causal, "scale": scale, "window": window, "dropout_p": dropout_p, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "sinks": sinks,
    })  # fmt: skip
    return_lse = check_bool("return_lse", return_lse)
    out, lse = _ops.varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *_ops.pattern_lists(patterns), **options)
    return (out, lse) if return_lse else out


@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    return_lse: Literal[False] = False, **options: Unpack[_Dilated],
) -> Tensor: ...  # fmt: skip
@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    return_lse: Literal[True], **options: Unpack[_Dilated],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, *, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    return_lse: bool, **options: Unpack[_Dilated],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool | None = None,
    scale: float | None = None,
    pattern: str | None = None,
    density: float | None = None,
    block: int = 128,
    budget: str = "even",
    pattern_window: int | None = None,
    pattern_rates: Sequence[int] = (),
    global_tokens: int | None = None,
    stride: int | None = None,
    pattern_seed: int = 0,
    attn_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
) -> Tensor | tuple[Tensor, Tensor]:
    """LongNet (Ding et al. 2023): for each (w, r) segments of w tokens, of each the rows offset::r (offset = head mod
    r) attend to each other; results are joined by their lse. A position that no (w, r) covers is 0.

    Args:
        q: ``[B, S, H, D]`` (or ``[B, H, S, D]``); k, v: ``[B, S, Hkv, D]``, ``[B, S, Hkv, Dv]``.
        segment_lengths, dilation_rates: w in tokens and r, equally many, each >= 1.
        pattern: name of a pattern inside each dilated segment (its tokens are the rows that are left), with density,
            block, budget, pattern_window, pattern_rates, global_tokens, stride, pattern_seed as in
            :mod:`tessera.patterns`; None: dense, and a ValueError for each of those that is given.
        attn_bias: of token pairs, ``[B or 1, H or 1, S or 1, S or 1]``; has a gradient, which takes memory of its size.

    Others as :func:`block_sparse_attention`.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> tessera.dilated_attention(q, k, v, segment_lengths=(128, 512), dilation_rates=(1, 4)).shape
        torch.Size([1, 512, 4, 32])
    """
    _check_given(q=q, k=k, v=v)
    segments = _check_list("segment_lengths", segment_lengths), _check_list("dilation_rates", dilation_rates)
    if pattern is not None and not isinstance(pattern, str):
        raise _type_error("pattern", pattern, "the name of a pattern, or None")
    inner = {}
    for name, value, default, check in (
        ("density", density, None, _check_number),
        ("block", block, 128, check_int),
        ("budget", budget, "even", None),
        ("pattern_window", pattern_window, None, check_int),
        ("pattern_rates", pattern_rates, (), _check_list),
        ("global_tokens", global_tokens, None, check_int),
        ("stride", stride, None, check_int),
        ("pattern_seed", pattern_seed, 0, check_int),
    ):
        if value is default:
            continue
        inner[name] = value if check is None else check(name, value)
        if pattern is None and inner[name] != default:
            raise ValueError(f"{name}: got {value} without a pattern; allowed: nothing, or pattern=name")
    options = pack_options(False, {
        "causal": causal, "scale": scale, "attn_bias": attn_bias, "key_lengths": key_lengths, "window": window,
        "dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes,
    })  # fmt: skip
    return_lse = check_bool("return_lse", return_lse)
    swap = _check_layout(layout)
    if swap:
        q, k, v = _to_bshd("q", q), _to_bshd("k", k), _to_bshd("v", v)
    out, lse = _ops.dilated_forward(q, k, v, *segments, pattern, **inner, **options)
    if swap:
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: str = "bshd") -> tuple[Tensor, Tensor]:
    """Joins partial results over disjoint sets of keys, with gradients. out: ``[B, S, H, Dv]`` (or ``[B, H, S, Dv]``),
    lse: fp32 ``[B, H, S]``. A side with lse -inf contributes nothing; both -inf gives 0 and -inf.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> dense = tessera.patterns.dense(512, 256)
        >>> first = tessera.block_sparse_attention(q, k[:, :256], v[:, :256], dense, return_lse=True)
        >>> second = tessera.block_sparse_attention(q, k[:, 256:], v[:, 256:], dense, return_lse=True)
        >>> out, lse = tessera.merge(*first, *second)
        >>> whole = tessera.block_sparse_attention(q, k, v, tessera.patterns.dense(512))
        >>> torch.allclose(out, whole, atol=1e-5)
        True
    """
    _check_given(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if not _check_layout(layout):
        return _ops.merge(out_a, lse_a, out_b, lse_b)
    out, lse = _ops.merge(_to_bshd("out_a", out_a), lse_a, _to_bshd("out_b", out_b), lse_b)
    return out.transpose(1, 2), lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    attn_bias: Tensor | None = None,
    block_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_offset: int | None = None,
    k_offset: int = 0,
    layout: str = "bshd",
) -> AttentionWeights:
    """Normalised weights of the kept blocks only, before dropout. Arguments as :func:`block_sparse_attention`.
    ValueError if they would need more than 16 GiB. No gradients: attn_bias, block_bias and sinks are detached; where q
    or k require grad, so does the result, and its backward is an error.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> pattern = tessera.patterns.causal(512, block=64)
        >>> weights = tessera.attention_weights(q, k, pattern)
        >>> weights.shape, weights.block_size
        ((1, 4, 512, 512), (64, 64))
    """
    _check_given(q=q, k=k)
    _check_pattern("pattern", pattern)
    options = pack_options(pattern.causal, {
        "causal": causal, "scale": scale, "attn_bias": attn_bias, "block_bias": block_bias, "key_lengths": key_lengths,
        "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks, "q_offset": q_offset,
        "k_offset": k_offset,
    })  # fmt: skip
    options = {n: x.detach() if isinstance(x, Tensor) else x for n, x in options.items()}
    if _check_layout(layout):
        q, k = _to_bshd("q", q), _to_bshd("k", k)
    indices, values = _ops.weights(q, k, *pattern.op_args, **options)
    return AttentionWeights(
        indices, values, (pattern.block_q, pattern.block_k), (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    )
