"""BlockSparseAttention: the options of a call, kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..attention import attention_weights, block_sparse_attention
from ..pattern import PatternConfig, PatternSource, pattern_for
from ..pattern.source import pattern_source
from ._monitored import Monitored, measured_attention
from ._tracing import may_look


class BlockSparseAttention(Monitored, nn.Module):
    """:func:`tessera.block_sparse_attention` with its options kept: no parameters, no projections.
    ``performance_monitor`` and ``get_performance_stats()`` as :class:`MultiheadAttention`.

    Args:
        pattern: as in :class:`MultiheadAttention`.
        density, block: of a named pattern.
        causal: True, or None: as the pattern (a named one is made causal where causal is True).
        scale, window, softcap, layout: as the function.
        dropout: on the normalised weights, in training.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> attention = tessera.BlockSparseAttention("dilated_sparse", density=0.2, block=64, causal=True)
        >>> attention(q, k, v).shape
        torch.Size([1, 512, 4, 32])
    """

    def __init__(
        self,
        pattern: PatternSource = None,
        *,
        density: float | None = None,
        block: int | tuple[int, int] | None = None,
        causal: bool | None = None,
        scale: float | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        dropout: float = 0.0,
        softcap: float = 0.0,
        layout: str = "bshd",
    ) -> None:
        super().__init__()
        if layout not in ("bshd", "bhsd"):
            raise ValueError(f'layout: got {layout!r}; allowed: "bshd" or "bhsd"')
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout!r}; allowed: 0 <= dropout < 1")
        if density is not None or block is not None:
            if pattern is not None and not isinstance(pattern, (str, Mapping, PatternConfig)):
                given = "density" if density is not None else "block"
                raise TypeError(f"{given}: got it beside {type(pattern).__name__}; allowed: with the name of a pattern")
            pattern = PatternConfig.of(pattern, density=density, block_size=block)
        self.pattern = pattern
        self.causal, self.scale, self.window, self.dropout = causal, scale, window, dropout
        self.softcap, self.layout = softcap, layout

    @property
    def pattern(self) -> Any:
        """None, a BlockPattern, a callable or a PatternConfig."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: PatternSource) -> None:
        self._pattern = pattern_source(pattern)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_bias: Tensor | None = None,
        block_bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
        need_weights: bool = False,
    ) -> Any:
        """q ``[B, Sq, H, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` (or heads before tokens, see layout).

        Returns:
            out ``[B, Sq, H, Dv]``; with return_lse (out, lse); with need_weights the
            :class:`~tessera.AttentionWeights` of the kept blocks at the end.
        """
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: got {type(t).__name__}; allowed: torch.Tensor")
            if t.dim() != 4:
                raise ValueError(f"{name}: got {t.dim()} dimensions; allowed: 4, {self.layout}")
        s, h = (1, 2) if self.layout == "bshd" else (2, 1)
        pattern = pattern_for(self._pattern, q.shape[s], k.shape[s], bool(self.causal), q.shape[h])
        options: dict[str, Any] = {
            "causal": self.causal or None, "scale": self.scale, "window": self.window, "softcap": self.softcap,
            "layout": self.layout, "attn_bias": attn_bias, "block_bias": block_bias, "key_lengths": key_lengths,
            "alibi_slopes": alibi_slopes, "sinks": sinks,
        }  # fmt: skip
        dropout_p = self.dropout if self.training else 0.0
        attention: Any = block_sparse_attention
        if (monitor := self._measuring()) is not None and may_look(q):
            attention = partial(measured_attention, monitor)
        result = attention(q, k, v, pattern, dropout_p=dropout_p, return_lse=return_lse, **options)
        if not need_weights:
            return result
        weights = attention_weights(q.detach(), k.detach(), pattern, **options)
        return (*result, weights) if return_lse else (result, weights)

    def extra_repr(self) -> str:
        kind = "dense" if self._pattern is None else repr(self._pattern)
        return f"pattern={kind}, causal={self.causal}, layout={self.layout!r}"
