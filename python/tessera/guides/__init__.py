"""The names of the guides (docs/guide-names.md), the only place for them: thin faces of patterns, functions, modules.

What the guides promise and their system did not do is done here, or refused with an error: one softmax over all kept
keys, ``sparsity_ratio`` as the KEPT share, segments that count, weights in block form, figures that are measured.
"""

from __future__ import annotations

from ..pattern import PatternConfig
from .attention import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingDilatedAttentionV2,
    BlockSparseRingMultiheadDilatedAttention,
    BlockSparseRingMultiheadDilatedAttentionV2,
)
from .factories import (
    create_block_sparse_attention,
    create_block_sparse_multihead_attention,
    create_dilated_attention,
    create_multihead_block_sparse,
    get_block_sparse_preset,
)
from .figures import (
    PatternOptimizer,
    PatternQualityAnalyzer,
    PatternVisualizer,
    estimate_memory_savings,
    pattern_statistics,
)
from .generator import SparsePatternGenerator

SparsePatternConfig = PatternConfig

__all__ = [
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
]
