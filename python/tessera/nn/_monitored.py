"""What the attention modules share to measure themselves: a monitor that is made when it is first asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import analysis
from ..attention import block_sparse_attention
from ..pattern import BlockPattern
from ._tracing import measurable
from .monitoring import CallFacts, PerformanceMonitor


class Monitored:
    """``performance_monitor`` (off until ``enable()``) and ``get_performance_stats()`` of a module."""

    _monitor: PerformanceMonitor | None = None  # most modules never have one

    @property
    def performance_monitor(self) -> PerformanceMonitor:
        """Times the calls and compares sampled ones with dense attention; see :class:`~tessera.PerformanceMonitor`.
        Calls in compiled graphs and under function transforms are not measured."""
        if self._monitor is None:
            self._monitor = PerformanceMonitor()
        return self._monitor

    @performance_monitor.setter
    def performance_monitor(self, monitor: PerformanceMonitor) -> None:
        self._monitor = monitor

    def get_performance_stats(self) -> dict[str, float]:
        """What was measured since ``performance_monitor.enable()`` (:meth:`PerformanceMonitor.stats`); NaN where
        nothing was."""
        return self.performance_monitor.stats()

    def _measuring(self) -> PerformanceMonitor | None:
        """The monitor if it is on."""
        monitor = self._monitor
        return monitor if monitor is not None and monitor.enabled else None


def judged_quality(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, **options: Any
) -> tuple[float, float] | None:
    """(coverage, output error) of :func:`analysis.quality`; None where there is nothing to judge: no row sees a key, or
    scores or values are NaN or infinite."""
    found = analysis.quality_if_finite(q, k, v, pattern, **options)
    return (found.coverage, found.output_error) if found is not None and found.rows else None


def measured_attention(
    monitor: PerformanceMonitor, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, causal: bool | None,
    return_lse: bool = False, layout: str = "bshd", **options: Any,
) -> Any:  # fmt: skip
    """block_sparse_attention, measured; q, k, v as layout says."""
    if not measurable(q, k, v, *options.values()):
        return block_sparse_attention(q, k, v, pattern, causal=causal, return_lse=return_lse, layout=layout, **options)
    lse: list[Tensor] = []

    def call() -> Tensor:
        out, found = block_sparse_attention(q, k, v, pattern, causal=causal, return_lse=True, layout=layout, **options)
        lse.append(found)
        return out

    q_seen, k_seen, v_seen = (t.detach() if layout == "bshd" else t.detach().transpose(1, 2) for t in (q, k, v))

    # block_bias is of the pattern's blocks, not of the true attention that they are judged against.
    truth = {name: value for name, value in options.items() if name not in ("block_bias", "dropout_p")}

    def judge(out: Tensor) -> tuple[float, float] | None:
        return judged_quality(q_seen, k_seen, v_seen, pattern, causal=causal, sample_rows=monitor.sample_rows, **truth)

    judged = options.get("block_bias") is None

    def facts() -> CallFacts:
        return CallFacts(
            pattern.statistics(causal=causal).density, bool(causal or pattern.causal), judge if judged else None
        )

    out = monitor.run(call, q_seen, k_seen, v_seen, facts)
    return (out, lse[0]) if return_lse else out
