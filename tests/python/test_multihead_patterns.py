"""Named patterns of modules are made once a process: what shares them, what counts anew, what they cost."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import time
import timeit
import weakref

import pytest
import tessera
from multihead_cases import E, H, L, N
from tessera import patterns
from tessera.nn import MultiheadAttention
from tessera.pattern import pattern_for

import torch
from torch import nn

# ---- patterns that are made once


def _called(monkeypatch):
    """Names of the patterns that the cache makes."""
    seen = []
    original = patterns.PatternCache.make

    def make(self, name, *args, **options):
        seen.append(name)
        return original(self, name, *args, **options)

    monkeypatch.setattr(patterns.PatternCache, "make", make)
    patterns.cache.clear()
    return seen


def test_a_named_pattern_is_made_once_for_all_modules(monkeypatch):
    seen = _called(monkeypatch)
    config = {"pattern_type": "dilated_sparse", "block_size": 32}
    modules = [MultiheadAttention(E, H, pattern=config) for _ in range(2)]
    before = patterns.cache.stats()
    x = torch.randn(L, N, E)
    for module in modules * 2:
        module(x, x, x, need_weights=False)
    assert seen == ["dilated_sparse"]
    now = patterns.cache.stats()
    assert now.misses == before.misses + 1 and now.hits == before.hits + 3 and now.bytes > before.bytes
    a, b = (pattern_for(m.pattern, L, L, False, H) for m in modules)
    assert a is b and a is pattern_for(modules[0].pattern, L, L, False, 2 * H)  # heads share it
    assert a == patterns.dilated_sparse(L, block=32, density=0.1)


def test_a_changed_config_counts_at_once():
    """Every field that decides about the pattern, lengths, causality and heads."""
    config = tessera.PatternConfig("dilated_sparse", block_size=32)
    length = 640

    def check(causal=False, heads=H, seqlen_k=length):
        for _ in range(2):
            found = pattern_for(config, length, seqlen_k, causal, heads)
            assert found == config.pattern(length, seqlen_k, causal=causal, heads=heads)
        return found

    found = {check(), check(causal=True), check(seqlen_k=320)}
    for name, value in (
        ("density", 0.3), ("dilation_rates", (1, 3)), ("block_size", 64), ("block_size", (64, 32)),
        ("pattern_type", "random"), ("seed", 5), ("pattern_type", "bigbird"), ("local_window_size", 96),
        ("global_tokens", 128), ("pattern_type", "strided"), ("stride", 3), ("pattern_type", "causal"),
    ):  # fmt: skip
        setattr(config, name, value)
        found.add(check())
    assert len(found) == 15
    config = tessera.PatternConfig("random", block_size=32)
    assert check(heads=2) != check(heads=4)


def test_shared_patterns_keep_the_limits_of_the_cache(monkeypatch):
    seen = _called(monkeypatch)
    config = tessera.PatternConfig("dilated_sparse", block_size=16)

    def ask(length):
        seen.clear()
        alive = weakref.ref(pattern_for(config, length, length, False, H).indptr)
        return alive, not seen

    limits = patterns.cache.stats()
    try:
        first, _ = ask(160)
        assert ask(160)[1] and first() is not None
        patterns.cache.clear()
        gc.collect()
        assert first() is None and not ask(160)[1]
        patterns.cache.resize(max_entries=2)
        first, _ = ask(160)
        assert ask(160)[1]
        ask(176), ask(192)  # the core drops one of three
        gc.collect()
        assert first() is None and len(patterns.cache) == 2
        patterns.cache.resize(max_entries=0)
        assert not ask(160)[1] and not ask(160)[1]
        patterns.cache.resize(max_entries=100, max_bytes=20_000)
        for length in range(160, 3200, 160):
            alive, _ = ask(length)
            assert patterns.cache.stats().bytes <= 20_000
        assert alive() is None  # too large to be kept beside the core's
        patterns.cache.resize(max_bytes=limits.max_bytes)
        first, _ = ask(160)
        patterns.cache.resize(max_entries=1)
        ask(160)
        patterns.cache.get("strided", 160, block=16, density=0.5)  # somebody else's drops ours
        gc.collect()
        assert patterns.cache.stats().entries == 1 and not ask(160)[1]
    finally:
        patterns.cache.resize(limits.max_entries, limits.max_bytes)


@pytest.mark.parametrize("pattern", [None, "dilated_sparse", "own"])
def test_patterns_of_inference_serve_training(pattern):
    """What is made in inference mode and kept must be good for a backward later on."""
    patterns.cache.clear()
    module = MultiheadAttention(E, H, pattern=None if pattern == "own" else pattern)
    x = torch.randn(L, N, E)
    with torch.inference_mode():
        if pattern == "own":
            module.pattern = patterns.strided(L, block=32, density=0.4).transpose()
        module(x, x, x, need_weights=False)
    module(x, x, x, need_weights=False)[0].sum().backward()
    assert module.in_proj_weight.grad is not None


def test_a_fork_serves_itself():
    """A DataLoader's worker: the lock may be held by another thread at the moment of the fork."""
    module = MultiheadAttention(E, H, pattern="dilated_sparse")
    x = torch.randn(L, N, E)
    with torch.no_grad():
        expected = module(x, x, x, need_weights=False)[0]
        with patterns.cache._lock:
            child = os.fork()
            if child == 0:
                ok = torch.equal(module(x, x, x, need_weights=False)[0], expected)
                os._exit(0 if ok else 1)
    for _ in range(500):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_modules_hold_no_patterns():
    """Copies, pickles and state are of the configuration only."""
    module = MultiheadAttention(E, H, pattern="dilated_sparse")
    before = set(module.__dict__), len(pickle.dumps(module))
    x = torch.randn(L, N, E)
    module(x, x, x)
    assert (set(module.__dict__), len(pickle.dumps(module))) == before
    assert copy.deepcopy(module).pattern == module.pattern
    assert list(module.state_dict()) == list(nn.MultiheadAttention(E, H).state_dict())


def test_a_call_with_a_named_pattern_costs_no_more():
    """Looking it up is a few microseconds (measured 2, bar 10) beside hundreds of the call."""
    config = tessera.PatternConfig("dilated_sparse")
    pattern_for(config, 64, 64, False, 4)
    best = min(timeit.repeat(lambda: pattern_for(config, 64, 64, False, 4), number=200, repeat=20)) / 200
    assert best < 20e-6  # twice the bar: other programs run on the machine


def test_no_dense_weights_that_nobody_asked_for():
    """16,384 tokens: dense weights would take 2 GB a batch, and minutes."""
    module = tessera.MultiheadAttention(32, 2, pattern="local_window", batch_first=True).eval()
    x = torch.randn(1, 16384, 32)
    with torch.no_grad():
        out, weights = module(x, x, x)
    assert out.shape == x.shape and weights is None
    assert tessera.MultiheadAttention(32, 2)(x[0, :8], x[0, :8], x[0, :8])[1].shape == (8, 8)
