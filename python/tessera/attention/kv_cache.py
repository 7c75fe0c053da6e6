"""A key/value cache that grows token by token, and attention of the newest tokens over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from .. import _ops
from ..pattern import BlockPattern, PatternConfig, Request
from ..pattern.checks import check_bool, check_int, check_list
from .functional import _check_given, _check_layout, _to_bshd, pack_options

PatternSource = BlockPattern | PatternConfig | Mapping[str, Any] | str | None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Attend(TypedDict, total=False):
    """Options of :meth:`KVCache.attend`, for type checkers."""

    density: float | None
    budget: str | None
    seqlen_total: int | None
    scale: float | None
    window: int | tuple[int | None, int | None] | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    layout: str


class KeySummaries(NamedTuple):
    """Of each block of keys of one sequence: mean, least and largest, each fp32 ``[blocks, Hkv, D]``."""

    mean: Tensor
    min: Tensor
    max: Tensor


class _NoGradient(torch.autograd.Function):
    """Hands results on; whoever differentiates them is told that there is no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(
            "KVCache.attend: got a backward pass; allowed: none, its results have no gradient "
            "(tessera.block_sparse_attention has)"
        )


class KVCache:
    """Keys and values of ``batch`` sequences that grow token by token, in pages of ``block`` tokens.

    Sequences may have different lengths. :meth:`attend` gives the newest tokens what one pass over the whole sequence
    would give them, whatever the pattern. Beams share pages until one of them writes (:meth:`reorder`).

    Args:
        batch: sequences, 0 or more.
        kv_heads, head_dim: of the keys; head_dim_v: of the values, default head_dim.
        dtype: float32, bfloat16, float16, or float64 (the slow reference).
        block: tokens of a page and of a block of keys in patterns, a multiple of 16 in 16..256.

    No gradients: what is appended is copied. Not safe for calls at the same time of which one writes.

    >>> import torch, tessera
    >>> cache = tessera.KVCache(1, kv_heads=2, head_dim=16)
    >>> prompt, token = torch.randn(1, 100, 2, 16), torch.randn(1, 1, 2, 16)
    >>> cache.append(prompt, prompt)
    >>> cache.append(token, token)
    >>> cache.attend(torch.randn(1, 1, 8, 16)).shape
    torch.Size([1, 1, 8, 16])
    >>> cache
    KVCache(batch=1, kv_heads=2, head_dim=16, dtype=torch.float32, block=64, lengths=[101])

    Raises ValueError or TypeError that name the argument; the cache is then as it was.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        block: int = 64,
    ) -> None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: got {type(dtype).__name__}; allowed: a torch.dtype")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: got {dtype}; allowed: {', '.join(map(str, _DTYPES))}")
        self._sizes = (
            check_int("batch", batch),
            check_int("kv_heads", kv_heads),
            check_int("head_dim", head_dim),
            check_int("head_dim_v", head_dim if head_dim_v is None else head_dim_v),
        )
        self._dtype, self._block = dtype, check_int("block", block)
        self._cache = torch.classes.tessera.KvCache(*self._sizes, str(dtype).removeprefix("torch."), self._block)

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self._cache.lengths())

    @property
    def kv_heads(self) -> int:
        return self._sizes[1]

    @property
    def head_dim(self) -> int:
        return self._sizes[2]

    @property
    def head_dim_v(self) -> int:
        return self._sizes[3]

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def block(self) -> int:
        """Tokens of a page."""
        return self._block

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int64 ``[B]``; a copy."""
        return torch.tensor(self._cache.lengths(), dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes held: pages, their summaries, tables."""
        return self._cache.nbytes()

    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, *, layout: str = "bshd"
    ) -> None:
        """Adds tokens at the end of each sequence.

        Args:
            k: ``[B, S, Hkv, D]``, v: ``[B, S, Hkv, Dv]`` (or ``[B, Hkv, S, D]``), dtype of the cache, any strides.
            lengths: ``[B]``, how many of the S tokens belong to each sequence, the first ones; None: all.
        """
        _check_given(k=k, v=v)
        if _check_layout(layout):
            k, v = _to_bshd("k", k), _to_bshd("v", v)
        numbers = [] if lengths is None else self._numbers("lengths", lengths)
        if lengths is not None and not numbers and self.batch:
            raise ValueError(f"lengths: got 0 numbers; allowed: one a sequence, B = {self.batch}")
        try:
            self._cache.append(k.detach(), v.detach(), numbers)
        except torch.OutOfMemoryError as e:
            raise MemoryError(str(e)) from None

    @overload
    def attend(
        self,
        q: Tensor,
        pattern: PatternSource = None,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[_Attend],
    ) -> Tensor: ...
    @overload
    def attend(
        self, q: Tensor, pattern: PatternSource = None, *, return_lse: Literal[True], **options: Unpack[_Attend]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attend(
        self, q: Tensor, pattern: PatternSource = None, *, return_lse: bool, **options: Unpack[_Attend]
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attend(
        self,
        q: Tensor,
        pattern: PatternSource = None,
        *,
        density: float | None = None,
        budget: str | None = None,
        seqlen_total: int | None = None,
        scale: float | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        layout: str = "bshd",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Causal attention of the last Sq tokens of each sequence, whose keys are in the cache already.

        Args:
            q: ``[B, Sq, H, D]`` (or ``[B, H, Sq, D]``), dtype of the cache; H a multiple of kv_heads. Of a sequence
                shorter than Sq the last ``lengths[b]`` rows are its tokens.
            pattern: None: every key up to the token. A :class:`~tessera.BlockPattern` of whole sequences: at least as
                long as each of them, block_k that of the cache. Or a named one: a name, a
                :class:`~tessera.PatternConfig`, a dict of its fields; its rows are made for where the tokens stand.
            density, budget: of a named pattern, in place of the config's.
            seqlen_total: how long a sequence may become. A budget is even over the whole of it, so steps of a named
                pattern with a density agree with each other (and with one pass) where it is given.
            scale, window, softcap, alibi_slopes, sinks: as :func:`tessera.block_sparse_attention`.

        Returns:
            out ``[B, Sq, H, Dv]``, or (out, lse), lse fp32 ``[B, H, Sq]``. Rows without a token: 0 and -inf.
        """
        _check_given(q=q)
        options = pack_options(True, {
            "scale": scale, "window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks,
        })  # fmt: skip
        return_lse = check_bool("return_lse", return_lse)
        swap = _check_layout(layout)
        rows = _to_bshd("q", q) if swap else q
        given = {"density": density, "budget": budget, "seqlen_total": seqlen_total}
        if pattern is None or isinstance(pattern, BlockPattern):
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name}: got {value!r} without a named pattern; allowed: with a name or a config")
            named: dict[str, Any] = {} if pattern is None else dict(zip(_ops.PATTERN, pattern.op_args))
        else:
            config = self._config(pattern, density=density, budget=budget)
            total = None if seqlen_total is None else check_int("seqlen_total", seqlen_total)
            heads = rows.shape[2] if rows.dim() == 4 else 1
            defined = config.definition(Request(0, 0, heads=heads, seqlen_total=total))  # the cache knows the lengths
            if defined.block_k != self._block:
                block = defined.block_k
                raise ValueError(f"block_size: got {block} for keys; allowed: {self._block}, the block of the cache")
            named = defined._asdict()
        named = {name: list(x) if isinstance(x, tuple) else x for name, x in named.items() if x is not None and x != ()}
        options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
        out, lse = self._cache.attend(rows.detach(), named, options)
        if q.requires_grad and torch.is_grad_enabled():
            out, lse = _NoGradient.apply(q, out, lse)
        if swap:
            out = out.transpose(1, 2)
        return (out, lse) if return_lse else out

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Keeps the first ``lengths[b]`` tokens of each sequence: what speculative decoding takes back."""
        self._cache.truncate(self._numbers("lengths", lengths))

    def reorder(self, index: Tensor | Sequence[int]) -> None:
        """Sequence i becomes what sequence ``index[i]`` was; as many sequences as numbers. Nothing is copied until one
        of those that share a page appends to it."""
        self._cache.reorder(self._numbers("index", index))

    def summaries(self, sequence: int) -> KeySummaries:
        """Mean, least and largest of each block of keys of one sequence, kept as it grows (Quest, Tang et al. 2024,
        section 3.2); copies."""
        return KeySummaries(*self._cache.summaries(check_int("sequence", sequence)))

    def _config(self, pattern: Any, **fields: Any) -> PatternConfig:
        if isinstance(pattern, str):
            pattern = {"pattern_type": pattern, "block_size": self._block}
        elif isinstance(pattern, Mapping) and "block_size" not in pattern:
            pattern = {**pattern, "block_size": self._block}
        elif not isinstance(pattern, (PatternConfig, Mapping)):
            raise TypeError(
                f"pattern: got {type(pattern).__name__}; allowed: a BlockPattern of whole sequences, a PatternConfig, "
                "a dict of its fields, the name of a pattern, or None"
            )
        return PatternConfig.of(pattern, **fields)

    @staticmethod
    def _numbers(name: str, values: Any) -> list[int]:
        if isinstance(values, Tensor):
            if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise ValueError(f"{name}: got {values.dtype} {list(values.shape)}; allowed: integers [B]")
            return cast("list[int]", values.tolist())
        return [check_int(name, x) for x in check_list(name, values, "integers, one a sequence")]

    def __repr__(self) -> str:
        lengths = self._cache.lengths()
        shown = f"{lengths[:8]}"[:-1] + f", ... ({len(lengths)})]" if len(lengths) > 8 else f"{lengths}"
        value_dim = f", head_dim_v={self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        return (
            f"KVCache(batch={len(lengths)}, kv_heads={self.kv_heads}, head_dim={self.head_dim}{value_dim}, "
            f"dtype={self.dtype}, block={self.block}, lengths={shown})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("KVCache: got a copy or a pickle; allowed: reorder, which shares pages between sequences")
