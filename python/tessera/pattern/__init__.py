"""What is computed: patterns of blocks, what defines them, what makes them for the lengths of a call."""

from __future__ import annotations

from .block_pattern import BlockPattern, PatternStatistics
from .config import PatternConfig
from .source import PatternSource, pattern_for
from .spec import PatternCache, Request, Spec, cache

__all__ = [
    "BlockPattern",
    "PatternCache",
    "PatternConfig",
    "PatternSource",
    "PatternStatistics",
    "Request",
    "Spec",
    "cache",
    "pattern_for",
]
