"""What the attention modules share to measure themselves: a monitor that is made when it is first asked for, and what
LongNet segments keep."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _dilated, analysis
from ._pattern import BlockPattern
from .functional import block_sparse_attention
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


def measurable(*arguments: Any) -> bool:
    """Whether a call with these tensors and others may be measured: nobody compiles, traces or batches it."""
    from ._multihead import may_look  # which imports this file

    return all(may_look(t) for t in arguments if isinstance(t, Tensor))


def judged_quality(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, **options: Any
) -> tuple[float, float] | None:
    """(coverage, output error) of :func:`analysis.quality`; None where there is nothing to judge: no row sees a key, or
    scores or values are NaN or infinite, which attention takes and a share of its mass cannot be said of."""
    try:
        found = analysis.quality(q, k, v, pattern, **options)
    except ValueError as error:
        if _NOT_FINITE.match(str(error)):
            return None
        raise
    return (found.coverage, found.output_error) if found.rows else None


# How the core begins these errors (src/analysis/scan.cc, quality.cc); others are mistakes of this package.
_NOT_FINITE = re.compile(r"(q, k: got an admitted score|v: got an admitted value) that is NaN")


def measured_attention(
    monitor: PerformanceMonitor, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, causal: bool,
    return_lse: bool = False, layout: str = "bshd", **options: Any,
) -> Any:  # fmt: skip
    """block_sparse_attention, measured; q, k, v as layout says."""
    if not measurable(q, k, v, *options.values()):
        return block_sparse_attention(
            q, k, v, pattern, causal=causal, return_lse=return_lse, layout=layout, **options
        )
    lse: list[Tensor] = []

    def call() -> Tensor:
        out, found = block_sparse_attention(q, k, v, pattern, causal=causal, return_lse=True, layout=layout, **options)
        lse.append(found)
        return out

    q_seen, k_seen, v_seen = (t.detach() if layout == "bshd" else t.detach().transpose(1, 2) for t in (q, k, v))

    # block_bias is of the pattern's blocks, not of the true attention that they are judged against.
    truth = {name: value for name, value in options.items() if name not in ("block_bias", "dropout_p")}

    def judge(out: Tensor) -> tuple[float, float] | None:
        return judged_quality(
            q_seen, k_seen, v_seen, pattern, causal=causal, sample_rows=monitor.sample_rows, **truth
        )

    judged = options.get("block_bias") is None

    def facts() -> CallFacts:
        return CallFacts(pattern.statistics(causal=causal).density, causal, judge if judged else None)

    out = monitor.run(call, q_seen, k_seen, v_seen, facts)
    return (out, lse[0]) if return_lse else out


def _alike(heads: int, rates: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(head, how many heads keep the same as it) for the heads' offsets in segments of these rates."""
    for offsets, count in Counter(tuple(h % rate for rate in rates) for h in range(heads)).items():
        yield next(h for h in range(heads) if tuple(h % rate for rate in rates) == offsets), count


def segment_density(seqlen: int, heads: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
                    inner: _dilated.Inner) -> float:  # fmt: skip
    """(q, k) pairs that any (w, r) admits over those of dense attention, in [0, 1]: one that several admit counts once.
    inner: as in _dilated, of blocks of ``block`` tokens."""
    inner = functools.cache(inner)
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen)
    if not dense:
        return 0.0
    kept = round(_dilated.density(seqlen, heads, widths, rates, causal, inner) * dense)
    # Every (w, r) starts anew with each period.
    period = math.lcm(*widths)
    for length, times in ((period, seqlen // period), (seqlen % period, 1)):
        if length and times:
            kept -= times * sum(count * _repeated(length, head, widths, rates, block, causal, inner)
                                for head, count in _alike(heads, rates))  # fmt: skip
    return kept / dense


def _repeated(length: int, head: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
              inner: _dilated.Inner) -> int:  # fmt: skip
    """How often the (w, r) admit pairs of this head again that one admits already. Rows that lie in one row of blocks
    of every (w, r) see the same keys: a group of them is looked at once."""
    rows = torch.arange(length)
    group, covers = torch.zeros_like(rows), torch.zeros_like(rows)
    for width, rate in zip(widths, rates, strict=True):
        place = rows % width - head % rate
        inside = (place >= 0) & (place % rate == 0)
        line = torch.where(inside, 1 + rows // width * width + place // rate // block, 0)
        group = torch.unique(group * (length + 1) + line, return_inverse=True)[1]
        covers += inside
    rows, group = rows[covers > 1], group[covers > 1]
    total = 0
    for same in rows[group.argsort(stable=True)].split(group.unique(return_counts=True)[1].tolist()):
        row = int(same[0])
        parts = [_dilated.Part(row - row % width, min(row - row % width + width, length), rate, head % rate)
                 for width, rate in sorted(zip(widths, rates, strict=True))
                 if row % width >= head % rate and (row % width - head % rate) % rate == 0]  # fmt: skip
        # What two admit lies in a segment that is not the widest.
        first, stop = min(p.start for p in parts[:-1]), max(p.stop for p in parts[:-1])
        hits = torch.zeros(stop - first, dtype=torch.int32)
        for part in parts:
            pattern = inner(part.length)
            mine = (row - part.start - part.offset) // part.rate // block
            kept = torch.zeros(-(-part.length // block), dtype=torch.bool)
            kept[pattern.indices[int(pattern.indptr[mine]) : int(pattern.indptr[mine + 1])].long()] = True
            begin = part.start + part.offset
            low, high = (min(max(0, -(-(at - begin) // part.rate)), part.length) for at in (first, stop))
            if low < high:
                hits[begin + low * part.rate - first :: part.rate][: high - low] += kept[
                    torch.arange(low, high) // block
                ]
        again = (hits - 1).clamp(min=0)
        if causal:
            total += int(again.cumsum(0)[same - first].sum())
        else:
            total += len(same) * int(again.sum())
    return total


def segment_blocks(seqlen: int, heads: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
                   inner: _dilated.Inner) -> int:  # fmt: skip
    """Blocks of the whole sequence, over all heads, that hold a pair which any (w, r) admits: those of
    _dilated.weights. A rate of r spreads a block over up to r x r of them."""
    inner = functools.cache(inner)
    side = -(-seqlen // block)
    total = 0
    for head, count in _alike(heads, rates):
        found = [torch.empty(0, dtype=torch.int64)]
        for width, rate in zip(widths, rates, strict=True):
            # Rows of an inner block at most a block apart: they touch all the blocks that it touches.
            picks = torch.tensor([*range(0, block, max(1, block // rate)), block - 1])
            for start in range(0, seqlen, width):
                part = _dilated.Part(start, min(start + width, seqlen), rate, head % rate)
                if part.length == 0:
                    continue
                pattern = inner(part.length)
                lines = torch.arange(-(-part.length // block))
                local = (lines[:, None] * block + picks).clamp(max=part.length - 1)
                touched = (start + part.offset + local * rate) // block
                row = touched[torch.repeat_interleave(lines, pattern.indptr.long().diff())][:, :, None]
                column = touched[pattern.indices.long()][:, None, :]
                places = row * side + column
                found.append(places[(row >= column) | (not causal)].unique())
        total += count * len(torch.cat(found).unique())
    return total
