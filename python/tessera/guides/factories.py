"""Attention modules by the names of variants and presets."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..pattern.checks import reject
from .attention import BlockSparseRingDilatedAttention, BlockSparseRingMultiheadDilatedAttention

_PRESETS: dict[str, dict[str, Any]] = {
    "local": {"sparse_config": {"pattern_type": "local_window", "local_window_size": 256, "block_size": 64}},
    "dilated": {
        "sparse_config": {
            "pattern_type": "dilated_sparse",
            "density": 0.1,
            "dilation_rates": [1, 2, 4, 8],
            "block_size": 64,
        }
    },
    "global_local": {
        "sparse_config": {
            "pattern_type": "global_local",
            "global_tokens": 64,
            "local_window_size": 256,
            "block_size": 64,
        }
    },
    "ultra_sparse": {
        "sparse_config": {"pattern_type": "dilated_sparse", "density": 0.01, "block_size": 128},
        "segment_lengths": [4096, 8192, 16384],
        "dilation_rates": [1, 4, 16],
    },
}


def create_block_sparse_attention(variant: str = "auto", **arguments: Any) -> nn.Module:
    """variant "base": BlockSparseRingDilatedAttention; "multihead": BlockSparseRingMultiheadDilatedAttention; "auto":
    multihead where embed_dim is given, else base. arguments: those of the class.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> attention = tessera.create_block_sparse_attention("base", sparsity_ratio=0.25, block_size=64)
        >>> attention(q, k, v).shape
        torch.Size([1, 512, 2, 16])
    """
    if variant == "auto":
        variant = "multihead" if "embed_dim" in arguments else "base"
    if variant == "base":
        return BlockSparseRingDilatedAttention(**arguments)
    if variant == "multihead":
        return BlockSparseRingMultiheadDilatedAttention(**arguments)
    reject("variant", variant, "auto, base, multihead")


def create_multihead_block_sparse(
    embed_dim: int, num_heads: int, **arguments: Any
) -> BlockSparseRingMultiheadDilatedAttention:
    """BlockSparseRingMultiheadDilatedAttention(embed_dim, num_heads, **arguments).

    Example:
        >>> x = torch.randn(1, 512, 64)
        >>> attention = tessera.create_multihead_block_sparse(64, 4, sparsity_ratio=0.25)
        >>> attention(x)[0].shape
        torch.Size([1, 512, 64])
    """
    return BlockSparseRingMultiheadDilatedAttention(embed_dim, num_heads, **arguments)


create_block_sparse_multihead_attention = create_multihead_block_sparse


def get_block_sparse_preset(preset: str, **arguments: Any) -> nn.Module:
    """An attention module made by create_block_sparse_attention with the preset's arguments; ``arguments`` override.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> tessera.get_block_sparse_preset("local")(q, k, v).shape
        torch.Size([1, 512, 2, 16])
    """
    if preset not in _PRESETS:
        reject("preset", preset, ", ".join(_PRESETS))
    return create_block_sparse_attention(**{**_PRESETS[preset], **arguments})


def create_dilated_attention(attention_type: str, **arguments: Any) -> nn.Module:
    """attention_type block_sparse_ring: BlockSparseRingDilatedAttention.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> attention = tessera.create_dilated_attention("block_sparse_ring", sparsity_ratio=0.25)
        >>> attention(q, k, v).shape
        torch.Size([1, 512, 2, 16])
    """
    if attention_type != "block_sparse_ring":
        reject("attention_type", attention_type, "block_sparse_ring")
    return BlockSparseRingDilatedAttention(**arguments)
