"""What the attention modules share to measure themselves: a monitor that is made when it is first asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._pattern import BlockPattern
from .functional import block_sparse_attention
from .monitoring import CallFacts, PerformanceMonitor

# Options of a call that are part of the true attention which a pattern is judged against. Window and block_bias are
# not: calls that have them are timed, not judged.
_TRUTH = ("scale", "key_lengths", "softcap", "alibi_slopes", "attn_bias", "sinks")


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


def measured_attention(
    monitor: PerformanceMonitor, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, causal: bool,
    return_lse: bool = False, layout: str = "bshd", **options: Any,
) -> Any:  # fmt: skip
    """block_sparse_attention, measured; q, k, v as layout says."""
    lse: list[Tensor] = []

    def call() -> Tensor:
        out, found = block_sparse_attention(q, k, v, pattern, causal=causal, return_lse=True, layout=layout, **options)
        lse.append(found)
        return out

    q_seen, k_seen, v_seen = (t.detach() if layout == "bshd" else t.detach().transpose(1, 2) for t in (q, k, v))

    def judge(out: Tensor) -> tuple[float, float]:
        index = torch.empty(0, dtype=torch.int32) if pattern.bitmap_index is None else pattern.bitmap_index
        bitmaps = torch.empty(0, dtype=torch.int64) if pattern.bitmaps is None else pattern.bitmaps
        truth = {n: x.detach() if isinstance(x, Tensor) else x for n, x in options.items() if n in _TRUTH}
        figures = torch.ops.tessera.quality(
            q_seen, k_seen, v_seen, [pattern.indptr], [pattern.indices], [index], [bitmaps],
            list(pattern.op_args[4]), monitor.sample_rows, 0, causal=causal, **truth,
        )  # fmt: skip
        row = figures[0, 0].tolist()
        return row[0], row[8]  # coverage, output error

    judged = options.get("window") is None and options.get("block_bias") is None

    def facts() -> CallFacts:
        return CallFacts(pattern.statistics(causal=causal).density, causal, judge if judged else None)

    out = monitor.run(call, q_seen, k_seen, v_seen, facts)
    return (out, lse[0]) if return_lse else out
