"""Tessera: block-sparse attention for long sequences, on PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from . import patterns
from .attention import (
    AttentionWeights,
    KVCache,
    attention_weights,
    block_sparse_attention,
    decode,
    dilated_attention,
    merge,
    varlen_attention,
)
from .pattern import BlockPattern, PatternConfig, PatternStatistics

# Loaded when they are first used.
_MODULES = ("analysis", "guides", "integrations", "interop", "nn")
_OF_NN = ("BlockSparseAttention", "MultiheadAttention", "PerformanceMonitor")

__all__ = [
    "AttentionWeights",
    "BlockPattern",
    "BlockSparseAttention",
    "KVCache",
    "MultiheadAttention",
    "PatternConfig",
    "PatternStatistics",
    "PerformanceMonitor",
    "__version__",
    "analysis",
    "attention_weights",
    "block_sparse_attention",
    "decode",
    "dilated_attention",
    "guides",
    "integrations",
    "interop",
    "merge",
    "nn",
    "patterns",
    "varlen_attention",
]

__version__: str = torch.ops.tessera.version()

if TYPE_CHECKING:  # the same for type checkers; the guides' names are only these
    from . import analysis, guides, integrations, interop, nn
    from .guides import *  # noqa: F403
    from .nn import BlockSparseAttention, MultiheadAttention, PerformanceMonitor
else:  # to a type checker every name would do

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f".{name}", __name__)
        if name in _OF_NN:
            value = getattr(importlib.import_module(".nn", __name__), name)
        elif not name.startswith("_") and name in (guides := importlib.import_module(".guides", __name__)).__all__:
            value = getattr(guides, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
