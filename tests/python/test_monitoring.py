"""PerformanceMonitor: what it counts, when it samples, and that its figures are measured."""

import copy
import math
import mmap
import pickle
import threading
import time

import pytest
import tessera
import torch.nn.functional as F
from tessera import BlockSparseAttention, MultiheadAttention
from tessera.guides import BlockSparseRingDilatedAttention, BlockSparseRingMultiheadDilatedAttention
from tessera.nn import monitoring
from tessera.nn._monitored import judged_quality
from tessera.nn.monitoring import CallFacts, PerformanceMonitor, dense_seconds

import torch


def qkv(batch=1, seqlen=256, heads=2, dim=16):
    return tuple(torch.randn(batch, seqlen, heads, dim) for _ in range(3))


def run(monitor, seconds=0.0, density=0.25, quality=None, calls=1, out=None):
    q, k, v = qkv()

    def call():
        time.sleep(seconds)
        return q if out is None else out()

    for _ in range(calls):
        monitor.run(call, q, k, v, lambda: CallFacts(density, False, quality))


def test_nothing_measured_is_nan():
    stats = PerformanceMonitor().stats()
    assert stats.pop("forwards") == 0 and stats.pop("sampled_forwards") == 0
    assert all(math.isnan(value) for value in stats.values())


def test_times_and_samples(monkeypatch):
    monkeypatch.setattr(monitoring, "dense_seconds", lambda *_: 0.01)
    monitor = PerformanceMonitor(sample_every=3).enable()
    run(monitor, seconds=0.02, calls=4)
    run(monitor, seconds=0.06, density=0.75)
    stats = monitor.stats()
    assert stats["forwards"] == 5 and stats["sampled_forwards"] == 2
    assert stats["min_forward_time_ms"] >= 20 and stats["max_forward_time_ms"] >= 60
    assert stats["min_forward_time_ms"] <= stats["avg_forward_time_ms"] <= stats["max_forward_time_ms"]
    assert stats["density"] == pytest.approx((4 * 0.25 + 0.75) / 5)
    assert stats["avg_sparsity"] == pytest.approx(1 - stats["density"])
    assert stats["theoretical_speedup"] == pytest.approx(1 / stats["density"])
    # Measured, not 1 / density: dense attention was the faster one.
    assert 0 < stats["avg_speedup"] <= 0.5
    assert math.isnan(stats["quality_score"])
    monitor.reset()
    assert monitor.stats()["forwards"] == 0


def test_quality_is_what_the_facts_measure():
    monitor = PerformanceMonitor(sample_every=2)
    scores = iter([(0.5, 0.2), (0.7, 0.4)])
    run(monitor, quality=lambda out: next(scores), calls=4)
    stats = monitor.stats()
    assert stats["quality_score"] == pytest.approx(0.6) and stats["output_error"] == pytest.approx(0.3)


def test_memory_is_the_growth_of_resident_memory():
    monitor = PerformanceMonitor(sample_every=1)

    def touch():
        # Pages of their own: malloc might reuse what the process holds already.
        with mmap.mmap(-1, 64 << 20) as scratch:
            for _ in range(64):
                scratch.write(bytes(1 << 20))
            time.sleep(0.1)  # long enough for the watching thread to be run on a busy machine
        return torch.ones(1, 16)

    run(monitor, out=touch)
    assert 60 < monitor.stats()["avg_memory_mb"] < 80


def test_a_call_that_raises_is_not_counted():
    monitor = PerformanceMonitor()

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run(monitor, out=fail)
    assert monitor.stats()["forwards"] == 0
    run(monitor)
    assert monitor.stats()["sampled_forwards"] == 1


@pytest.mark.parametrize("arguments", [{"sample_every": 0}, {"sample_rows": 1.5}, {"sample_every": True}])
def test_refuses(arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}: got .*; allowed: an int >= 1"):
        PerformanceMonitor().enable(**arguments)


def test_copies_keep_settings_only_and_threads_may_share_one():
    monitor = PerformanceMonitor(sample_every=7).enable()
    run(monitor)
    for again in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert again.enabled and again.sample_every == 7 and again.stats()["forwards"] == 0
    threads = [threading.Thread(target=run, args=(monitor,), kwargs={"calls": 20}) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert monitor.stats()["forwards"] == 81


@pytest.mark.parametrize("causal", [False, True])
def test_a_strip_stands_for_the_whole(monkeypatch, causal):
    """Dense attention timed on a strip of rows: its scale is the share of the pairs, so a timer that counts pairs must
    give the whole."""
    counted = []
    clock = iter(range(1000))

    def attention(q, k, v, is_causal=False, **_):
        counted.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return q

    monkeypatch.setattr(monitoring, "DENSE_PAIRS", 1 << 16)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: next(clock) * 1.0)
    q, k, v = qkv(batch=2, seqlen=1000)
    seconds = dense_seconds(q, k, v, causal)  # the strip takes "one second"
    whole = 2 * 2 * (1000 * 1001 // 2 if causal else 1000 * 1000)
    assert seconds == pytest.approx(whole / counted[0], rel=0.15)


def test_a_module_is_measured_without_being_changed():
    attention = BlockSparseRingDilatedAttention(sparsity_ratio=0.25, block_size=64, dropout=0.5)
    q, k, v = qkv(seqlen=1024)
    torch.manual_seed(5)
    expected = attention(q, k, v)
    attention.performance_monitor.enable(sample_every=1, sample_rows=1024)
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v), expected)  # the same random numbers
    after = torch.rand(1)
    torch.manual_seed(5)
    attention.performance_monitor.disable()
    attention(q, k, v)
    assert torch.equal(torch.rand(1), after)
    # Quality by its definition, on all rows.
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, -1)
    mask = attention.pattern_generator.create_pattern(1024).to_token_mask()
    stats = attention.get_performance_stats()
    assert stats["quality_score"] == pytest.approx(float((weights * mask).sum(-1).mean()), rel=1e-4)
    kept = weights * mask
    sparse = torch.einsum("bhqk,bkhd->bqhd", kept / kept.sum(-1, keepdim=True), v)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    assert stats["output_error"] == pytest.approx(float((sparse - dense).norm() / dense.norm()), rel=1e-3)


def test_quality_of_segments():
    attention = BlockSparseRingDilatedAttention([128], [1], sparse_config="dense")
    q, k, v = qkv(seqlen=512)
    attention.performance_monitor.enable(sample_rows=512)
    out = attention(q, k, v)
    stats = attention.performance_monitor.stats()
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, -1)
    mask = torch.block_diag(*[torch.ones(128, 128)] * 4)
    assert stats["density"] == pytest.approx(0.25)
    assert stats["quality_score"] == pytest.approx(float((weights * mask).sum(-1).mean()), rel=1e-4)
    dense = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    assert stats["output_error"] == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)


MODULES = {
    "pattern": lambda: BlockSparseRingDilatedAttention(density=0.3, block_size=16),
    "segments": lambda: BlockSparseRingDilatedAttention([64, 128], [1, 2], density=0.3, block_size=16),
    "function's": lambda: BlockSparseAttention({"density": 0.3, "block_size": 16}),
}
MULTIHEAD = {
    "multihead": lambda: MultiheadAttention(32, 2, batch_first=True, pattern={"density": 0.3, "block_size": 16}),
    "guides' multihead": lambda: BlockSparseRingMultiheadDilatedAttention(32, 2, density=0.3, block_size=16),
}


@pytest.mark.parametrize("kind", [*MODULES, *MULTIHEAD])
@pytest.mark.parametrize("spoil", [math.nan, math.inf, 1e30])
def test_calls_that_cannot_be_judged_work_and_leave_quality_alone(kind, spoil):
    module = {**MODULES, **MULTIHEAD}[kind]()
    inputs = qkv(seqlen=200) if kind in MODULES else [torch.randn(1, 200, 32)] * 3

    def attend(*tensors):
        found = module(*tensors) if kind in MODULES else module(*tensors, need_weights=False)[0]
        return found.detach()

    spoilt = [(inputs[0] * spoil, inputs[1] * max(spoil, 1), inputs[2]), (*inputs[:2], inputs[2] * math.nan)]
    expected = [attend(*tensors) for tensors in spoilt]
    monitor = module.performance_monitor.enable(sample_every=1)
    attend(*inputs)
    before = monitor.stats()
    for tensors, out in zip(spoilt, expected, strict=True):
        assert torch.equal(attend(*tensors).nan_to_num(7.0), out.nan_to_num(7.0))
    after = monitor.stats()
    assert after["sampled_forwards"] == 3 and before["quality_score"] > 0
    for name in ("quality_score", "output_error"):
        assert after[name] == before[name]
    assert after["density"] == pytest.approx(before["density"])
    assert all(math.isfinite(value) for value in after.values())


def test_other_mistakes_of_judging_are_not_swallowed():
    with pytest.raises(ValueError, match="^pattern: got"):
        judged_quality(*qkv(), tessera.patterns.dense(8, block=16))


@pytest.mark.parametrize("kind", MODULES)
def test_calls_with_nothing_to_measure_do_not_count(kind):
    module = MODULES[kind]()
    q, k, v = qkv(batch=2, seqlen=200)
    monitor = module.performance_monitor.enable(sample_every=1)
    assert module(q[:0], k[:0], v[:0]).shape == (0, 200, 2, 16)
    assert module(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 2, 16)
    assert monitor.stats()["forwards"] == 0
    module(q, k, v)
    before = monitor.stats()
    module(q[:0], k[:0], v[:0])
    assert monitor.stats() == before
    if kind != "segments":  # which are judged without masks only
        module(q, k, v, key_lengths=torch.tensor([0, 0]))
        after = monitor.stats()
        assert after["sampled_forwards"] == 2
        for name in ("quality_score", "output_error"):
            assert after[name] == before[name]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("mapped", [0, 1])
def test_mapped_calls_are_not_measured(kind, mapped):
    module = MODULES[kind]()
    inputs = list(qkv(seqlen=200))
    monitor = module.performance_monitor.enable(sample_every=1)
    batch = torch.randn(3, 200, 2, 16)

    def one(a):
        return module(*[a[None] if i == mapped else t for i, t in enumerate(inputs)])[0]

    expected = torch.stack([one(a) for a in batch])
    assert monitor.stats()["forwards"] == 3
    torch.testing.assert_close(torch.vmap(one)(batch), expected)
    assert monitor.stats()["forwards"] == 3


@pytest.mark.parametrize("kind", MODULES)
def test_calls_with_a_mapped_bias_are_not_measured(kind):
    module = MODULES[kind]()
    inputs = qkv(seqlen=200)
    monitor = module.performance_monitor.enable(sample_every=1)
    bias = torch.randn(3, 1, 1, 200, 200)
    found = torch.vmap(lambda b: module(*inputs, attn_bias=b))(bias)
    assert monitor.stats()["forwards"] == 0
    torch.testing.assert_close(found[1], module(*inputs, attn_bias=bias[1]))
