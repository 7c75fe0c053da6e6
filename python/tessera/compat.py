"""The names of the guides (docs/guide-names.md), the only place for them: thin faces of patterns, functions, modules.

What the guides promise and their system did not do is done here, or refused with an error: one softmax over all kept
keys, ``sparsity_ratio`` as the KEPT share, segments that count, weights in block form, figures that are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _dilated, analysis, functional
from ._generator import PatternGenerator as SparsePatternGenerator
from ._generator import as_pattern
from ._monitored import judged_quality, measurable
from ._pattern import BlockPattern, check_bool, check_int, check_tensor
from ._source import pattern_for
from .config import PatternConfig, SparsePatternConfig, check_density, check_integers, reject
from .modules import MultiheadAttention
from .monitoring import CallFacts, PerformanceMonitor
from .patterns import Request

__all__ = [
    "PatternOptimizer",
    "PatternQualityAnalyzer",
    "PatternVisualizer",
    "pattern_statistics",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingDilatedAttentionV2",
    "BlockSparseRingMultiheadDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttentionV2",
    "PatternConfig",
    "SparsePatternConfig",
    "SparsePatternGenerator",
    "create_block_sparse_attention",
    "create_block_sparse_multihead_attention",
    "create_dilated_attention",
    "create_multihead_block_sparse",
    "estimate_memory_savings",
    "get_block_sparse_preset",
]


def _check_absent(ring_size: int, use_adaptive_sparsity: bool) -> None:
    if ring_size != 1:
        reject("ring_size", ring_size, "1 (rings of processes come with a later version)")
    if use_adaptive_sparsity:
        reject("use_adaptive_sparsity", use_adaptive_sparsity, "False (learned patterns come with a later version)")


# Options of a call of BlockSparseRingDilatedAttention, and those that dilated_attention takes as well.
_SEGMENTED = ("scale", "attn_bias", "key_lengths", "window", "softcap", "alibi_slopes")
_WHOLE = (*_SEGMENTED, "block_bias", "sinks", "q_offset", "k_offset")

# Options of a pattern as dilated_attention calls them.
_INNER = {"window": "pattern_window", "dilation_rates": "pattern_rates", "seed": "pattern_seed"}


def block_form(weights: Sequence[Any]) -> dict[str, Any]:
    """AttentionWeights as the guides' dict; block_size is one int where blocks are square."""
    indices, values, size, shape = weights
    return {
        "block_indices": indices,
        "block_values": values,
        "block_size": size[0] if size[0] == size[1] else size,
        "shape": shape,
    }


# ---- Attention -----------------------------------------------------------------------------------------------------


class _Configured(nn.Module):
    """What the guides' modules share: a configuration, a pattern generator, a monitor, and the reports on them."""

    pattern_generator: SparsePatternGenerator
    performance_monitor: PerformanceMonitor
    segment_lengths: tuple[int, ...]  # empty: no segments
    dilation_rates: tuple[int, ...]

    def _configure(
        self,
        segment_lengths: Sequence[int] | None,
        dilation_rates: Sequence[int] | None,
        sparse_config: Any,
        ring_size: int,
        use_adaptive_sparsity: bool,
        enable_memory_pool: bool,
        fields: dict[str, Any],
    ) -> None:
        _check_absent(ring_size, use_adaptive_sparsity)
        if (segment_lengths is None) != (dilation_rates is None):
            reject("segment_lengths, dilation_rates", (segment_lengths, dilation_rates), "both or neither")
        widths = () if segment_lengths is None else check_integers("segment_lengths", segment_lengths, 1)
        rates = () if dilation_rates is None else check_integers("dilation_rates", dilation_rates, 1)
        if len(widths) != len(rates):
            reject("dilation_rates", rates, f"one for each of the {len(widths)} segment_lengths")
        self.segment_lengths, self.dilation_rates = widths, rates
        self.ring_size = ring_size
        # Scratch is per thread and kept by the core: there is nothing for a pool to hold.
        self.enable_memory_pool = bool(enable_memory_pool)
        self.pattern_generator = SparsePatternGenerator(sparse_config, **fields)
        if self.segment_lengths:
            self._square_block()
        self.performance_monitor = PerformanceMonitor()
        self._densities: dict[Any, float] = {}
        self._last: tuple[int, int, int, bool] | None = None  # heads, seqlen_q, seqlen_k, causal of the last call

    @property
    def sparse_config(self) -> PatternConfig:
        """The configuration in force. Assigning to its fields counts from the next call on."""
        return self.pattern_generator.config

    def set_sparsity_ratio(self, sparsity_ratio: float) -> float:
        """Keeps this share of the block pairs from the next call on, held to the configuration's min_sparsity and
        max_sparsity; an explicit window or stride no longer decides. The configuration is replaced by a changed
        copy (other modules may share it). Returns the share in force. ValueError outside (0, 1]."""
        ratio = self.sparse_config.bounded(check_density(sparsity_ratio, "sparsity_ratio"))
        self.pattern_generator.config = self.sparse_config.with_density(ratio)
        return ratio

    def _square_block(self) -> int:
        block = self.sparse_config.block_size
        if isinstance(block, tuple):
            reject("block_size", block, "one int where there are segment_lengths")
        return block

    def _is_causal(self, causal: bool) -> bool:
        """Of a call that says so, or of a pattern that is by name."""
        return causal or self.sparse_config.pattern_type == "causal"

    def _inner(self, causal: bool) -> _dilated.Inner:
        return lambda n: self.pattern_generator.config.pattern(n, n, causal=causal)

    def _dilation(self) -> _dilated.Dilation:
        kind, _, options = self.sparse_config.spec()
        inner = {_INNER.get(name, name): value for name, value in options.items()}
        inner.update(pattern_kind=kind, block=self._square_block())
        return _dilated.Dilation(self.segment_lengths, self.dilation_rates, inner)

    def _share(self, seqlen: int, heads: int, causal: bool) -> tuple[float, int]:
        return _dilated.share(seqlen, heads, self._square_block(), causal, self._dilation())

    def _is_segmented(self, seqlen_q: int, seqlen_k: int) -> bool:
        return bool(self.segment_lengths) and self.pattern_generator.pattern_cache.own(seqlen_q, seqlen_k) is None

    def density(self, seqlen_q: int, seqlen_k: int | None = None, num_heads: int = 1, causal: bool = False) -> float:
        """Kept share as achieved at these lengths, in [0, 1]: of the admissible block pairs, or with segments of the
        admissible token pairs (one that several segments keep counts once)."""
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        causal = self._is_causal(causal)
        if self._is_segmented(seqlen_q, seqlen_k):
            # Counted once: calls of the same lengths ask again and again.
            key = num_heads, self.sparse_config.definition(Request(seqlen_q, seqlen_q, causal))
            if key not in self._densities:
                if len(self._densities) >= 128:
                    self._densities.clear()
                self._densities[key] = self._share(seqlen_q, num_heads, causal)[0]
            return self._densities[key]
        pattern = self.pattern_generator.pattern_cache.own(seqlen_q, seqlen_k)
        if pattern is None:  # made apart: asking changes no cache
            pattern = self.sparse_config.pattern(seqlen_q, seqlen_k, causal=causal, heads=num_heads)
        return pattern.statistics(causal=causal or None).density

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        return_weights: bool = False,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
        """q [B, Sq, H, D], k, v [B, Sk, Hkv, D] -> out [B, Sq, H, Dv], lse [B, H, Sq], and the weights in block form if
        asked. Monitored."""
        causal = self._is_causal(causal)
        self._last = q.shape[2], q.shape[1], k.shape[1], causal
        lse: list[Tensor] = []

        def call() -> Tensor:
            out, found = self._compute(q, k, v, causal, dropout_p, options)
            lse.append(found)
            return out

        if self.performance_monitor.enabled and measurable(q, k, v, *options.values()):
            out = self.performance_monitor.run(call, q, k, v, lambda: self._facts(q, k, v, causal, options))
        else:
            out = call()
        return out, lse[0], self._weights(q, k, lse[0], causal, options) if return_weights else None

    def _compute(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout_p: float, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if not self._is_segmented(q.shape[1], k.shape[1]):
            pattern = pattern_for(self.pattern_generator, q.shape[1], k.shape[1], causal, q.shape[2])
            return functional.block_sparse_attention(
                q, k, v, pattern, causal=causal or None, dropout_p=dropout_p, return_lse=True, **options
            )
        dilation = self._dilation()
        inner = dict(dilation.inner)
        return functional.dilated_attention(
            q,
            k,
            v,
            segment_lengths=dilation.segment_lengths,
            dilation_rates=dilation.dilation_rates,
            causal=causal,
            pattern=inner.pop("pattern_kind"),
            dropout_p=dropout_p,
            return_lse=True,
            **inner,
            **options,
        )

    def _weights(self, q: Tensor, k: Tensor, lse: Tensor, causal: bool, options: dict[str, Any]) -> dict[str, Any]:
        if not self._is_segmented(q.shape[1], k.shape[1]):
            pattern = self.pattern_generator.generate_pattern(q.shape[1], q.shape[2], k.shape[1], causal)
            with torch.no_grad():  # options may want a gradient, weights have none
                found = functional.attention_weights(q, k, pattern, causal=causal or None, **options)
            return block_form(found)
        refused = sorted(name for name, value in options.items() if name != "scale" and value is not None)
        if refused:
            reject("return_attention_weights", f"True with {', '.join(refused)}", "scale and causality beside segments")
        block = self._square_block()
        indices, values = _dilated.weights(
            q.detach(),
            k.detach(),
            lse.detach(),
            self.segment_lengths,
            self.dilation_rates,
            causal,
            options.get("scale"),
            block,
            self._inner(causal),
        )
        return block_form((indices, values, (block, block), (q.shape[0], q.shape[2], q.shape[1], k.shape[1])))

    def _facts(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, options: dict[str, Any]) -> CallFacts:
        rows = self.performance_monitor.sample_rows
        if self._is_segmented(q.shape[1], k.shape[1]):
            # Masks and biases beside causality are not part of the truth that segments are judged against.
            plain = all(value is None for name, value in options.items() if name != "scale")

            def judge(out: Tensor) -> tuple[float, float]:
                return _dilated.sampled_quality(
                    q.detach(), k.detach(), v.detach(), out, self._dilation(), causal, options.get("scale"), rows
                )

            return CallFacts(self.density(q.shape[1], k.shape[1], q.shape[2], causal), causal, judge if plain else None)
        pattern = self.pattern_generator.generate_pattern(q.shape[1], q.shape[2], k.shape[1], causal)

        # block_bias is of the pattern's blocks, not of the true attention that they are judged against.
        truth = {name: value for name, value in options.items() if name != "block_bias"}

        def judge_pattern(out: Tensor) -> tuple[float, float] | None:
            return judged_quality(q, k, v, pattern, causal=causal or None, sample_rows=rows, **truth)

        judged = options.get("block_bias") is None
        return CallFacts(
            pattern.density if not causal else pattern.statistics(causal=True).density,
            causal or pattern.causal,
            judge_pattern if judged else None,
        )

    def get_performance_stats(self) -> dict[str, float]:
        """What performance_monitor measured (PerformanceMonitor.stats). Asking turns it on: until the next call
        measured figures are NaN, and density, sparsity and theoretical speedup those of the last call."""
        monitor = self.performance_monitor
        stats = monitor.stats()
        monitor.enable()
        if stats["forwards"] == 0 and self._last is not None:
            heads, seqlen_q, seqlen_k, causal = self._last
            density = self.density(seqlen_q, seqlen_k, heads, causal)
            stats.update(
                density=density, avg_sparsity=1 - density, theoretical_speedup=1 / density if density else float("nan")
            )
        return stats

    def estimate_memory_savings(
        self,
        seq_len: int,
        num_heads: int = 1,
        batch_size: int = 1,
        causal: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, float]:
        """What attention weights of this length take, in MiB: dense_mb as [B, H, S, S], sparse_mb as the blocks that
        return_attention_weights gives (whole ones; a rate of r spreads a block over up to r x r), savings = 1 -
        sparse_mb / dense_mb (below 0 where the blocks take more), and the density. Computing the output needs neither.
        ValueError or TypeError naming the argument."""
        _check_sizes(seq_len, num_heads, batch_size, dtype)
        share = self.density(seq_len, None, num_heads, causal)
        if self._is_segmented(seq_len, seq_len):
            cells = self._share(seq_len, num_heads, causal)[1] * self._square_block() ** 2
        else:
            pattern = self.pattern_generator.pattern_cache.own(seq_len, seq_len)
            if pattern is None:
                pattern = self.sparse_config.pattern(seq_len, causal=causal, heads=num_heads)
            cells = _cells(pattern, num_heads)
        return _savings(seq_len, num_heads, batch_size, cells, share, dtype)

    def get_memory_info(self) -> dict[str, Any]:
        """pattern_cache_size (patterns held), pattern_cache_bytes, _hits, _misses, _evictions; block_size; density,
        memory_reduction (dropped share of the scores) and theoretical_speedup (1 / density) at the lengths of the last
        call, before it those that are asked for; enable_memory_pool as given."""
        cache = self.pattern_generator.pattern_cache
        share = self.sparse_config.density
        if self._last is not None:
            heads, seqlen_q, seqlen_k, causal = self._last
            share = self.density(seqlen_q, seqlen_k, heads, causal)
        return {
            "pattern_cache_size": len(cache),
            "pattern_cache_bytes": cache.nbytes,
            "pattern_cache_hits": cache.hits,
            "pattern_cache_misses": cache.misses,
            "pattern_cache_evictions": cache.evictions,
            "block_size": self.sparse_config.block_size,
            "density": share,
            "memory_reduction": 1.0 - share,
            "theoretical_speedup": 1.0 / share if share else float("inf"),
            "enable_memory_pool": self.enable_memory_pool,
        }

    def extra_repr(self) -> str:
        parts = [f"sparse_config={self.sparse_config}"]
        if self.segment_lengths:
            parts.append(f"segment_lengths={list(self.segment_lengths)}, dilation_rates={list(self.dilation_rates)}")
        return ", ".join(parts)


def _check_sizes(seq_len: Any, num_heads: Any, batch_size: Any, dtype: Any) -> None:
    for name, value in (("seq_len", seq_len), ("num_heads", num_heads), ("batch_size", batch_size)):
        check_int(name, value, 1)
    if not isinstance(dtype, torch.dtype):
        reject("dtype", dtype, "a torch.dtype", TypeError)


def _cells(pattern: BlockPattern, heads: int) -> int:
    """Elements of the kept blocks of these heads, of one batch element."""
    blocks = pattern.indices.numel() * heads // (pattern.heads * pattern.batches)
    return blocks * pattern.block_q * pattern.block_k


def _savings(
    seq_len: int, num_heads: int, batch_size: int, cells: int, share: float, dtype: torch.dtype
) -> dict[str, float]:
    unit = batch_size * dtype.itemsize / 2**20
    dense, sparse = num_heads * seq_len * seq_len * unit, cells * unit
    return {"dense_mb": dense, "sparse_mb": sparse, "density": share, "savings": 1.0 - sparse / dense}


def estimate_memory_savings(
    seq_len: int,
    sparse_config: Any = None,
    num_heads: int = 1,
    batch_size: int = 1,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """As the method of that name, for a configuration alone."""
    _check_sizes(seq_len, num_heads, batch_size, dtype)
    pattern = PatternConfig.of(sparse_config).pattern(seq_len, causal=causal, heads=num_heads)
    share = pattern.statistics(causal=causal).density
    return _savings(seq_len, num_heads, batch_size, _cells(pattern, num_heads), share, dtype)


class BlockSparseRingDilatedAttention(_Configured):
    """Attention over a pattern, inside LongNet segments where they are given. No parameters.

    Args:
        segment_lengths, dilation_rates: (w, r) pairs: segments of w tokens, of which every r-th attends; the pattern is
            made inside each dilated segment. Neither: one pattern over the whole sequence.
        sparse_config: a SparsePatternConfig, a dict of its fields, or the name of a pattern.
        sparsity_ratio (the KEPT share), and other fields of the config (pattern_type, block_size, ...): override it.
        dropout: probability with which a weight is dropped in training.
        ring_size: 1. use_adaptive_sparsity: False. Later versions take others.
        enable_memory_pool: taken, without effect: there is nothing to pool, as no buffer grows with the sequence.
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
    """The same under its later name."""


class BlockSparseRingMultiheadDilatedAttention(_Configured, MultiheadAttention):
    """nn.MultiheadAttention over a pattern: its arguments, parameters and state_dict, with the guides' defaults.

    Differs from tessera.MultiheadAttention: batch_first is True; ``attention(x)`` is self-attention; weights are
    returned only if asked for, and then in block form, of every head.

    Args:
        embed_dim .. dtype: as torch.
        use_layer_norm: normalises the joined heads before the output projection (as LongNet does); has parameters.
        Others as BlockSparseRingDilatedAttention.
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


# ---- Factories -----------------------------------------------------------------------------------------------------

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
    multihead where embed_dim is given, else base. arguments: those of the class."""
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
    """BlockSparseRingMultiheadDilatedAttention(embed_dim, num_heads, **arguments)."""
    return BlockSparseRingMultiheadDilatedAttention(embed_dim, num_heads, **arguments)


create_block_sparse_multihead_attention = create_multihead_block_sparse


def get_block_sparse_preset(preset: str, **arguments: Any) -> nn.Module:
    """An attention module made by create_block_sparse_attention with the preset's arguments; ``arguments`` override."""
    if preset not in _PRESETS:
        reject("preset", preset, ", ".join(_PRESETS))
    return create_block_sparse_attention(**{**_PRESETS[preset], **arguments})


def create_dilated_attention(attention_type: str, **arguments: Any) -> nn.Module:
    """attention_type block_sparse_ring: BlockSparseRingDilatedAttention."""
    if attention_type != "block_sparse_ring":
        reject("attention_type", attention_type, "block_sparse_ring")
    return BlockSparseRingDilatedAttention(**arguments)


# ---- Analysis ------------------------------------------------------------------------------------------------------


def pattern_statistics(pattern: Any, block_size: int = 128, causal: bool = False) -> dict[str, float]:
    """Figures of a BlockPattern, or of a bool tensor of blocks: density, sparsity, avg/min/max/std_row_density and
    _column_density, diagonal_density, empty_rows, kept_blocks, load_imbalance."""
    found = as_pattern(pattern, block_size).statistics(causal=causal)
    stats: dict[str, float] = {
        name: getattr(found, name)
        for name in (
            "density",
            "sparsity",
            "diagonal_density",
            "empty_rows",
            "kept_blocks",
            "partial_blocks",
            "admissible_blocks",
            "load_imbalance",
        )
    }
    for name in ("row_density", "column_density"):
        spread = getattr(found, name)
        stats.update(
            {
                f"avg_{name}": spread.mean,
                f"min_{name}": spread.min,
                f"max_{name}": spread.max,
                f"std_{name}": spread.std,
            }
        )
    return stats


class PatternVisualizer:
    """Draws patterns."""

    def visualize_pattern(
        self,
        pattern: Any,
        title: str = "",
        save_path: str | None = None,
        head: int = 0,
        block_size: int = 128,
        causal: bool = False,
    ) -> str:
        """Writes a PNG to save_path if given; returns the pattern as text."""
        pattern = as_pattern(pattern, block_size)
        if not isinstance(title, str):
            reject("title", title, "a str", TypeError)
        if save_path is not None:
            analysis.write_png(analysis.draw_pattern(pattern, title, head=head, causal=causal), save_path)
        return pattern.ascii(head)


class PatternMetrics(NamedTuple):
    """What PatternQualityAnalyzer found."""

    coverage_ratio: float  # share of the true attention mass that the kept blocks hold
    locality_score: float  # the share that as many blocks nearest to the diagonal hold
    efficiency_score: float  # coverage / density: 1 is what random blocks would hold
    approximation_error: float  # |sparse - dense| / |dense|: of the outputs given q, k, v, else of the weights
    density: float
    oracle_coverage: float  # the share that the best choice of as many blocks holds


class PatternQualityAnalyzer:
    """Judges a pattern against the true attention."""

    def analyze_pattern_quality(
        self,
        sparse_pattern: Any,
        reference_attention: Tensor | None = None,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        block_size: int = 128,
        causal: bool = False,
        **options: Any,
    ) -> PatternMetrics:
        """sparse_pattern: a BlockPattern, or a bool tensor of blocks. reference_attention: dense weights [B, H, Sq, Sk]
        or [H, Sq, Sk] that the caller holds already; or query, key, value [B, S, H, D], for which nothing of size
        Sq x Sk is made. options: of the true attention of query and key, as tessera.analysis.quality takes them (scale,
        window, key_lengths, softcap, attn_bias, alibi_slopes, sinks, ...); weights have them in them."""
        if (reference_attention is None) == (query is None or key is None):
            reject("reference_attention", None if reference_attention is None else "both", "weights, or query and key")
        if reference_attention is None:
            pattern = as_pattern(sparse_pattern, block_size, query.shape[1], key.shape[1])  # type: ignore[union-attr]
            found = analysis.quality(query, key, value, pattern, causal=causal, **options)  # type: ignore[arg-type]
            error = found.output_error
        else:
            if options:
                reject(min(options), "it beside reference_attention", "options beside query and key")
            weights = check_tensor("reference_attention", reference_attention).detach()
            weights = weights[None] if weights.dim() == 3 else weights
            if weights.dim() != 4:
                reject("reference_attention", tuple(reference_attention.shape), "[B, H, Sq, Sk] or [H, Sq, Sk]")
            batch, heads, seqlen_q, seqlen_k = weights.shape
            pattern = as_pattern(sparse_pattern, block_size, seqlen_q, seqlen_k)
            # Scores of zero plus the logarithm of the weights: their softmax is the weights.
            zero_q = torch.zeros(batch, seqlen_q, heads, 1)
            zero_k = torch.zeros(batch, seqlen_k, heads, 1)
            found = analysis.quality(zero_q, zero_k, None, pattern, attn_bias=weights.float().log(), causal=causal)
            error = self._error_of_weights(weights, pattern, causal)
        return PatternMetrics(
            found.coverage, found.locality, found.efficiency, error, found.density, found.oracle_coverage
        )

    @staticmethod
    def _error_of_weights(weights: Tensor, pattern: BlockPattern, causal: bool) -> float:
        """|kept and renormalised - weights| / |weights|, head by head."""
        batch, heads, seqlen_q, seqlen_k = weights.shape
        kept = pattern.to_token_mask()  # as large as the weights already are
        error = norm = 0.0

        def normalised(w: Tensor) -> Tensor:
            return w / w.sum(-1, keepdim=True).clamp(min=1e-300)

        for b in range(batch):
            for h in range(heads):
                true = weights[b, h].double()
                if causal:
                    true = normalised(true.tril(seqlen_k - seqlen_q))
                sparse = normalised(true * kept[b % pattern.batches, h % pattern.heads])
                error += float((sparse - true).square().sum())
                norm += float(true.square().sum())
        return (error / norm) ** 0.5 if norm else float("nan")


class PatternOptimizer:
    """Looks for the cheapest pattern that holds a share of the attention mass."""

    def __init__(self, target_coverage: float = 0.9, block_size: int = 128) -> None:
        self.target_coverage = target_coverage
        self.block_size = block_size

    def optimize(
        self, query: Tensor, key: Tensor, causal: bool = False
    ) -> tuple[PatternConfig, analysis.OptimizeResult]:
        """query, key [B, S, H, D] -> the configuration of the cheapest kind that reaches target_coverage (if none does,
        of the one with most), and all that was found."""
        mass = analysis.attention_mass(query, key, block=self.block_size, causal=causal)
        found = mass.optimize(self.target_coverage, _CONFIGURABLE)
        names = {"name": "pattern_type", "window": "local_window_size"}
        fields = {names.get(name, name): item for name, item in found.spec.items() if name not in ("causal", "heads")}
        return PatternConfig(block_size=self.block_size, **fields), found


# Kinds that a PatternConfig can say.
_CONFIGURABLE = ("local_window", "dilated_sparse", "global_local", "strided", "random", "bigbird")
