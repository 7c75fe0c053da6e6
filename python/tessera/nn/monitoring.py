"""PerformanceMonitor: what a module's forward calls cost and keep, measured.

Every call is timed. Every ``sample_every``-th one is also compared with dense attention: its speed with
``scaled_dot_product_attention`` on a strip of query rows, its quality with the true attention of sampled query rows,
and the resident memory it takes is watched. Nothing is derived from the density but ``theoretical_speedup``, which says
so.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F

import torch
from torch import Tensor

NAN = float("nan")

# Pairs (batch x heads x rows x keys) up to which dense attention is timed whole; beyond it a strip of rows is timed and
# scaled by its pairs. 2^26 pairs at D = 64 are 17 GFLOP: a fraction of a second on two cores.
DENSE_PAIRS = 1 << 26
DENSE_MIN_ROWS = 64
# Seconds up to which it is timed twice and the better one counts: what comes first pays for threads and pages.
SHORT = 0.05


@dataclass(frozen=True)
class CallFacts:
    """What a module knows about one call.

    density: kept share of the admissible pairs, as achieved. causal: the call's mask. quality: output -> (coverage,
    relative output error), measured against the true attention on sampled rows, or None where that cannot be judged;
    called on sampled calls only.
    """

    density: float
    causal: bool
    quality: Callable[[Tensor], tuple[float, float] | None] | None = None


class _Mean:
    """Mean, min and max of the finite values that were added; NaN if none was."""

    def __init__(self) -> None:
        self.count, self.total, self.low, self.high = 0, 0.0, math.inf, -math.inf

    def add(self, value: float) -> None:
        if not math.isfinite(value):  # not measurable in this call: it must not spoil those of the others
            return
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else NAN


class PerformanceMonitor:
    """Counts, times and samples the forward calls of one module. Off until ``enable()``. Safe from several threads.

    Args:
        sample_every: 1, 1 + n, 1 + 2n, ... are the calls that are compared with dense attention and cost extra time.
        sample_rows: query rows of each head on which quality is judged.

    Example:
        >>> attention = tessera.BlockSparseAttention("local_window", density=0.5, block=64)
        >>> monitor = attention.performance_monitor.enable()
        >>> x = torch.randn(1, 512, 2, 16)
        >>> out = attention(x, x, x)
        >>> attention.get_performance_stats()["forwards"]
        1
    """

    def __init__(self, sample_every: int = 100, sample_rows: int = 32) -> None:
        self.enabled = False
        self._lock = threading.Lock()
        self.sample_every = self.sample_rows = 0
        self._configure(sample_every, sample_rows)
        self.reset()

    def _configure(self, sample_every: int | None, sample_rows: int | None) -> None:
        for name, value in (("sample_every", sample_every), ("sample_rows", sample_rows)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; allowed: an int >= 1")
            setattr(self, name, value)

    def enable(self, sample_every: int | None = None, sample_rows: int | None = None) -> PerformanceMonitor:
        """Starts measuring; what was measured before is kept."""
        self._configure(sample_every, sample_rows)
        self.enabled = True
        return self

    def disable(self) -> PerformanceMonitor:
        self.enabled = False
        return self

    def reset(self) -> None:
        """Forgets what was measured; the next call is a sampled one."""
        with self._lock:
            self._calls = 0
            self._time, self._density, self._speedup = _Mean(), _Mean(), _Mean()
            self._memory, self._quality, self._error = _Mean(), _Mean(), _Mean()

    def run(
        self, call: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, facts: Callable[[], CallFacts]
    ) -> Tensor:
        """Makes the call and measures it. q, k, v: [B, S, H, D], what the attention itself sees. Returns call()'s
        result. A call that raises, or has no queries or keys, is not counted."""
        if 0 in q.shape[:3] or 0 in k.shape[:2]:
            return call()
        with self._lock:
            sampled = self._calls % self.sample_every == 0
            self._calls += 1
        try:
            if sampled:
                with _ResidentGrowth() as growth:
                    start = time.perf_counter()
                    out = call()
                    seconds = time.perf_counter() - start
            else:
                start = time.perf_counter()
                out = call()
                seconds = time.perf_counter() - start
        except BaseException:
            with self._lock:
                self._calls -= 1
            raise
        about = facts()
        with self._lock:
            self._time.add(seconds * 1e3)
            self._density.add(about.density)
        if sampled:
            # A strip's kernel may draw no random numbers and must not be part of the graph.
            with torch.no_grad():
                speedup = dense_seconds(q.detach(), k.detach(), v.detach(), about.causal) / max(seconds, 1e-9)
                judged = None if about.quality is None else about.quality(out.detach())
            with self._lock:
                self._speedup.add(speedup)
                self._memory.add(max(growth.bytes, out.numel() * out.element_size()) / 2**20)
                if judged is not None and all(map(math.isfinite, judged)):
                    self._quality.add(judged[0])
                    self._error.add(judged[1])
        return out

    def stats(self) -> dict[str, float]:
        """The figures; NaN where nothing was measured yet.

        forwards; avg/min/max_forward_time_ms; density and avg_sparsity (means over calls, as achieved);
        theoretical_speedup (1 / density); and over the sampled_forwards: avg_speedup (time of dense attention over this
        one's), avg_memory_mb (growth of resident memory during a call, the output included), quality_score (share of
        the true attention mass that was kept) and output_error (|sparse - dense| / |dense| on the judged rows). Calls
        without queries or keys do not count, and for the last two none with NaN or infinite scores or values, or whose
        rows see no key.
        """
        with self._lock:
            timed = self._time.count > 0
            density = self._density.mean
            return {
                "forwards": self._time.count,
                "sampled_forwards": self._speedup.count,
                "avg_forward_time_ms": self._time.mean,
                "min_forward_time_ms": self._time.low if timed else NAN,
                "max_forward_time_ms": self._time.high if timed else NAN,
                "density": density,
                "avg_sparsity": 1.0 - density,
                "theoretical_speedup": 1.0 / density if density > 0 else NAN,
                "avg_speedup": self._speedup.mean,
                "avg_memory_mb": self._memory.mean,
                "quality_score": self._quality.mean,
                "output_error": self._error.mean,
            }

    # Modules that hold a monitor are copied and pickled: locks are not.
    def __getstate__(self) -> dict[str, object]:
        return {"enabled": self.enabled, "sample_every": self.sample_every, "sample_rows": self.sample_rows}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["sample_every"], state["sample_rows"])  # type: ignore[misc]
        self.enabled = bool(state["enabled"])


def dense_seconds(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Seconds that dense attention of q [B, Sq, H, D], k, v [B, Sk, Hkv, D] takes with PyTorch's own kernel: measured
    whole up to DENSE_PAIRS, else measured on a strip of query rows and scaled by its pairs."""
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    if batch == 0 or seqlen_q == 0 or seqlen_k == 0:
        return NAN
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    whole = batch * heads * seqlen_q * seqlen_k <= DENSE_PAIRS and (not causal or seqlen_q == seqlen_k)
    scale = 1.0
    if not whole:
        rows = min(seqlen_q, max(DENSE_MIN_ROWS, DENSE_PAIRS // (heads * seqlen_k)))
        first, keys, pairs = 0, seqlen_k, float(batch * seqlen_q * seqlen_k)
        if causal:
            # Rows in the middle see an average number of keys.
            first = (seqlen_q - rows) // 2
            keys = max(1, min(seqlen_k, first + rows + seqlen_k - seqlen_q))
            row = torch.arange(seqlen_q, dtype=torch.float64) + (seqlen_k - seqlen_q + 1)
            pairs = batch * float(row.clamp(0, seqlen_k).sum())
        q, k, v = q[:1, :, first : first + rows], k[:1, :, :keys], v[:1, :, :keys]
        scale = pairs / (rows * keys)
    grouped = {"enable_gqa": True} if k.shape[1] != heads else {}
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v, is_causal=causal and whole, **grouped)  # type: ignore[arg-type]
        best = min(best, time.perf_counter() - start)
        if best > SHORT:
            break
    return best * scale


class _ResidentGrowth:
    """Peak growth of this process's resident memory while it is entered, watched every half millisecond by a thread
    (Linux; elsewhere 0). ``bytes`` holds it afterwards."""

    _period = 5e-4

    def __init__(self) -> None:
        self.bytes = 0

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def _watch(self) -> None:
        while not self._done.wait(self._period):
            self.bytes = max(self.bytes, self._resident() - self._before)

    def __enter__(self) -> _ResidentGrowth:
        try:
            self._before = self._resident()
        except OSError:
            self._thread = None
            return self
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self.bytes = max(self.bytes, self._resident() - self._before)
