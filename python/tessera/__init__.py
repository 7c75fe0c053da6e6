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
    "MultiheadAttention": ".modules",
    "PerformanceMonitor": ".monitoring",
}

_LAZY_MODULES = ("analysis", "integrations", "interop")

if TYPE_CHECKING:  # the same for type checkers, which do not look into a dict
    from . import analysis as analysis, integrations as integrations, interop as interop
    from .compat import (
        BlockSparseRingDilatedAttention as BlockSparseRingDilatedAttention,
        BlockSparseRingDilatedAttentionV2 as BlockSparseRingDilatedAttentionV2,
        BlockSparseRingMultiheadDilatedAttention as BlockSparseRingMultiheadDilatedAttention,
        BlockSparseRingMultiheadDilatedAttentionV2 as BlockSparseRingMultiheadDilatedAttentionV2,
        PatternConfig as PatternConfig,
        PatternOptimizer as PatternOptimizer,
        PatternQualityAnalyzer as PatternQualityAnalyzer,
        PatternVisualizer as PatternVisualizer,
        SparsePatternConfig as SparsePatternConfig,
        SparsePatternGenerator as SparsePatternGenerator,
        create_block_sparse_attention as create_block_sparse_attention,
        create_block_sparse_multihead_attention as create_block_sparse_multihead_attention,
        create_dilated_attention as create_dilated_attention,
        create_multihead_block_sparse as create_multihead_block_sparse,
        estimate_memory_savings as estimate_memory_savings,
        get_block_sparse_preset as get_block_sparse_preset,
        pattern_statistics as pattern_statistics,
    )
    from .modules import BlockSparseAttention as BlockSparseAttention, MultiheadAttention as MultiheadAttention
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
