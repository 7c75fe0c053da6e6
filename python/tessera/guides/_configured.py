"""What the guides' modules share: a configuration, a pattern generator, a monitor, and the reports on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import dilated, functional
from ..nn import PerformanceMonitor
from ..nn._monitored import judged_quality
from ..nn._tracing import measurable
from ..nn.monitoring import CallFacts
from ..pattern import PatternConfig, Request, pattern_for
from ..pattern.checks import reject
from ..pattern.config import check_density, check_integers
from .figures import cells_of, check_sizes, savings
from .generator import SparsePatternGenerator


def _check_absent(ring_size: int, use_adaptive_sparsity: bool) -> None:
    if ring_size != 1:
        reject("ring_size", ring_size, "1 (rings of processes come with a later version)")
    if use_adaptive_sparsity:
        reject("use_adaptive_sparsity", use_adaptive_sparsity, "False (learned patterns come with a later version)")


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


class Configured(nn.Module):
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

    def _inner(self, causal: bool) -> dilated.Inner:
        return lambda n: self.pattern_generator.config.pattern(n, n, causal=causal)

    def _dilation(self) -> dilated.Dilation:
        kind, _, options = self.sparse_config.spec()
        inner = {_INNER.get(name, name): value for name, value in options.items()}
        inner.update(pattern_kind=kind, block=self._square_block())
        return dilated.Dilation(self.segment_lengths, self.dilation_rates, inner)

    def _share(self, seqlen: int, heads: int, causal: bool) -> tuple[float, int]:
        return dilated.share(seqlen, heads, self._square_block(), causal, self._dilation())

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
        indices, values = dilated.weights(
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
                return dilated.sampled_quality(
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
        check_sizes(seq_len, num_heads, batch_size, dtype)
        share = self.density(seq_len, None, num_heads, causal)
        if self._is_segmented(seq_len, seq_len):
            cells = self._share(seq_len, num_heads, causal)[1] * self._square_block() ** 2
        else:
            pattern = self.pattern_generator.pattern_cache.own(seq_len, seq_len)
            if pattern is None:
                pattern = self.sparse_config.pattern(seq_len, causal=causal, heads=num_heads)
            cells = cells_of(pattern, num_heads)
        return savings(seq_len, num_heads, batch_size, cells, share, dtype)

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
