"""Attention as functions, and over a cache of keys and values that grows."""

from __future__ import annotations

from .functional import (
    AttentionWeights,
    attention_weights,
    block_sparse_attention,
    decode,
    dilated_attention,
    merge,
    varlen_attention,
)
from .kv_cache import KVCache

__all__ = [
    "AttentionWeights",
    "KVCache",
    "attention_weights",
    "block_sparse_attention",
    "decode",
    "dilated_attention",
    "merge",
    "varlen_attention",
]
