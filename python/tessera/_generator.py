"""Patterns of one configuration for any length, kept for the next call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ._pattern import BlockPattern
from .config import PatternConfig, reject


def as_pattern(
    value: Any, block_size: int | tuple[int, int] = 128, seqlen_q: int | None = None, seqlen_k: int | None = None
) -> BlockPattern:
    """A BlockPattern, or the pattern of a bool tensor [R, C], [H, R, C] or [B, H, R, C] of blocks; lengths default to
    whole blocks."""
    if isinstance(value, BlockPattern):
        return value
    if not isinstance(value, Tensor) or value.dtype != torch.bool or not 2 <= value.dim() <= 4:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
        reject("pattern", got, "a BlockPattern, or a bool tensor [R, C], [H, R, C] or [B, H, R, C]", TypeError)
    block_q, block_k = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    return BlockPattern.from_mask(
        value,
        block=(block_q, block_k),
        seqlen_q=value.shape[-2] * block_q if seqlen_q is None else seqlen_q,
        seqlen_k=value.shape[-1] * block_k if seqlen_k is None else seqlen_k,
    )


class PatternStore(MutableMapping[Hashable, BlockPattern]):
    """The patterns of one generator: ``pattern_generator.pattern_cache``. Thread-safe, least recently used out first.

    Those that the generator made are found by everything that defines them, so none can be stale. A pattern of one's
    own is put under a sequence length, or under (seqlen_q, seqlen_k): a BlockPattern, or a bool tensor of blocks
    ([heads,] rows, columns); calls of that length then use it, instead of configuration and segments. Own patterns
    stay until deleted; len, iteration and clear() are over both sorts.
    """

    def __init__(self, generator: PatternGenerator, max_entries: int = 128) -> None:
        self._generator = generator
        self.max_entries = max_entries
        self.hits = self.misses = self.evictions = 0
        self._lock = threading.RLock()
        self._made: OrderedDict[Hashable, BlockPattern] = OrderedDict()
        self._own: dict[tuple[int, int], Any] = {}

    @staticmethod
    def _lengths(key: Hashable) -> tuple[int, int] | None:
        if isinstance(key, int) and not isinstance(key, bool):
            return key, key
        if isinstance(key, tuple) and len(key) == 2 and all(isinstance(item, int) for item in key):
            return key
        return None

    def own(self, seqlen_q: int, seqlen_k: int) -> BlockPattern | None:
        """The pattern that somebody put here for these lengths."""
        return self._own.get((seqlen_q, seqlen_k))

    def has_own(self) -> bool:
        return bool(self._own)

    def made(self, key: Hashable, make: Callable[[], BlockPattern]) -> BlockPattern:
        with self._lock:
            pattern = self._made.get(key)
            if pattern is not None:
                self._made.move_to_end(key)
                self.hits += 1
                return pattern
            self.misses += 1
        pattern = make()
        with self._lock:
            self._made[key] = pattern
            while len(self._made) > self.max_entries:
                self._made.popitem(last=False)
                self.evictions += 1
        return pattern

    def __getitem__(self, key: Hashable) -> BlockPattern:
        lengths = self._lengths(key)
        with self._lock:
            if lengths is not None and lengths in self._own:
                return self._own[lengths]
            return self._made[key]

    def __setitem__(self, key: Hashable, pattern: Any) -> None:
        lengths = self._lengths(key)
        if lengths is None or min(lengths) < 0:
            reject("pattern_cache key", key, "a sequence length, or (seqlen_q, seqlen_k)", TypeError)
        pattern = as_pattern(pattern, self._generator.config.block_size, *lengths)
        if (pattern.seqlen_q, pattern.seqlen_k) != lengths:
            got = f"a pattern of {pattern.seqlen_q} x {pattern.seqlen_k} tokens"
            reject("pattern_cache", got, f"{lengths}, its key")
        with self._lock:
            self._own[lengths] = pattern

    def __delitem__(self, key: Hashable) -> None:
        lengths = self._lengths(key)
        with self._lock:
            if lengths is not None and lengths in self._own:
                del self._own[lengths]
            else:
                del self._made[key]

    def __iter__(self) -> Iterator[Hashable]:
        with self._lock:
            return iter([*self._own, *self._made])

    def __len__(self) -> int:
        return len(self._own) + len(self._made)

    def clear(self) -> None:
        """Drops all patterns, one's own too. Counts go on."""
        with self._lock:
            self._own.clear()
            self._made.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all patterns held."""
        with self._lock:
            patterns = [*self._own.values(), *self._made.values()]
        arrays = [t for p in patterns for t in (p.indptr, p.indices, p.bitmap_index, p.bitmaps) if t is not None]
        return sum(t.numel() * t.element_size() for t in arrays)

    # Modules are copied and pickled: locks are not.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


class PatternGenerator:
    """Patterns of one configuration, for any length. ``config``: any form that PatternConfig.of takes."""

    def __init__(self, config: Any = None, **fields: Any) -> None:
        self.config = PatternConfig.of(config, **fields)
        self.pattern_cache = PatternStore(self)

    def generate_pattern(
        self, seq_len: int, num_heads: int = 1, seq_len_k: int | None = None, causal: bool = False
    ) -> BlockPattern:
        """The pattern for seq_len queries and seq_len_k (default: as many) keys. Heads share it, except those of
        random and bigbird: then it has num_heads. With enable_caching it is made once."""
        seq_len_k = seq_len if seq_len_k is None else seq_len_k
        own = self.pattern_cache.own(seq_len, seq_len_k)
        if own is not None:
            return own
        config = self.config
        if not config.enable_caching:
            return config.pattern(seq_len, seq_len_k, causal=causal, heads=num_heads)
        kind, block, options = config.spec()
        heads = num_heads if config.heads_differ else 1
        chosen = tuple((name, tuple(item) if isinstance(item, list) else item) for name, item in options.items())
        key = (kind, block, seq_len, seq_len_k, causal, heads, chosen)
        return self.pattern_cache.made(key, lambda: config.pattern(seq_len, seq_len_k, causal=causal, heads=num_heads))

    create_pattern = generate_pattern

    def __call__(self, seqlen_q: int, seqlen_k: int) -> BlockPattern:
        """generate_pattern for one head, as a module's ``pattern=`` argument."""
        return self.generate_pattern(seqlen_q, 1, seqlen_k)
