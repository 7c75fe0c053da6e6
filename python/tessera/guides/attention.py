"""The attention modules of the guides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import functional
from ..nn import MultiheadAttention
from ..pattern.checks import check_bool, reject
from ._configured import Configured

# Options of a call of BlockSparseRingDilatedAttention, and those that dilated_attention takes as well.
_SEGMENTED = ("scale", "attn_bias", "key_lengths", "window", "softcap", "alibi_slopes")
_WHOLE = (*_SEGMENTED, "block_bias", "sinks", "q_offset", "k_offset")


class BlockSparseRingDilatedAttention(Configured):
    """Attention over a pattern, inside LongNet segments where they are given. No parameters.

    Args:
        segment_lengths, dilation_rates: (w, r) pairs: segments of w tokens, of which every r-th attends; the pattern is
            made inside each dilated segment. Neither: one pattern over the whole sequence.
        sparse_config: a SparsePatternConfig, a dict of its fields, or the name of a pattern.
        sparsity_ratio (the KEPT share), and other fields of the config (pattern_type, block_size, ...): override it.
        dropout: probability with which a weight is dropped in training.
        ring_size: 1. use_adaptive_sparsity: False. Later versions take others.
        enable_memory_pool: taken, without effect: there is nothing to pool, as no buffer grows with the sequence.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> tessera.BlockSparseRingDilatedAttention(sparsity_ratio=0.25, block_size=64)(q, k, v).shape
        torch.Size([1, 512, 2, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: Any = None,
        *,
        sparsity_ratio: float | None = None,
        dropout: float = 0.0,
        ring_size: int = 1,
        use_adaptive_sparsity: bool = False,
        enable_memory_pool: bool = False,
        **fields: Any,
    ) -> None:
        super().__init__()
        self._configure(
            segment_lengths,
            dilation_rates,
            sparse_config,
            ring_size,
            use_adaptive_sparsity,
            enable_memory_pool,
            {"sparsity_ratio": sparsity_ratio, **fields},
        )
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            reject("dropout", dropout, "a probability in [0, 1)")
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        return_attention_weights: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """query [B, Sq, H, D], key, value [B, Sk, Hkv, D] -> [B, Sq, H, D].

        return_attention_weights: also the weights of the kept blocks, without gradient: a dict of block_indices int64
        [n, 4] (batch, head, block row, block column), block_values [n, block_q, block_k], block_size and shape
        (B, H, Sq, Sk). Rows of all blocks of a head sum to 1. options, as tessera.block_sparse_attention: scale,
        attn_bias, key_lengths, window, softcap, alibi_slopes; without segments also block_bias, sinks, q_offset,
        k_offset. ValueError or TypeError naming the argument, also an option of another name."""
        functional._check_given(query=query, key=key, value=value)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4:
                reject(name, f"{tensor.dim()} dimensions", "4, [B, S, H, D]")
        is_causal = check_bool("is_causal", is_causal)
        asked = check_bool("return_attention_weights", return_attention_weights)
        taken = _SEGMENTED if self._is_segmented(query.shape[1], key.shape[1]) else _WHOLE
        for name, value_given in options.items():
            if name not in taken and not (name in _WHOLE and value_given is None):
                raise TypeError(
                    f"{name}: got an argument of that name; allowed: is_causal, return_attention_weights, "
                    f"{', '.join(taken)}"
                )
        options = {name: item for name, item in options.items() if name in taken and item is not None}
        out, _, weights = self.attend(
            query, key, value, is_causal, asked, self.dropout if self.training else 0.0, **options
        )
        return out if weights is None else (out, weights)


class BlockSparseRingDilatedAttentionV2(BlockSparseRingDilatedAttention):
    """The same under its later name.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> tessera.BlockSparseRingDilatedAttentionV2(sparsity_ratio=0.25, block_size=64)(q, k, v).shape
        torch.Size([1, 512, 2, 16])
    """


class BlockSparseRingMultiheadDilatedAttention(Configured, MultiheadAttention):
    """nn.MultiheadAttention over a pattern: its arguments, parameters and state_dict, with the guides' defaults.

    Differs from tessera.MultiheadAttention: batch_first is True; ``attention(x)`` is self-attention; weights are
    returned only if asked for, and then in block form, of every head.

    Args:
        embed_dim .. dtype: as torch.
        use_layer_norm: normalises the joined heads before the output projection (as LongNet does); has parameters.
        Others as BlockSparseRingDilatedAttention.

    Example:
        >>> x = torch.randn(1, 512, 64)
        >>> attention = tessera.BlockSparseRingMultiheadDilatedAttention(64, 4, sparsity_ratio=0.25)
        >>> attention(x)[0].shape
        torch.Size([1, 512, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        sparse_config: Any = None,
        sparsity_ratio: float | None = None,
        use_layer_norm: bool = False,
        ring_size: int = 1,
        use_adaptive_sparsity: bool = False,
        enable_memory_pool: bool = False,
        **fields: Any,
    ) -> None:
        MultiheadAttention.__init__(
            self,
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._configure(
            segment_lengths,
            dilation_rates,
            sparse_config,
            ring_size,
            use_adaptive_sparsity,
            enable_memory_pool,
            {"sparsity_ratio": sparsity_ratio, **fields},
        )
        self.pattern = self.pattern_generator
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype) if use_layer_norm else None

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **arguments: Any) -> BlockSparseRingMultiheadDilatedAttention:
        """A module that shares the parameters of ``module``. arguments: segment_lengths, sparse_config, sparsity_ratio
        and others of the constructor."""
        if not isinstance(module, nn.MultiheadAttention):
            reject("module", type(module).__name__, "torch.nn.MultiheadAttention", TypeError)
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
            **arguments,
        )
        for name, parameter in module._parameters.items():
            new._parameters[name] = parameter
        new.out_proj = module.out_proj
        if new.norm is not None:  # module has none to share: a new one beside its parameters
            weight = module.out_proj.weight
            new.norm = nn.LayerNorm(new.embed_dim, device=weight.device, dtype=weight.dtype)
        return new.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        return_attention_weights: bool = False,
    ) -> Any:
        """query [B, L, E], key [B, S, kdim] (default: query), value [B, S, vdim] (default: key); without batch_first B
        is second. Masks as nn.MultiheadAttention. Returns (output, weights): weights is None, or with need_weights or
        return_attention_weights the dict of BlockSparseRingDilatedAttention (of every head: nothing is averaged)."""
        key = query if key is None else key
        value = key if value is None else value
        asked = "blocks" if need_weights or return_attention_weights else False
        return super().forward(query, key, value, key_padding_mask, asked, attn_mask, average_attn_weights, is_causal)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return super()._attend(query, key, value, attend=self.attend, norm=self.norm, **options)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, {super().extra_repr()}"


class BlockSparseRingMultiheadDilatedAttentionV2(BlockSparseRingMultiheadDilatedAttention):
    """The same; where nobody speaks of weights it returns the output alone.

    What calls it as an nn.MultiheadAttention must pass need_weights, as torch's own layers do: with need_weights given,
    also as False, the result is torch's (output, weights or None). Without it, ``attention(x)[0]`` is the first batch
    element.

    Example:
        >>> x = torch.randn(1, 512, 64)
        >>> attention = tessera.BlockSparseRingMultiheadDilatedAttentionV2(64, 4, sparsity_ratio=0.25)
        >>> attention(x).shape
        torch.Size([1, 512, 64])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | str | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        return_attention_weights: bool = False,
    ) -> Any:
        """As BlockSparseRingMultiheadDilatedAttention, but the output alone where need_weights is not given (None) and
        return_attention_weights is False."""
        out, weights = super().forward(
            query,
            key,
            value,
            key_padding_mask,
            need_weights or False,
            attn_mask,
            average_attn_weights,
            is_causal,
            return_attention_weights,
        )
        return out if need_weights is None and weights is None else (out, weights)
