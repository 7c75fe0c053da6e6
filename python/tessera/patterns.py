"""The named patterns. Each function returns a :class:`tessera.BlockPattern`, made in O(kept blocks), deterministically.

Common arguments: ``seqlen_q``, ``seqlen_k`` (default: seqlen_q) in tokens; ``block``, an int or (block_q, block_k),
each a multiple of 16 in 16..256; ``causal`` admits the block pairs that hold at least one (q, k) with
``k <= q + seqlen_k - seqlen_q``, and the pattern carries it: calls that take it are causal to the token; ``heads`` is
1, or the number of heads where they shall differ. ``density`` is the KEPT share of the admissible pairs, in (0, 1].
Every row of blocks keeps the same number of them, as far as it has them, so that all together come nearest to the
density (``budget="even"``), or each ``max(1, round(density * admissible in the row))`` (``budget="proportional"``);
always its diagonal. Explicit geometry (window, global_tokens, stride) wins over density; the achieved density is
``pattern.density``. ``q_offset``: the queries are rows of a longer sequence, tokens q_offset .. q_offset + seqlen_q -
1; each sees the blocks that it sees in the pattern of the whole, whose length, ``seqlen_total``, is to be given where
steps of different lengths have to agree (budgets are of the whole; default: the longer of seqlen_k and q_offset +
seqlen_q). seqlen_k is then, if not given, that of the keys which the queries may see. Errors: ValueError or TypeError
naming the argument.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypedDict, Unpack, cast

import torch

from ._pattern import BlockPattern, check_block, check_bool, check_int

_t = torch.ops.tessera
NAMES = (
    "dense",
    "causal",
    "local_window",
    "dilated_sparse",
    "global_local",
    "strided",
    "random",
    "bigbird",
    "dilated_segments",
    "hierarchical",
)
_INTS = ("q_offset", "seqlen_total", "window", "global_tokens", "stride")
_FLOATS = ("density", "local_density", "global_density", "inter_node_density")


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value.item()) if not isinstance(value, bool) else _bad(name, value)
        except AttributeError:
            _bad(name, value)
    return float(value)


def _budget(value: Any) -> str:
    if value not in ("even", "proportional"):
        raise ValueError(f'budget: got {value!r}; allowed: "even" or "proportional"')
    return cast(str, value)


def _bad(name: str, value: Any) -> NoReturn:
    raise TypeError(f"{name}: got {type(value).__name__} {value!r}; allowed: a number")


def _list(name: str, values: Any) -> list[int]:
    if values is None:
        return []
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: got {type(values).__name__}; allowed: a sequence of integers")
    return [check_int(name, x) for x in values]


def _spec(
    kind: str, seqlen_q: int, seqlen_k: int | None, block: int | Sequence[int], heads: int = 1, causal: bool = False,
    seed: int = 0, ranks: int = 1, ranks_per_node: int = 1, **options: Any,
) -> list[Any]:  # fmt: skip
    if not isinstance(kind, str):
        raise TypeError(f"name: got {type(kind).__name__}; allowed: one of {', '.join(NAMES)}")
    if kind not in NAMES:
        raise ValueError(f"name: got {kind!r}; allowed: {', '.join(NAMES)}")
    seqlen_q = check_int("seqlen_q", seqlen_q)
    ints = {n: None if options.get(n) is None else check_int(n, options[n]) for n in _INTS}
    if seqlen_k is None and ints["q_offset"] is not None:  # the keys that the last query may see
        end, total = ints["q_offset"] + seqlen_q, ints["seqlen_total"]
        seqlen_k = end if total is None or causal or kind == "causal" else total
    seqlen_k = seqlen_q if seqlen_k is None else check_int("seqlen_k", seqlen_k)
    block_q, block_k = check_block(block)
    floats = {n: _number(n, options.get(n)) for n in _FLOATS}
    unknown = set(options) - set(_INTS) - set(_FLOATS) - {"dilation_rates", "segment_lengths", "budget"}
    if unknown:
        raise TypeError(f"{sorted(unknown)[0]}: got an option that no pattern has; allowed: those of {kind}")
    return [
        kind,
        seqlen_q,
        seqlen_k,
        block_q,
        block_k,
        check_int("heads", heads),
        bool(check_bool("causal", causal)),
        floats["density"],
        _budget(options.get("budget", "even")),
        ints["q_offset"],
        ints["seqlen_total"],
        ints["window"],
        _list("dilation_rates", options.get("dilation_rates")),
        _list("segment_lengths", options.get("segment_lengths")),
        ints["global_tokens"],
        ints["stride"],
        check_int("seed", seed),
        check_int("ranks", ranks),
        check_int("ranks_per_node", ranks_per_node),
        floats["local_density"],
        floats["global_density"],
        floats["inter_node_density"],
    ]


class Rows(TypedDict, total=False):
    """Where the queries stand, and how a density is shared out; see the top of this module."""

    budget: str
    q_offset: int | None
    seqlen_total: int | None


def make(
    name: str,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    causal: bool = False,
    heads: int = 1,
    cached: bool = False,
    **options: Any,
) -> BlockPattern:
    """The pattern of that name, with the options of the function of that name. ``cached``: through :data:`cache`."""
    spec = _spec(name, seqlen_q, seqlen_k, block, heads, causal, **options)
    return BlockPattern._make(_t.cached_pattern(*spec) if cached else _t.make_pattern(*spec))


def dense(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """Every admissible pair."""
    return make("dense", seqlen_q, seqlen_k, block=block, causal=causal, heads=heads, **rows)


def causal(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """Every pair that causality admits. Calls that take it are causal to the token."""
    return make("causal", seqlen_q, seqlen_k, block=block, causal=True, heads=heads, **rows)


def local_window(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    window: int | None = None,
    density: float | None = None,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """Pairs whose tokens come within ``window / 2`` on either side (causal: ``window`` back), or with ``density`` alone
    the nearest pairs up to the budget."""
    return make(
        "local_window",
        seqlen_q,
        seqlen_k,
        block=block,
        window=window,
        density=density,
        causal=causal,
        heads=heads,
        **rows,
    )


def dilated_sparse(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    density: float,
    dilation_rates: Sequence[int] | None = None,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """The budget shared round-robin among ``dilation_rates`` (blocks; default 1, 2, 4, 8, 16): each rate r in turn adds
    its next unused nearest pair at distance +-r, +-2r, ..."""
    return make(
        "dilated_sparse",
        seqlen_q,
        seqlen_k,
        block=block,
        density=density,
        dilation_rates=dilation_rates,
        causal=causal,
        heads=heads,
        **rows,
    )


def global_local(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    global_tokens: int | None = None,
    window: int | None = None,
    density: float | None = None,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """The first ``global_tokens`` (default 64) as rows and columns, and the local window (or density)."""
    return make(
        "global_local",
        seqlen_q,
        seqlen_k,
        block=block,
        global_tokens=global_tokens,
        window=window,
        density=density,
        causal=causal,
        heads=heads,
        **rows,
    )


def strided(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    stride: int | None = None,
    density: float | None = None,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """``(i - j) % stride == 0``, or neighbours (Child et al. 2019)."""
    return make(
        "strided", seqlen_q, seqlen_k, block=block, stride=stride, density=density,
        causal=causal, heads=heads, **rows,
    )  # fmt: skip


def random(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    density: float,
    seed: int = 0,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """Random pairs, exactly the budget a row; every (seed, head, row) draws on its own."""
    return make(
        "random", seqlen_q, seqlen_k, block=block, density=density, seed=seed,
        causal=causal, heads=heads, **rows,
    )  # fmt: skip


def bigbird(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    density: float,
    global_tokens: int | None = None,
    window: int | None = None,
    seed: int = 0,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """Global, window and random pairs up to the budget (Zaheer et al. 2020)."""
    return make(
        "bigbird",
        seqlen_q,
        seqlen_k,
        block=block,
        density=density,
        global_tokens=global_tokens,
        window=window,
        seed=seed,
        causal=causal,
        heads=heads,
        **rows,
    )


def dilated_segments(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """LongNet on blocks (Ding et al. 2023): for some (w, r) the same segment of w tokens and i = j = offset (mod r),
    the offset shifting by head."""
    return make(
        "dilated_segments",
        seqlen_q,
        seqlen_k,
        block=block,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        causal=causal,
        heads=heads,
        **rows,
    )


def hierarchical(
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    density: float | None = None,
    local_density: float | None = None,
    global_density: float | None = None,
    inter_node_density: float | None = None,
    ranks: int = 1,
    ranks_per_node: int = 1,
    causal: bool = False,
    heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:
    """By place: one density inside a rank, one inside a node, one across nodes (``density`` for those not given); far
    parts keep the same columns for all rows of a rank."""
    return make(
        "hierarchical",
        seqlen_q,
        seqlen_k,
        block=block,
        density=density,
        local_density=local_density,
        global_density=global_density,
        inter_node_density=inter_node_density,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        causal=causal,
        heads=heads,
        **rows,
    )


class CacheStats(NamedTuple):
    """Counts of :data:`cache`."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    max_entries: int
    max_bytes: int


class PatternCache:
    """The process's cache of named patterns: least recently used, keyed by everything that defines a pattern.

    The core keeps them; :meth:`get` copies one into tensors. Modules ask at every call, so they share tensors: as long
    as those fit into the limits beside what the core keeps, and until it drops a pattern.
    """

    def __init__(self) -> None:
        self._shared: dict[Any, BlockPattern] = {}
        self._shared_hits = self._shared_bytes = self._evictions = 0
        self._renew_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()

    def shared(self, key: Any) -> BlockPattern | None:
        """What :meth:`share` keeps under this key; a hit."""
        found = self._shared.get(key)
        if found is None or torch._C._len_torch_dispatch_stack():  # who traces wants tensors of its own
            return None
        with self._lock:
            self._shared_hits += 1
        return found

    def share(self, key: Any, name: str, seqlen_q: int, seqlen_k: int, **options: Any) -> BlockPattern:
        """As :meth:`get`, kept for :meth:`shared` under a key that stands for all the arguments."""
        pattern = self.get(name, seqlen_q, seqlen_k, **options)
        if type(pattern.indptr) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(pattern.indptr):
            return pattern
        size = sum(t.numel() * t.element_size() for t in pattern.op_args[:4] if t is not None)
        with self._lock:
            now = self._keep_limits(size)
            if size <= now.max_bytes - now.bytes and now.entries > 0 and key not in self._shared:
                self._shared[key] = pattern
                self._shared_bytes += size
        return pattern

    def _keep_limits(self, more: int = 0) -> CacheStats:
        """Gives up the shared tensors where the core dropped a pattern, or where they no longer fit; locked."""
        now = CacheStats(*_t.cache_stats())
        room = now.max_bytes - now.bytes - more
        if now.evictions != self._evictions or self._shared_bytes > room or len(self._shared) >= now.max_entries:
            self._drop_shared()
        self._evictions = now.evictions
        return now

    def _drop_shared(self) -> None:
        self._shared.clear()
        self._shared_bytes = 0

    def get(self, name: str, seqlen_q: int, seqlen_k: int | None = None, **options: Any) -> BlockPattern:
        """As :func:`make`, but made once."""
        pattern = make(name, seqlen_q, seqlen_k, cached=True, **options)
        if not torch.compiler.is_compiling() and self._shared and not torch._C._len_torch_dispatch_stack():
            with self._lock:
                self._keep_limits()
        return pattern

    def warm_up(self, name: str, seqlens: Sequence[int], *, block: int | Sequence[int] = 128, **options: Any) -> None:
        """Makes the patterns of these lengths (seqlen_q = seqlen_k) ahead of time."""
        _t.cache_warm_up(_list("seqlens", seqlens), *_spec(name, 0, 0, block, **options))
        with self._lock:
            self._keep_limits()

    def stats(self) -> CacheStats:
        """Hits, misses, evictions, entries, bytes and limits."""
        core = CacheStats(*_t.cache_stats())
        return core._replace(hits=core.hits + self._shared_hits, bytes=core.bytes + self._shared_bytes)

    def resize(self, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """New limits; patterns beyond them go at once."""
        now = self.stats()
        with self._lock:
            self._drop_shared()
        _t.cache_resize(
            now.max_entries if max_entries is None else check_int("max_entries", max_entries, 0),
            now.max_bytes if max_bytes is None else check_int("max_bytes", max_bytes, 0),
        )

    def clear(self) -> None:
        """Drops all patterns; counts go on."""
        with self._lock:
            self._drop_shared()
        _t.cache_clear()

    def __len__(self) -> int:
        return self.stats().entries


cache = PatternCache()
