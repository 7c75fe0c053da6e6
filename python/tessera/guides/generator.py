"""Patterns of one configuration for any length, kept for the next call."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor

from ..pattern import BlockPattern, PatternCache, PatternConfig, Request, Spec
from ..pattern.checks import reject
from ..pattern.spec import of_spec


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

    def __init__(self, generator: SparsePatternGenerator, max_entries: int = 128) -> None:
        self._generator = generator
        self._made = PatternCache(max_entries, sys.maxsize)
        self._own: dict[tuple[int, int], BlockPattern] = {}

    # What counts and limits those that were made.
    max_entries = property(lambda self: self._made.max_entries, lambda self, n: self._made.resize(max_entries=n))
    hits = property(lambda self: self._made.hits)
    misses = property(lambda self: self._made.misses)
    evictions = property(lambda self: self._made.evictions)

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

    def made(self, defined: Spec) -> BlockPattern:
        """The pattern that the generator makes of these definitions, made once."""
        return self._made.find(defined)

    def __getitem__(self, key: Hashable) -> BlockPattern:
        lengths = self._lengths(key)
        return self._own[lengths] if lengths in self._own else self._made.held()[cast(Spec, key)]

    def __setitem__(self, key: Hashable, pattern: Any) -> None:
        lengths = self._lengths(key)
        if lengths is None or min(lengths) < 0:
            reject("pattern_cache key", key, "a sequence length, or (seqlen_q, seqlen_k)", TypeError)
        pattern = as_pattern(pattern, self._generator.config.block_size, *lengths)
        if (pattern.seqlen_q, pattern.seqlen_k) != lengths:
            got = f"a pattern of {pattern.seqlen_q} x {pattern.seqlen_k} tokens"
            reject("pattern_cache", got, f"{lengths}, its key")
        self._own[lengths] = pattern

    def __delitem__(self, key: Hashable) -> None:
        lengths = self._lengths(key)
        if lengths in self._own:
            del self._own[lengths]
        else:
            self._made.drop(key)

    def __iter__(self) -> Iterator[Hashable]:
        return iter([*self._own, *self._made.held()])

    def __len__(self) -> int:
        return len(self._own) + len(self._made)

    def clear(self) -> None:
        """Drops all patterns, one's own too. Counts go on."""
        self._own.clear()
        self._made.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all patterns held."""
        return sum(p.nbytes for p in (*self._own.values(), *self._made.held().values()))


class SparsePatternGenerator:
    """Patterns of one configuration, for any length. ``config``: any form that PatternConfig.of takes.

    Example:
        >>> generator = tessera.SparsePatternGenerator(pattern_type="local_window", sparsity_ratio=0.5,
        ...     block_size=64)
        >>> generator.generate_pattern(512, causal=True)
        BlockPattern(512 x 512, block 64 x 64, 21 blocks, density 0.5833, causal)
    """

    def __init__(self, config: Any = None, **fields: Any) -> None:
        self.config = PatternConfig.of(config, **fields)
        self.pattern_cache = PatternStore(self)

    def generate_pattern(
        self, seq_len: int, num_heads: int = 1, seq_len_k: int | None = None, causal: bool = False
    ) -> BlockPattern:
        """The pattern for seq_len queries and seq_len_k (default: as many) keys. Heads share it, except those of
        random and bigbird: then it has num_heads. With enable_caching it is made once."""
        return self.pattern_for(Request(seq_len, seq_len if seq_len_k is None else seq_len_k, causal, num_heads))

    def pattern_for(self, request: Request) -> BlockPattern:
        """What calls ask: one's own pattern of these lengths, else the configuration's."""
        own = self.pattern_cache.own(request.seqlen_q, request.seqlen_k)
        if own is not None:
            return own
        defined = self.config.definition(request)
        return self.pattern_cache.made(defined) if self.config.enable_caching else of_spec(defined)

    create_pattern = generate_pattern
