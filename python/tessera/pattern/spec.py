"""What defines a named pattern, what calls ask for, and the cache of patterns that were made."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch._subclasses.fake_tensor import DynamicOutputShapeException, unset_fake_temporarily
from torch.library import get_ctx, impl, register_fake

import torch
from torch import Tensor

from .block_pattern import BlockPattern
from .checks import check_block, check_bool, check_int, field_kinds, suggestion

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


class Spec(NamedTuple):
    """Everything that defines a named pattern, in the order of the operators that take it; the key of :data:`cache`.

    Example:
        >>> tessera.patterns.spec("strided", 512, block=64, stride=4).stride
        4
    """

    kind: str
    seqlen_q: int
    seqlen_k: int
    block_q: int
    block_k: int
    heads: int = 1
    causal: bool = False
    density: float | None = None
    budget: str = "even"
    q_offset: int | None = None
    seqlen_total: int | None = None
    window: int | None = None
    dilation_rates: tuple[int, ...] = ()
    segment_lengths: tuple[int, ...] = ()
    global_tokens: int | None = None
    stride: int | None = None
    seed: int = 0
    ranks: int = 1
    ranks_per_node: int = 1
    local_density: float | None = None
    global_density: float | None = None
    inter_node_density: float | None = None


class Request(NamedTuple):
    """What a call asks a source of patterns for. A source is what has ``pattern_for(request) -> BlockPattern``.

    Example:
        >>> named = tessera.patterns.Named("local_window", block=64, density=0.5)
        >>> named.pattern_for(tessera.patterns.Request(512, 512, causal=True))
        BlockPattern(512 x 512, block 64 x 64, 21 blocks, density 0.5833, causal)
    """

    seqlen_q: int
    seqlen_k: int
    causal: bool = False
    heads: int = 1  # of the attention; a pattern has so many, or 1
    q_offset: int | None = None  # position of query 0 among the keys, where it is not seqlen_k - seqlen_q
    seqlen_total: int | None = None  # of the sequence that the queries are rows of
    q: Tensor | None = None  # [B, Sq, H, D], for sources that look at what is attended
    k: Tensor | None = None  # [B, Sk, Hkv, D]


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) and hasattr(value, "item"):
        return float(value.item())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; allowed: a number")
    return float(value)


def _budget(name: str, value: Any) -> str:
    if value not in ("even", "proportional"):
        raise ValueError(f'{name}: got {value!r}; allowed: "even" or "proportional"')
    return cast(str, value)


def _list(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: got {type(values).__name__}; allowed: a sequence of integers")
    return tuple(check_int(name, x) for x in values)


def _plain_bool(name: str, value: Any) -> bool:
    return bool(check_bool(name, value))


# What checks an option, by the type of its field.
_CHECKS: dict[str, Any] = {
    "int": check_int, "float": _number, "bool": _plain_bool, "str": _budget, "tuple[int, ...]": _list,
}  # fmt: skip
_KINDS = dict(list(field_kinds(Spec).items())[5:])
_OPTIONS = {n: _CHECKS[kind.removesuffix(" | None")] for n, kind in _KINDS.items()}
_OPTIONAL = {n for n, kind in _KINDS.items() if kind.endswith("None") or kind.startswith("tuple")}


def spec(
    name: str, seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, **options: Any
) -> Spec:
    """The arguments of :func:`tessera.patterns.make`, checked: the one form that operators and the cache take.

    Example:
        >>> tessera.patterns.spec("local_window", 512, density=0.2) == tessera.patterns.spec("local_window",
        ...     512, 512, density=0.2)
        True
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}; allowed: one of {', '.join(NAMES)}")
    if name not in NAMES:
        raise ValueError(f"name: got {name!r}; allowed: {', '.join(NAMES)}{suggestion(name, NAMES)}")
    if unknown := options.keys() - _OPTIONS.keys():
        raise TypeError(f"{min(unknown)}: got an option that no pattern has; allowed: those of {name}")
    seqlen_q = check_int("seqlen_q", seqlen_q)
    checked = {n: _OPTIONS[n](n, value) for n, value in options.items() if value is not None or n not in _OPTIONAL}
    if seqlen_k is None and "q_offset" in checked:  # the keys that the last query may see
        end = checked["q_offset"] + seqlen_q
        seqlen_k = end if checked.get("causal") or name == "causal" else checked.get("seqlen_total", end)
    seqlen_k = seqlen_q if seqlen_k is None else check_int("seqlen_k", seqlen_k)
    return Spec(name, seqlen_q, seqlen_k, *check_block(block), **checked)


def filled(template: Spec, request: Request, heads: int) -> Spec:
    """The definition of a request's pattern, all else as in the template. One tuple: modules ask at every call."""
    t = template
    return Spec._make((
        t.kind, request.seqlen_q, request.seqlen_k, t.block_q, t.block_k, heads, request.causal or t.kind == "causal",
        t.density, t.budget, request.q_offset, request.seqlen_total, *t[11:],
    ))  # fmt: skip


def of_spec(defined: Spec) -> BlockPattern:
    """A pattern anew; in a traced graph by the operator that makes it when the graph runs.

    Example:
        >>> tessera.patterns.of_spec(tessera.patterns.spec("causal", 512, block=64))
        BlockPattern(512 x 512, block 64 x 64, 36 blocks, density 1, causal)
    """
    return BlockPattern._make((_t.named_pattern if _traced() else _t.make_pattern)(*defined))


def _traced() -> bool:
    """Whether somebody records what is called, or wants tensors of its own: a compiler, a fake or other mode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class CacheStats(NamedTuple):
    """Counts of :data:`cache`.

    Example:
        >>> cache = tessera.patterns.PatternCache(max_entries=1)
        >>> made = [cache.get("causal", n) for n in (256, 512, 512)]
        >>> figures = cache.stats()
        >>> figures.hits, figures.misses, figures.evictions
        (1, 2, 1)
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int
    max_entries: int
    max_bytes: int


class PatternCache:
    """Named patterns by everything that defines them, the least recently used out first. Modules, integrations and
    graphs ask the process's :data:`cache`, so they share patterns, their transposed forms included. Safe from several
    threads; two that ask for the same one at once may both make it, and get the same.

    Example:
        >>> cache = tessera.patterns.PatternCache()
        >>> first = cache.get("bigbird", 1024, density=0.5)
        >>> cache.get("bigbird", 1024, density=0.5) is first
        True
    """

    def __init__(self, max_entries: int = 1024, max_bytes: int = 256 << 20) -> None:
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.hits = self.misses = self.evictions = 0
        self._held: OrderedDict[Spec, tuple[BlockPattern, int]] = OrderedDict()  # with the bytes of each
        self._bytes = 0
        self._renew_lock()

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def get(self, name: str, seqlen_q: int, seqlen_k: int | None = None, **options: Any) -> BlockPattern:
        """As :func:`tessera.patterns.make`, but made once."""
        return self.find(spec(name, seqlen_q, seqlen_k, **options))

    def find(self, defined: Spec) -> BlockPattern:
        """The pattern that is defined so, made if it is not there; in a traced graph what the operator makes."""
        return of_spec(defined) if _traced() else self.kept(defined)

    def kept(self, defined: Spec) -> BlockPattern:
        """:meth:`find` beneath graphs."""
        with self._lock:
            found = self._held.get(defined)
            if found is not None:
                self._held.move_to_end(defined)
                self.hits += 1
                return found[0]
        return self.make(*defined)

    def make(self, kind: str, *others: Any) -> BlockPattern:
        """The pattern of a :class:`Spec`, made and kept."""
        defined = Spec(kind, *others)
        with torch._C._DisableFuncTorch():  # tensors of a transform would end with it
            pattern = BlockPattern._make(_t.make_pattern(*defined))
        size = _bytes(pattern)
        with self._lock:
            self.misses += 1
            if defined in self._held:  # since we looked
                return self._held[defined][0]
            if size <= self.max_bytes and self.max_entries > 0:
                self._held[defined] = pattern, size
                self._bytes += size
                self._keep_limits()
        return pattern

    def _keep_limits(self) -> None:
        while len(self._held) > self.max_entries or self._bytes > self.max_bytes:
            self._bytes -= self._held.popitem(last=False)[1][1]
            self.evictions += 1

    def warm_up(self, name: str, seqlens: Sequence[int], *, block: int | Sequence[int] = 128, **options: Any) -> None:
        """Makes the patterns of these lengths (seqlen_q = seqlen_k) ahead of time."""
        for n in _list("seqlens", seqlens):
            self.get(name, n, n, block=block, **options)

    def stats(self) -> CacheStats:
        """Hits, misses, evictions, entries, bytes and limits."""
        with self._lock:
            return CacheStats(
                self.hits, self.misses, self.evictions, len(self._held), self._bytes, self.max_entries, self.max_bytes
            )

    def resize(self, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """New limits; patterns beyond them go at once."""
        with self._lock:
            if max_entries is not None:
                self.max_entries = check_int("max_entries", max_entries, 0)
            if max_bytes is not None:
                self.max_bytes = check_int("max_bytes", max_bytes, 0)
            self._keep_limits()

    def held(self) -> dict[Spec, BlockPattern]:
        """All patterns that are there."""
        with self._lock:
            return {defined: pattern for defined, (pattern, _) in self._held.items()}

    def drop(self, defined: Any) -> None:
        """Gives up one; KeyError where it is not there."""
        with self._lock:
            self._bytes -= self._held.pop(defined)[1]

    def clear(self) -> None:
        """Drops all patterns; counts go on."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    # Who holds one is copied and pickled: locks are not.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew_lock()

    def __len__(self) -> int:
        return len(self._held)


def _bytes(pattern: BlockPattern) -> int:
    """Memory of a pattern, its tensors, and the transposed form that a backward makes."""
    columns = pattern.batches * pattern.heads * pattern.cols
    return pattern.nbytes + _t.pattern_bytes(*pattern.op_args) + 8 * (columns + 1) + 12 * pattern.num_blocks


cache = PatternCache()
if hasattr(os, "register_at_fork"):  # a child must not wait for a thread that it does not have
    os.register_at_fork(after_in_child=cache._renew_lock)


# ---- in graphs: one operator makes a named pattern when the graph runs


def _spec_of(arguments: tuple[Any, ...]) -> Spec:
    fields: list[Any] = [tuple(x) if isinstance(x, list) else x for x in arguments]
    return Spec(*fields)


@impl("tessera::named_pattern", "default")
def _named_pattern(*arguments: Any) -> tuple[Any, ...]:
    # Results of its own, as operators may not return what others hold; behind them lies the pattern that is kept.
    return _t.pattern_canonical(*cache.kept(_spec_of(arguments)).op_args)


@register_fake("tessera::named_pattern")
def _named_pattern_fake(*arguments: Any) -> tuple[Any, ...]:
    defined = _spec_of(arguments)
    try:
        entries: Any = get_ctx().new_dynamic_size()
    except DynamicOutputShapeException:  # without symbols; then lengths are numbers
        with unset_fake_temporarily():
            entries = cache.kept(defined).num_blocks
    _, seqlen_q, seqlen_k, block_q, block_k, heads, causal = defined[:7]
    skip = 0 if defined.q_offset is None else defined.q_offset % block_q
    rows = heads * ((skip + seqlen_q + block_q - 1) // block_q)
    flags, at = (1 if causal or defined.kind == "causal" else 0), defined.q_offset
    if at is None and defined.kind != "dense":  # they say where they stand
        at = seqlen_k - seqlen_q

    def empty(*sizes: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="cpu")

    bitmaps = empty(0, block_q, (block_k + 63) // 64, dtype=torch.int64)  # none has any
    return empty(rows + 1), empty(entries), empty(0), bitmaps, [
        seqlen_q, seqlen_k, block_q, block_k, heads, 1, flags | (0 if at is None else 2), at or 0, skip
    ]  # fmt: skip


# What torch.load(weights_only=True) may make: what configurations hold.
torch.serialization.add_safe_globals([Spec])
