"""Patterns judged, drawn and searched, and what weights take in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import analysis
from ..pattern import BlockPattern, PatternConfig
from ..pattern.checks import check_int, check_tensor, reject
from .generator import as_pattern


def pattern_statistics(pattern: Any, block_size: int = 128, causal: bool | None = None) -> dict[str, float]:
    """Figures of a BlockPattern, or of a bool tensor of blocks: density, sparsity, avg/min/max/std_row_density and
    _column_density, diagonal_density, empty_rows, kept_blocks, load_imbalance.

    Example:
        >>> figures = tessera.pattern_statistics(tessera.patterns.causal(512, block=64), causal=True)
        >>> figures["density"], figures["empty_rows"]
        (1.0, 0)
    """
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
    """Draws patterns.

    Example:
        >>> print(tessera.PatternVisualizer().visualize_pattern(tessera.patterns.causal(256, block=64)))
        #...
        ##..
        ###.
        ####
    """

    def visualize_pattern(
        self,
        pattern: Any,
        title: str = "",
        save_path: str | None = None,
        head: int = 0,
        block_size: int = 128,
        causal: bool | None = None,
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
    """Judges a pattern against the true attention.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> pattern = tessera.patterns.local_window(512, block=64, density=0.5)
        >>> found = tessera.PatternQualityAnalyzer().analyze_pattern_quality(pattern, query=q, key=k)
        >>> 0 < found.coverage_ratio < 1
        True
    """

    def analyze_pattern_quality(
        self,
        sparse_pattern: Any,
        reference_attention: Tensor | None = None,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        block_size: int = 128,
        causal: bool | None = None,
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
            error = self._error_of_weights(weights, pattern, bool(causal or pattern.causal))
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
    """Looks for the cheapest pattern that holds a share of the attention mass.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
        >>> config, found = tessera.PatternOptimizer(0.8, block_size=64).optimize(q, k, causal=True)
        >>> found.coverage >= 0.8
        True
    """

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


# ---- memory


def check_sizes(seq_len: Any, num_heads: Any, batch_size: Any, dtype: Any) -> None:
    for name, value in (("seq_len", seq_len), ("num_heads", num_heads), ("batch_size", batch_size)):
        check_int(name, value, 1)
    if not isinstance(dtype, torch.dtype):
        reject("dtype", dtype, "a torch.dtype", TypeError)


def cells_of(pattern: BlockPattern, heads: int) -> int:
    """Elements of the kept blocks of these heads, of one batch element."""
    blocks = pattern.indices.numel() * heads // (pattern.heads * pattern.batches)
    return blocks * pattern.block_q * pattern.block_k


def savings(
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
    """As the method of that name, for a configuration alone.

    Example:
        >>> config = tessera.PatternConfig("local_window", sparsity_ratio=0.25)
        >>> tessera.estimate_memory_savings(1024, config)["dense_mb"]
        4.0
    """
    check_sizes(seq_len, num_heads, batch_size, dtype)
    pattern = PatternConfig.of(sparse_config).pattern(seq_len, causal=causal, heads=num_heads)
    share = pattern.statistics().density
    return savings(seq_len, num_heads, batch_size, cells_of(pattern, num_heads), share, dtype)
