"""Causality and position belong to the pattern: calls, modules, analysis and files that take it are causal to the token
without being told, a call that says otherwise is an error, and every token sees the same keys in the whole, in a chunk
and alone. Truth: dense softmax in fp64 over the pairs of `to_token_mask`, or the whole call's own rows."""

import pytest
import tessera
from tessera import BlockPattern, patterns

import torch

S, H, D = 200, 2, 16
OPTIONS = {
    "dense": {},
    "causal": {},
    "local_window": {"density": 0.4},
    "dilated_sparse": {"density": 0.4},
    "global_local": {"global_tokens": 16, "density": 0.4},
    "strided": {"density": 0.5},
    "random": {"density": 0.4, "heads": H},
    "bigbird": {"density": 0.6, "heads": H},
    "dilated_segments": {"segment_lengths": [64, 128], "dilation_rates": [1, 2], "heads": H},
    "hierarchical": {"density": 0.4, "ranks": 3, "ranks_per_node": 2},
}


def qkv(seqlen_q=S, seqlen_k=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, n, H, D, generator=generator) for n in (seqlen_q, seqlen_k, seqlen_k))


def truth(q, k, v, mask):
    """[B, S, H, D] in fp64 over bool [1 or B, 1 or H, Sq, Sk]."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT / D**0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)


def close(got, want):
    # 200 products and sums in fp32 of numbers of size one.
    torch.testing.assert_close(got.double(), want.double(), atol=200 * 2**-24, rtol=0)


@pytest.mark.parametrize("name", patterns.NAMES)
def test_said_once_is_causal_to_the_token(name):
    p = getattr(patterns, name)(S, block=(16, 32), **OPTIONS[name], **({} if name == "causal" else {"causal": True}))
    assert p.causal and not (p.to_token_mask() & ~torch.ones(S, S).tril().bool()).any()
    q, k, v = qkv()
    out = tessera.block_sparse_attention(q, k, v, p)
    close(out, truth(q, k, v, p.to_token_mask()))
    assert torch.equal(out, tessera.block_sparse_attention(q, k, v, p, causal=True))
    later = v.clone()
    later[:, 100:] = float("nan")
    assert torch.equal(out[:, :100], tessera.block_sparse_attention(q, k, later, p)[:, :100])
    with pytest.raises(ValueError, match="causal: got false"):
        tessera.block_sparse_attention(q, k, v, p, causal=False)
    with pytest.raises(ValueError, match="causal: got false"):
        p.statistics(causal=False)


def test_gradients_weights_varlen_and_modules_follow_the_pattern():
    p = patterns.dilated_sparse(S, block=16, density=0.4, causal=True)
    q, k, v = (t.requires_grad_() for t in qkv())
    told = torch.autograd.grad(tessera.block_sparse_attention(q, k, v, p, causal=True).sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(tessera.block_sparse_attention(q, k, v, p).sum(), (q, k, v)), told):
        assert torch.equal(a, b)
    q, k, v = (t.detach() for t in (q, k, v))
    want = tessera.block_sparse_attention(q, k, v, p)
    weights = tessera.attention_weights(q, k, p)
    assert torch.equal(weights.block_values, tessera.attention_weights(q, k, p, causal=True).block_values)
    cu = torch.tensor([0, S])
    assert torch.equal(tessera.varlen_attention(q[0], k[0], v[0], cu, cu, [p])[None], want)
    assert torch.equal(tessera.BlockSparseAttention(p)(q, k, v), want)
    assert torch.equal(
        tessera.BlockSparseAttention("dilated_sparse", density=0.4, block=16, causal=True)(q, k, v), want
    )
    module = tessera.MultiheadAttention(H * D, H, pattern=p, batch_first=True).eval()
    x = torch.randn(1, S, H * D)
    later = x.clone()
    later[:, 100:] += 1
    with torch.no_grad():
        assert torch.equal(module(x, x, x)[0][:, :100], module(later, later, later)[0][:, :100])
        dense = module(x, x, x, need_weights=True)[1]
    assert not dense.triu(1).any()


def test_quality_is_of_causal_attention():
    q, k, v = qkv()
    p = patterns.local_window(S, block=16, density=0.3, causal=True)
    a = tessera.analysis.quality(q, k, v, p)
    assert a == tessera.analysis.quality(q, k, v, p, causal=True)
    assert a.coverage <= a.oracle_coverage <= a.bound_coverage <= 1
    assert tessera.analysis.quality(q, k, v, patterns.causal(S, block=16)).coverage == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "causal"), [(n, c) for n in patterns.NAMES for c in (False, True) if c or n != "causal"]
)
def test_a_token_sees_the_same_in_the_whole_in_a_chunk_and_alone(name, causal):
    options = {**OPTIONS[name], **({} if name == "causal" else {"causal": causal})}
    make = getattr(patterns, name)
    whole = make(S, block=(32, 16), **options)
    q, k, v = qkv()
    want = tessera.block_sparse_attention(q, k, v, whole)
    for begin, end in ((0, 1), (0, 37), (37, 64), (64, 65), (50, 180), (199, 200)):
        rows = whole.for_queries(begin, end)
        keys = end if causal else S
        assert rows.shape == (end - begin, keys)
        alone = make(end - begin, block=(32, 16), q_offset=begin, seqlen_total=S, **options)
        assert alone == rows and hash(alone) == hash(rows)
        part = tessera.block_sparse_attention(q[:, begin:end], k[:, :keys], v[:, :keys], rows)
        close(part, want[:, begin:end])


def test_budgets():
    even = patterns.local_window(4096, block=64, density=0.15, causal=True)
    assert even.num_blocks == 310 and even.indptr.diff().max() == 5
    assert patterns.local_window(4096, block=64, density=0.1, causal=True, budget="proportional").num_blocks == 214
    with pytest.raises(ValueError, match="budget"):
        patterns.local_window(64, density=0.1, budget="fair")
    assert tessera.PatternConfig("local_window", 0.15, 64).pattern(4096, causal=True) == even


def test_a_pattern_for_the_end_of_a_cache_is_refused_at_other_lengths():
    q, k, v = qkv(1, 256)
    lengths = torch.tensor([100])
    for p in (
        patterns.local_window(1, 256, block=16, window=64, causal=True),
        patterns.dilated_sparse(1, 256, block=16, density=0.2),
    ):
        with pytest.raises(ValueError, match="key_lengths"):
            tessera.decode(q, k, v, p, key_lengths=lengths)
        tessera.decode(q, k, v, p, key_lengths=torch.tensor([256]))
    want = truth(q, k[:, :100], v[:, :100], torch.ones(1, 100).bool())
    for p in (patterns.dense(1, 256, block=16), patterns.causal(1, 256, block=16)):
        close(tessera.decode(q, k, v, p, key_lengths=lengths), want)
    listed = BlockPattern.from_lists([[0, 3]], seqlen_q=1, seqlen_k=256, block=16)  # a caller's own choice of blocks
    mask = torch.zeros(1, 100).bool()
    mask[:, :16] = mask[:, 48:64] = True
    close(tessera.decode(q, k, v, listed, key_lengths=lengths), truth(q, k[:, :100], v[:, :100], mask))


def test_positions_that_contradict_the_pattern():
    p = patterns.local_window(64, 128, block=16, window=32, causal=True)
    q, k, v = qkv(64, 128)
    assert torch.equal(
        tessera.block_sparse_attention(q, k, v, p), tessera.block_sparse_attention(q, k, v, p, q_offset=74, k_offset=10)
    )
    with pytest.raises(ValueError, match="q_offset"):
        tessera.block_sparse_attention(q, k, v, p, q_offset=0)


def test_combinators_and_marks():
    p = patterns.dilated_sparse(S, block=(16, 32), density=0.4, causal=True)
    r = patterns.random(S, block=(16, 32), density=0.5)
    a, b = p.to_token_mask(), r.to_token_mask()
    lower = torch.ones(S, S).tril().bool()
    assert torch.equal((p & r).to_token_mask(), a & b) and (p & r).causal
    assert torch.equal((p - r).to_token_mask(), a & ~b)
    assert torch.equal((~p).to_token_mask(), lower & ~a) and torch.equal((~r).to_token_mask(), ~b)
    assert torch.equal(r.with_causality().to_token_mask(), b & lower)
    assert torch.equal(p.without_causality().to_token_mask(), a) and not p.without_causality().causal
    assert torch.equal(p.transpose().to_token_mask(), a.mT)
    with pytest.raises(ValueError, match="causal"):
        p | r
    mask = torch.rand(13, 7) < 0.5
    made = BlockPattern.from_mask(mask, seqlen_q=S, seqlen_k=S, block=(16, 32), causal=True)
    assert made.causal and torch.equal(made.to_mask()[0, 0], mask)


def test_files_keep_causality_and_position(tmp_path):
    p = patterns.dilated_sparse(S, block=(16, 32), density=0.4, causal=True).for_queries(37, 99)
    p.save(tmp_path / "p.json")
    back = BlockPattern.load(tmp_path / "p.json")
    assert back == p and (back.causal, back.q_offset, back.q_skip) == (True, 37, 5)
    assert BlockPattern.from_json(p.to_json()) == p
    with pytest.raises(ValueError, match="json"):
        BlockPattern.from_json("{")
    import copy
    import pickle

    assert pickle.loads(pickle.dumps(p)) == p and copy.deepcopy(p) is p
    assert "causal" in repr(p) and "position 37" not in repr(p.for_queries(0, 0))


def test_compiled():
    p = patterns.dilated_sparse(S, block=16, density=0.4, causal=True)
    q, k, v = qkv()

    def attend(q, k, v):
        return tessera.block_sparse_attention(q, k, v, p)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
