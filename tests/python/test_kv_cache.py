"""KVCache: a step gives a token what one pass over the whole sequence gives it, and every mistake has a name."""

from __future__ import annotations

import copy
import doctest
import itertools
import pickle

import pytest
import tessera
from tessera import patterns
from tessera.attention import kv_cache

import torch

torch.manual_seed(0)
LENGTHS = (150, 97, 16)
HEADS, KV_HEADS, DIM = 4, 2, 24
Q, K, V = (torch.randn(len(LENGTHS), max(LENGTHS), h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
TOTAL = 256  # what the sequences may become


def filled(block=16, steps=(40, 1, 1, 30, 200)):
    """A ragged cache that grew in steps; each sequence ends where it ends."""
    cache, at = tessera.KVCache(len(LENGTHS), KV_HEADS, DIM, block=block), 0
    for step in steps:
        part = slice(at, at + step)
        count = [max(0, min(n, at + step) - at) for n in LENGTHS]
        if K[:, part].shape[1]:
            cache.append(K[:, part], V[:, part], count)
        at += step
    assert cache.lengths.tolist() == list(LENGTHS)
    return cache


def whole(pattern, b, **options):
    """One pass over the whole sequence b."""
    n = LENGTHS[b]
    pattern = pattern.for_queries(0, n) if pattern.seqlen_q > n else pattern
    q, k, v = (x[b : b + 1, :n].double() for x in (Q, K, V))
    return tessera.block_sparse_attention(q, k, v, pattern, **options)[0]


NAMED = {
    "dense": {}, "causal": {}, "local_window": {"density": 0.4}, "dilated_sparse": {"density": 0.4},
    "global_local": {"density": 0.4, "global_tokens": 16}, "strided": {"density": 0.4}, "random": {"density": 0.4},
    "bigbird": {"density": 0.6, "window": 32, "global_tokens": 16},
}  # fmt: skip


def token_by_token(attend, block=16):
    """All outputs of all sequences, one token a step; sequences that have ended wait."""
    cache = tessera.KVCache(len(LENGTHS), KV_HEADS, DIM, block=block)
    outs = torch.zeros(len(LENGTHS), max(LENGTHS), HEADS, DIM)
    for t in range(max(LENGTHS)):
        cache.append(K[:, t : t + 1], V[:, t : t + 1], [int(t < n) for n in LENGTHS])
        out = attend(cache, Q[:, t : t + 1])
        for b, n in enumerate(LENGTHS):
            if t < n:
                outs[b, t] = out[b, 0]
    return outs


@pytest.mark.parametrize("kind", NAMED)
def test_token_by_token_equals_one_pass(kind):
    options = dict(NAMED[kind])
    heads = HEADS if kind in ("random", "bigbird") else 1
    longest = patterns.make(kind, TOTAL, TOTAL, block=16, causal=True, heads=heads, **options)
    fields = {"pattern_type": kind, **options}
    if "window" in fields:
        fields["local_window_size"] = fields.pop("window")
    by_name = token_by_token(lambda cache, q: cache.attend(q, fields, seqlen_total=TOTAL))
    by_pattern = token_by_token(lambda cache, q: cache.attend(q, longest))
    torch.testing.assert_close(by_name, by_pattern, atol=0, rtol=0)
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(by_name[b, :n].double(), whole(longest, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["hierarchical", "dilated_segments", "mask"])
def test_any_pattern_of_whole_sequences(kind):
    if kind == "hierarchical":
        pattern = patterns.hierarchical(TOTAL, TOTAL, ranks=4, ranks_per_node=2, local_density=0.6, global_density=0.4,
                                        inter_node_density=0.3, block=16, causal=True)  # fmt: skip
    elif kind == "dilated_segments":
        pattern = patterns.dilated_segments(TOTAL, TOTAL, segment_lengths=[64, 128], dilation_rates=[1, 2], block=16,
                                            causal=True)  # fmt: skip
    else:
        mask = torch.rand(len(LENGTHS), HEADS, TOTAL, TOTAL) < 0.4
        pattern = tessera.BlockPattern.from_token_mask(mask, block=16).with_causality(0)
    got = token_by_token(lambda cache, q: cache.attend(q, pattern))
    for b, n in enumerate(LENGTHS):
        one = pattern
        if kind == "mask":
            one = tessera.BlockPattern.from_token_mask(mask[b : b + 1], block=16).with_causality(0)
        torch.testing.assert_close(got[b, :n].double(), whole(one, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 16, 60])
def test_several_tokens_with_every_option(count):
    cache = filled()
    options = {
        "scale": 0.2,
        "window": 48,
        "softcap": 5.0,
        "alibi_slopes": torch.rand(HEADS),
        "sinks": torch.randn(HEADS),
    }
    q = torch.stack([torch.cat([torch.zeros(max(0, count - n), HEADS, DIM), Q[b, max(0, n - count) : n]])
                     for b, n in enumerate(LENGTHS)])  # fmt: skip
    out, lse = cache.attend(q, return_lse=True, **options)
    for b, n in enumerate(LENGTHS):
        rows = min(count, n)
        want = whole(patterns.causal(n, block=16), b, **options)
        torch.testing.assert_close(out[b, count - rows :].double(), want[n - rows :], atol=1e-5, rtol=0)
        assert (out[b, : count - rows] == 0).all() and (lse[b, :, : count - rows] == -torch.inf).all()


def test_layout_and_strides():
    cache, same = tessera.KVCache(3, KV_HEADS, DIM), tessera.KVCache(3, KV_HEADS, DIM)
    cache.append(K, V)
    twisted = K.transpose(2, 3).contiguous().transpose(2, 3)  # the last stride is not 1
    same.append(twisted.transpose(1, 2), V.transpose(1, 2), layout="bhsd")
    q = Q[:, -2:]
    want = cache.attend(q)
    assert torch.equal(same.attend(q.transpose(1, 2), layout="bhsd"), want.transpose(1, 2))
    assert torch.equal(cache.attend(q.transpose(2, 3).contiguous().transpose(2, 3)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    cache = tessera.KVCache(3, KV_HEADS, DIM, dtype=dtype)
    k, v, q = K.to(dtype), V.to(dtype), Q[:, -1:].to(dtype)
    cache.append(k, v)
    out = cache.attend(q)
    pattern = patterns.causal(K.shape[1], block=64).for_queries(K.shape[1] - 1, K.shape[1])
    want = tessera.block_sparse_attention(q.double(), k.double(), v.double(), pattern)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


def test_truncate_and_reorder():
    cache = filled()
    cache.truncate([100, 97, 3])
    cache.append(K[:, :5], V[:, :5], torch.tensor([5, 0, 2]))
    keys = [torch.cat([K[0, :100], K[0, :5]]), K[1, :97], torch.cat([K[2, :3], K[2, :2]])]
    before = cache.nbytes
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    assert cache.batch == 4 and cache.lengths.tolist() == [5, 105, 105, 97] and cache.nbytes <= before * 1.01
    cache.append(K[0, 7:8].expand(4, 1, KV_HEADS, DIM), V[0, 7:8].expand(4, 1, KV_HEADS, DIM), [0, 1, 0, 0])
    for b, source in enumerate((2, 0, 0, 1)):
        mine = torch.cat([keys[source], K[0, 7:8]]) if b == 1 else keys[source]
        found = cache.summaries(b)
        blocks = [mine[i : i + 16] for i in range(0, len(mine), 16)]
        torch.testing.assert_close(found.mean, torch.stack([x.mean(0) for x in blocks]), atol=1e-6, rtol=1e-6)
        assert torch.equal(found.min, torch.stack([x.amin(0) for x in blocks]))
        assert torch.equal(found.max, torch.stack([x.amax(0) for x in blocks]))


def test_memory():
    cache = tessera.KVCache(2, 2, 64, dtype=torch.bfloat16)
    for _ in range(40):
        cache.append(*[torch.zeros(2, 100, 2, 64, dtype=torch.bfloat16)] * 2)
    tokens, one = 2 * 4000, 2 * 64 * 2 * 2
    assert cache.nbytes <= 1.05 * tokens * one + 2 * 64 * one


def test_no_gradients():
    cache = tessera.KVCache(1, 1, 16)
    x = torch.randn(1, 3, 1, 16, requires_grad=True)
    cache.append(x, x)
    out = cache.attend(x)
    with pytest.raises(RuntimeError, match="KVCache.attend: got a backward pass"):
        out.sum().backward()
    with torch.inference_mode():
        assert torch.equal(cache.attend(x), out)
    assert not cache.attend(x.detach()).requires_grad


WRONG = [
    (ValueError, "block: got 65", lambda c: tessera.KVCache(1, 1, 8, block=65)),
    (ValueError, "dtype: got torch.int32", lambda c: tessera.KVCache(1, 1, 8, dtype=torch.int32)),
    (TypeError, "dtype: got str", lambda c: tessera.KVCache(1, 1, 8, dtype="float32")),
    (ValueError, "kv_heads: got 0", lambda c: tessera.KVCache(1, 0, 8)),
    (ValueError, "batch: got -1", lambda c: tessera.KVCache(-1, 1, 8)),
    (TypeError, "k: got list", lambda c: c.append([1], V)),
    (ValueError, "k: got fp32|k: .*dtype", lambda c: c.append(K.double(), V.double())),
    (ValueError, "v: ", lambda c: c.append(K, V[:, :5])),
    (ValueError, "lengths: got 2 numbers", lambda c: c.append(K, V, [1, 2])),
    (ValueError, "lengths: got 0 numbers", lambda c: c.append(K, V, [])),
    (ValueError, "lengths: got 151 for sequence 1", lambda c: c.append(K, V, [1, 151, 1])),
    (ValueError, "lengths: got torch.float32", lambda c: c.append(K, V, torch.ones(3))),
    (TypeError, "lengths: got int", lambda c: c.append(K, V, 3)),
    (ValueError, "lengths: got 98 for sequence 1", lambda c: c.truncate([1, 98, 1])),
    (ValueError, "index: got 3", lambda c: c.reorder([3])),
    (ValueError, "q: ", lambda c: c.attend(Q[:, :1, :, :8])),
    (ValueError, "q: ", lambda c: c.attend(Q[:2, :1])),
    (ValueError, "q: ", lambda c: c.attend(Q[:, :1, :3])),
    (ValueError, "sinks: ", lambda c: c.attend(Q[:, :1], sinks=torch.zeros(3))),
    (ValueError, "alibi_slopes: ", lambda c: c.attend(Q[:, :1], alibi_slopes=torch.zeros(2, HEADS))),
    (TypeError, "pattern: got int", lambda c: c.attend(Q[:, :1], 3)),
    (ValueError, "pattern_type: got 'local_windw'", lambda c: c.attend(Q[:, :1], "local_windw")),
    (ValueError, "pattern: got block_k 32", lambda c: c.attend(Q[:, :1], patterns.causal(256, block=32))),
    (ValueError, "pattern: got 128 x 128 tokens", lambda c: c.attend(Q[:, :1], patterns.causal(128, block=16))),
    (ValueError, "block_size: got 128", lambda c: c.attend(Q[:, :1], tessera.PatternConfig("causal"))),
    (ValueError, "density: got 0.1 without", lambda c: c.attend(Q[:, :1], density=0.1)),
    (ValueError, "seqlen_total: got 20", lambda c: c.attend(Q[:, :1], "strided", density=0.1, seqlen_total=20)),
    (ValueError, "layout: got 'x'", lambda c: c.attend(Q[:, :1], layout="x")),
    (TypeError, "KVCache: got a copy", lambda c: copy.deepcopy(c)),
    (TypeError, "KVCache: got a copy", lambda c: pickle.dumps(c)),
]  # fmt: skip


@pytest.mark.parametrize("error, words, call", WRONG, ids=itertools.count())
def test_wrong_calls(error, words, call):
    cache = filled()
    with pytest.raises(error, match=words):
        call(cache)
    assert cache.lengths.tolist() == list(LENGTHS)


def test_the_docstring_runs():
    assert doctest.testmod(kv_cache).attempted > 4 and doctest.testmod(kv_cache).failed == 0
