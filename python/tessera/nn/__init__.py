"""Attention as modules, and what they measure of themselves."""

from __future__ import annotations

from .block_sparse import BlockSparseAttention
from .monitoring import PerformanceMonitor
from .multihead import MultiheadAttention

__all__ = ["BlockSparseAttention", "MultiheadAttention", "PerformanceMonitor"]
