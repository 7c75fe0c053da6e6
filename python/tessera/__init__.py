"""Tessera: block-sparse attention for long sequences, on PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import patterns
from ._pattern import BlockPattern, PatternStatistics
from .functional import (
    AttentionWeights,
    attention_weights,
    block_sparse_attention,
    decode,
    dilated_attention,
    merge,
    varlen_attention,
)

# Names that are loaded when they are first used: the module where each lives.
_LAZY: dict[str, str] = {
    # The guides' names (docs/guide-names.md).
    **dict.fromkeys(
        (
            "BlockSparseRingDilatedAttention",
            "BlockSparseRingDilatedAttentionV2",
            "BlockSparseRingMultiheadDilatedAttention",
            "BlockSparseRingMultiheadDilatedAttentionV2",
            "PatternConfig",
            "PatternOptimizer",
            "PatternQualityAnalyzer",
            "PatternVisualizer",
            "SparsePatternConfig",
            "SparsePatternGenerator",
            "create_block_sparse_attention",
            "create_block_sparse_multihead_attention",
            "create_dilated_attention",
            "create_multihead_block_sparse",
            "estimate_memory_savings",
            "get_block_sparse_preset",
            "pattern_statistics",
        ),
        ".compat",
    ),
    "BlockSparseAttention": ".modules",
    "KVCache": ".kv_cache",
    "MultiheadAttention": ".modules",
    "PerformanceMonitor": ".monitoring",
}

_LAZY_MODULES = ("analysis", "integrations", "interop")

if TYPE_CHECKING:  # the same for type checkers, which do not look into a dict
    from . import analysis as analysis
    from . import integrations as integrations
    from . import interop as interop
    from .compat import BlockSparseRingDilatedAttention as BlockSparseRingDilatedAttention
    from .compat import BlockSparseRingDilatedAttentionV2 as BlockSparseRingDilatedAttentionV2
    from .compat import BlockSparseRingMultiheadDilatedAttention as BlockSparseRingMultiheadDilatedAttention
    from .compat import BlockSparseRingMultiheadDilatedAttentionV2 as BlockSparseRingMultiheadDilatedAttentionV2
    from .compat import PatternConfig as PatternConfig
    from .compat import PatternOptimizer as PatternOptimizer
    from .compat import PatternQualityAnalyzer as PatternQualityAnalyzer
    from .compat import PatternVisualizer as PatternVisualizer
    from .compat import SparsePatternConfig as SparsePatternConfig
    from .compat import SparsePatternGenerator as SparsePatternGenerator
    from .compat import create_block_sparse_attention as create_block_sparse_attention
    from .compat import create_block_sparse_multihead_attention as create_block_sparse_multihead_attention
    from .compat import create_dilated_attention as create_dilated_attention
    from .compat import create_multihead_block_sparse as create_multihead_block_sparse
    from .compat import estimate_memory_savings as estimate_memory_savings
    from .compat import get_block_sparse_preset as get_block_sparse_preset
    from .compat import pattern_statistics as pattern_statistics
    from .kv_cache import KVCache as KVCache
    from .modules import BlockSparseAttention as BlockSparseAttention
    from .modules import MultiheadAttention as MultiheadAttention
    from .monitoring import PerformanceMonitor as PerformanceMonitor

__all__ = [
    "AttentionWeights",
    "BlockPattern",
    "PatternStatistics",
    "attention_weights",
    "block_sparse_attention",
    "decode",
    "dilated_attention",
    "merge",
    "patterns",
    "varlen_attention",
    *_LAZY,
    *_LAZY_MODULES,
]


if not TYPE_CHECKING:  # else every name would do

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name], __name__), name)
            globals()[name] = value
            return value
        if name in _LAZY_MODULES:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
