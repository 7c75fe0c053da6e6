"""The functional face against PyTorch's own attention under the corresponding mask, and what it says about mistakes."""

from __future__ import annotations

import math

import pytest
import tessera
import torch.nn.functional as F
from bounds import EPS, UNIT, assert_rounded, exact_attention
from tessera import BlockPattern, patterns

import torch


def make(dtype=torch.float32, batch=2, heads=4, kv_heads=2, seqlen_q=200, seqlen_k=200, dim=32, dim_v=None):
    return (
        torch.randn(batch, seqlen_q, heads, dim).to(dtype),
        torch.randn(batch, seqlen_k, kv_heads, dim).to(dtype),
        torch.randn(batch, seqlen_k, kv_heads, dim_v or dim).to(dtype),
    )


def plain(q, k, v, mask, dtype=torch.float64):
    """[B, S, H, D]; rows without keys give 0."""
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0).to(dtype) @ v).transpose(1, 2)


def exactly(q, k, v, mask, **options):
    """[B, S, H, D] in, bounds.Exact out, of [B, H, S, D]."""
    return exact_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, **options)


def assert_exact(exact, out, lse=None):
    """out [B, S, H, D], lse [B, H, S]"""
    assert ((out.transpose(1, 2) - exact.out).abs() <= exact.out_bound).all()
    if lse is not None:
        seen = exact.lse > -torch.inf
        assert torch.equal(seen, lse > -torch.inf) and not out.transpose(1, 2)[~seen].any()
        assert ((lse - exact.lse).abs() <= exact.lse_bound)[seen].all()


def causal_mask(seqlen_q, seqlen_k):
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)


PATTERNS = {
    "dense": lambda q, k: patterns.dense(q, k, block=(32, 64)),
    "dilated": lambda q, k: patterns.dilated_sparse(q, k, block=32, density=0.3),
    "random heads": lambda q, k: patterns.random(q, k, block=(64, 16), density=0.2, heads=4, seed=2),
    "bitmaps": lambda q, k: BlockPattern.from_token_mask(
        torch.rand(4, q, k, generator=torch.Generator().manual_seed(0)) < 0.3, block=32
    ),
    "empty rows": lambda q, k: BlockPattern.from_lists(
        [[0], [], [1, 2], []] + [[]] * (-(-q // 32) - 4), seqlen_q=q, seqlen_k=k, block=32
    ),
}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "bshd"), (torch.float32, "bhsd"), (torch.bfloat16, "bhsd"), (torch.float16, "bshd")],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_plain_attention(name, causal, dtype, layout):
    # 200 x 170 tokens: ragged ends in both directions, and rows that causality leaves without keys.
    q, k, v = make(dtype, seqlen_k=170)
    p = PATTERNS[name](200, 170)
    mask = p.to_token_mask() & (causal_mask(200, 170) if causal else torch.tensor(True))
    inputs = [t.transpose(1, 2).contiguous() for t in (q, k, v)] if layout == "bhsd" else [q, k, v]
    inputs = [t.requires_grad_() for t in inputs]
    out, lse = tessera.block_sparse_attention(*inputs, p, causal=causal, layout=layout, return_lse=True)
    grad = torch.randn_like(q)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    out = out.transpose(1, 2) if layout == "bhsd" else out
    grads = torch.autograd.grad(out, inputs, grad)
    grads = [g.transpose(1, 2) if layout == "bhsd" else g for g in grads]

    exact = exactly(q, k, v, mask)
    if dtype == torch.float32:
        assert_exact(exact, out.detach(), lse.detach())
    else:  # the scores are sums of fp32 in all dtypes
        assert_exact(exact._replace(out_bound=torch.tensor(torch.inf)), out.detach(), lse.detach())
    exact_in = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = plain(*exact_in, mask)
    exact_grads = torch.autograd.grad(exact_out, exact_in, grad.double())

    # FlashAttention's rule: at most twice the error of a plain implementation in the same dtype; and what sums over the
    # keys, or over the queries of two heads, and three products of head_dim may be off in fp32.
    plain_in = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    rounded = plain(*plain_in, mask, dtype)
    rounded_grads = torch.autograd.grad(rounded, plain_in, grad)
    lengths = [170, 170, 2 * 200, 2 * 200]
    floors = [UNIT * (n + 3 * 32) if dtype == torch.float32 else EPS[dtype] / 8 for n in lengths]
    for ours, theirs, truth, floor in zip(
        [out, *grads], [rounded, *rounded_grads], [exact_out, *exact_grads], floors, strict=True
    ):
        error, allowed = (ours - truth).abs().max(), 2 * (theirs - truth).abs().max()
        assert error <= allowed + floor * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_sdpa(dtype):
    # Both are compared with fp64: two results of fp32 differ by what machine they are made on.
    q, k, v = make(dtype, kv_heads=4)
    p = patterns.bigbird(200, block=16, density=0.4)
    mask = p.to_token_mask()
    exact = exactly(q, k, v, mask)
    ours = tessera.block_sparse_attention(q, k, v, p)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)
    if dtype == torch.float32:
        assert_exact(exact, ours), assert_exact(exact, theirs)
        assert exact.out_bound.max() < 1e-3 * exact.out.abs().max()  # a bound that sees a wrong key
    else:  # FlashAttention's rule
        ours, theirs = ((t.transpose(1, 2) - exact.out).abs().max() for t in (ours, theirs))
        assert ours <= 2 * theirs + EPS[dtype] / 8 * exact.out.abs().max()


def test_options():
    q, k, v = make(dtype=torch.float32)
    p = patterns.dense(200, block=32)
    i, j = torch.arange(200)[:, None], torch.arange(200)[None, :]
    everything = torch.ones(200, 200, dtype=torch.bool)

    def same(mask, bias=0.0, scale=None, softcap=0.0, **given):
        out, lse = tessera.block_sparse_attention(q, k, v, p, scale=scale, softcap=softcap, return_lse=True, **given)
        assert_exact(exactly(q, k, v, mask, bias=bias, scale=scale, softcap=softcap), out, lse)

    same((i - j <= 20) & (j - i <= 10), window=(20, 10))
    same((i - j).abs() <= 15, window=31)
    same((i - j <= 31) & (j <= i), window=31, causal=True)
    same(j <= i + 5, causal=True, q_offset=5)
    same(j + 7 <= i, causal=True, k_offset=7, q_offset=0)
    same((j < torch.tensor([150, 30]).view(2, 1, 1, 1)), key_lengths=torch.tensor([150, 30]))
    same(everything, scale=0.05)
    same(everything, softcap=2.0)
    bias = torch.randn(2, 1, 200, 200)
    same(everything, bias, attn_bias=bias)
    same(
        everything & (j > 5),
        torch.where(j > 5, 0.0, -torch.inf),
        attn_bias=torch.where(j > 5, 0.0, -torch.inf)[None, None],
    )
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0])
    same(everything, -slopes.view(1, 4, 1, 1) * (i - j).abs(), alibi_slopes=slopes)
    blocks = torch.randn(1, 4, p.num_blocks)
    spread = blocks.view(1, 4, 7, 7).repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :200, :200]
    same(everything, spread, block_bias=blocks)

    sinks = torch.randn(4)
    out, lse = tessera.block_sparse_attention(q, k, v, p, sinks=sinks, return_lse=True)
    exact = exactly(q, k, v, everything)
    joined = torch.logaddexp(exact.lse, sinks.double().view(1, 4, 1))
    share = (exact.lse - joined).exp().unsqueeze(-1)  # what a sink leaves to the keys
    assert_exact(exact._replace(out=exact.out * share, lse=joined, lse_bound=exact.lse_bound + UNIT), out, lse)


def test_what_is_skipped_is_not_touched():
    q, k, v = make()
    p = patterns.local_window(200, block=16, window=48, causal=True)
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    out = tessera.block_sparse_attention(*clean, p, causal=True, key_lengths=torch.tensor([180, 180]))
    grads = torch.autograd.grad(out.sum(), clean)
    k[:, 180:], v[:, 180:] = torch.nan, torch.inf
    dirty = [t.clone().requires_grad_() for t in (q, k, v)]
    out2 = tessera.block_sparse_attention(*dirty, p, causal=True, key_lengths=torch.tensor([180, 180]))
    assert torch.equal(out, out2)
    for a, b in zip(grads, torch.autograd.grad(out2.sum(), dirty)):
        assert torch.equal(a, b)


def test_dropout_follows_the_seed_and_keeps_the_mean():
    q, k, v = make(batch=1, seqlen_q=256, seqlen_k=256)
    p = patterns.dense(256)
    torch.manual_seed(1)
    a, b = (tessera.block_sparse_attention(q, k, v, p, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    c = tessera.block_sparse_attention(q, k, v, p, dropout_p=0.5)
    assert torch.equal(a, c) and not torch.equal(a, b)
    ones = torch.ones_like(v)
    sums = tessera.block_sparse_attention(torch.zeros_like(q), k, ones, p, dropout_p=0.25)
    # 1024 x 256 equal weights: the mean of 2^18 draws of variance (1 / .75 - 1) stays within 5 standard errors.
    assert sums[..., 0].mean().item() == pytest.approx(1, abs=5 * math.sqrt((1 / 0.75 - 1) / 2**18))


def test_decode_with_cache_and_pages():
    q, k, v = make(seqlen_q=2, seqlen_k=128)
    lengths = torch.tensor([100, 37])
    p = patterns.dense(2, 128, block=32)
    out, lse = tessera.decode(q, k, v, p, key_lengths=lengths, return_lse=True)
    for b, n in enumerate(lengths.tolist()):
        exact = exactly(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal_mask(2, n))
        assert_exact(exact, out[b : b + 1], lse[b : b + 1])
    table = torch.randperm(8).view(2, 4).to(torch.int32)
    pages_k, pages_v = torch.full((8, 32, 2, 32), torch.nan), torch.full((8, 32, 2, 32), torch.nan)
    pages_k[table.long().flatten()] = k.reshape(8, 32, 2, 32)
    pages_v[table.long().flatten()] = v.reshape(8, 32, 2, 32)
    paged = tessera.decode(q, pages_k, pages_v, p, key_lengths=lengths, page_table=table)
    assert torch.equal(paged, out)
    bhsd = tessera.decode(*(t.transpose(1, 2) for t in (q, k, v)), p, key_lengths=lengths, layout="bhsd")
    torch.testing.assert_close(bhsd.transpose(1, 2), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_equals_each_sequence(dtype):
    # Full blocks, an empty sequence, token bitmaps, bitmaps by head; NaN where nobody may look.
    lengths = [70, 0, 33, 50]
    cu = torch.tensor([0, 70, 70, 103, 153])
    masks = [torch.rand(33, 33) < 0.4, torch.rand(4, 50, 50) < 0.4]
    masks[0][:, 20:], masks[1][:, :, 10] = False, False
    listed = [patterns.local_window(n, block=16, window=40) for n in lengths[:2]]
    listed += [BlockPattern.from_token_mask(m, block=16) for m in masks]
    q, k, v = (torch.randn(153, h, d).to(dtype) for h, d in ((4, 32), (2, 32), (2, 16)))
    hidden = torch.zeros(153, dtype=torch.bool)
    hidden[70 + 20 : 103], hidden[103 + 10] = True, True
    k[hidden], v[hidden] = torch.nan, torch.inf
    inputs = [t.requires_grad_() for t in (q, k, v)]
    grad, grad_lse = torch.randn(153, 4, 16).to(dtype), torch.randn(4, 153)
    out, lse = tessera.varlen_attention(q, k, v, cu, cu, listed, causal=True, return_lse=True)
    seen = lse > -torch.inf
    assert seen.any() and not seen.all() and torch.isfinite(out).all()
    grads = torch.autograd.grad((out, lse), inputs, (grad, grad_lse))
    for i, p in enumerate(listed):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        alone = [t[None, rows].detach().requires_grad_() for t in inputs]
        one = tessera.block_sparse_attention(*alone, p, causal=True, return_lse=True)
        assert torch.equal(out[rows], one[0][0]) and torch.equal(lse[:, rows], one[1][0])
        for a, b in zip(grads, torch.autograd.grad(one, alone, (grad[None, rows], grad_lse[None, :, rows]))):
            assert torch.equal(a[rows], b[0])
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[1][hidden].any() and not grads[2][hidden].any()


def test_dilated_over_one_segment_is_block_sparse_attention():
    # One (w, r) of rate 1 over everything; and rate 2, where head h attends among rows h % 2, h % 2 + 2, ... What it is
    # compared with is made in fp64.
    q, k, v = (t.requires_grad_() for t in make(batch=2, seqlen_q=96, seqlen_k=96, kv_heads=4))
    bias = torch.randn(2, 4, 96, 96).masked_fill(torch.rand(2, 4, 96, 96) < 0.2, -torch.inf).requires_grad_()
    inputs, grad = (q, k, v, bias), torch.randn(2, 96, 4, 32)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    p = patterns.dense(96)
    i = torch.arange(96)
    halves = (i[:, None] % 2 == i % 2) & (i % 2 == torch.arange(4).view(4, 1, 1) % 2)
    for rate, kept in ((1, torch.ones_like(halves)), (2, halves)):
        out = tessera.dilated_attention(
            q, k, v, segment_lengths=[96], dilation_rates=[rate], causal=True, attn_bias=bias
        )
        masked = exact_inputs[3].masked_fill(~kept, -torch.inf)
        exact = tessera.block_sparse_attention(*exact_inputs[:3], p, causal=True, attn_bias=masked)
        assert_rounded(out, exact, 32, 96)
        ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(exact, exact_inputs, grad.double())
        for a, b in zip(ours, theirs):
            assert_rounded(a, b, 32, 32, 32, 96)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_dilated_equals_one_softmax_over_all_keys(layout):
    q, k, v = make(seqlen_q=100, seqlen_k=100, kv_heads=4)
    w_r = [(32, 1), (64, 2)]
    count = torch.zeros(4, 100, 100)
    for w, r in w_r:
        for h in range(4):
            i = torch.arange(100)
            kept = i % w % r == h % r
            count[h] += (i[:, None] // w == i // w) & kept[:, None] & kept
    count *= causal_mask(100, 100)
    exact = exactly(q, k, v, count > 0, bias=count.log())
    swap = (lambda t: t.transpose(1, 2)) if layout == "bhsd" else (lambda t: t)
    out = tessera.dilated_attention(
        *map(swap, (q, k, v)), segment_lengths=[32, 64], dilation_rates=[1, 2], causal=True, layout=layout
    )
    # Four softmaxes are joined by their sums: twice the roundings of one.
    assert_exact(exact._replace(out_bound=2 * exact.out_bound), swap(out))
    sparse = tessera.dilated_attention(
        q, k, v, segment_lengths=[100], dilation_rates=[2], pattern="local_window", pattern_window=16, block=16
    )
    dense = tessera.dilated_attention(q, k, v, segment_lengths=[100], dilation_rates=[2])
    assert not torch.allclose(sparse, dense)


def test_attention_weights():
    q, k, _ = make()
    p = patterns.random(200, block=(32, 16), density=0.3, heads=4)
    w = tessera.attention_weights(q, k, p, causal=True)
    assert w.block_size == (32, 16) and w.shape == (2, 4, 200, 200)
    full = torch.zeros(2, 4, 7 * 32, 13 * 16)
    for (b, h, i, j), block in zip(w.block_indices.tolist(), w.block_values):
        full[b, h, i * 32 : i * 32 + 32, j * 16 : j * 16 + 16] = block
    exact = exactly(q, k, k, p.to_token_mask() & causal_mask(200, 200))
    assert ((full[..., :200, :200] - exact.weights).abs() <= exact.weights_bound).all()


def test_weights_do_not_ask_for_gradients_of_biases():
    q, k, _ = make(seqlen_q=64, seqlen_k=64)
    biases = {"attn_bias": (1, 1, 64, 64), "block_bias": (1, 1, 4), "sinks": (4,)}
    given = {name: torch.zeros(size, requires_grad=True) for name, size in biases.items()}
    assert not tessera.attention_weights(q, k, patterns.dense(64, block=32), **given).block_values.requires_grad


def test_block_bias_counts_the_blocks_of_all_heads():
    q, k, v = make(seqlen_q=64, seqlen_k=64)
    p = patterns.random(64, block=16, density=0.5, heads=4)
    bias = torch.randn(1, 4, p.num_blocks)
    each = p.num_blocks // 4
    own = torch.zeros_like(bias)
    for h in range(4):
        own[:, h, h * each : (h + 1) * each] = bias[:, h, h * each : (h + 1) * each]
    out = tessera.block_sparse_attention(q, k, v, p, block_bias=bias)
    assert torch.equal(out, tessera.block_sparse_attention(q, k, v, p, block_bias=own))
    with pytest.raises(ValueError, match="block_bias"):
        tessera.block_sparse_attention(q, k, v, p, block_bias=bias[..., :each])


Q, K, V = make(seqlen_q=64, seqlen_k=64)
P = patterns.dense(64, block=32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": None}, TypeError, "q: got "),
        ({"q": Q.numpy()}, TypeError, "q: got ndarray"),
        ({"q": Q[0]}, ValueError, "q: got 3 dimensions"),
        ({"q": Q[:, :60]}, ValueError, "60"),
        ({"q": Q[:, :, :3]}, ValueError, "heads"),
        ({"q": Q.int()}, ValueError, "q: got dtype"),
        ({"q": Q.to("meta")}, ValueError, "k: got a tensor on cpu; allowed: a tensor on meta"),
        ({"q": Q.to_sparse()}, ValueError, "q: got a sparse tensor"),
        ({"q": Q.transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "q"),
        ({"k": K.half()}, ValueError, "k"),
        ({"k": K[..., :16]}, ValueError, "k"),
        ({"v": V[:, :50]}, ValueError, "v"),
        ({"v": [1]}, TypeError, "v: got list"),
        ({"pattern": None}, TypeError, "pattern: got NoneType"),
        ({"pattern": torch.ones(2, 2)}, TypeError, "pattern: got Tensor"),
        ({"pattern": patterns.dense(65, 64)}, ValueError, "pattern: got .*65 x 64"),
        ({"pattern": patterns.random(64, block=32, density=1.0, heads=3)}, ValueError, "heads"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"scale": "big"}, TypeError, "scale: got str"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"softcap": None}, TypeError, "softcap: got NoneType"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
        ({"dropout_p": "x"}, TypeError, "dropout_p: got str"),
        ({"window": -1}, ValueError, "window: got -1"),
        ({"window": (1, 2, 3)}, ValueError, "window: got 3"),
        ({"window": 1.5}, TypeError, "window: got float"),
        ({"key_lengths": torch.tensor([64, 65])}, ValueError, "key_lengths"),
        ({"key_lengths": torch.tensor([64])}, ValueError, "key_lengths"),
        ({"key_lengths": torch.tensor([64.0, 64.0])}, ValueError, "key_lengths"),
        ({"key_lengths": [64, 64]}, TypeError, "key_lengths: got list"),
        ({"attn_bias": torch.zeros(64)}, ValueError, "attn_bias"),
        ({"attn_bias": torch.zeros(3, 1, 64, 64)}, ValueError, "attn_bias"),
        ({"attn_bias": torch.zeros(1, 1, 64, 64, dtype=torch.bool)}, ValueError, "attn_bias: got dtype"),
        ({"block_bias": torch.zeros(1, 1, 5)}, ValueError, "block_bias"),
        ({"block_bias": torch.zeros(1, 1, 4, dtype=torch.bfloat16)}, ValueError, "block_bias"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks"),
        ({"sinks": 0.5}, TypeError, "sinks: got float"),
        ({"alibi_slopes": torch.zeros(5)}, ValueError, "alibi_slopes"),
        (
            {"alibi_slopes": torch.zeros(4, requires_grad=True)},
            ValueError,
            "alibi_slopes: got a tensor that requires grad",
        ),
        ({"q_offset": 1.5}, TypeError, "q_offset: got float"),
        ({"k_offset": "0"}, TypeError, "k_offset: got str"),
        ({"layout": "sbhd"}, ValueError, "layout: got 'sbhd'"),
    ],
)
def test_mistakes_name_the_argument(change, error, words):
    given = {"q": Q, "k": K, "v": V, "pattern": P, **change}
    with pytest.raises(error, match=words) as caught:
        tessera.block_sparse_attention(**given)
    if caught.type in (ValueError, TypeError):
        assert "\n" not in str(caught.value) and "allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=[], dilation_rates=[]),
            ValueError,
            "segment_lengths",
        ),
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=[16], dilation_rates=[1, 2]),
            ValueError,
            "dilation",
        ),
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=16, dilation_rates=[1]),
            TypeError,
            "segment_lengths",
        ),
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=[16], dilation_rates=[0]),
            ValueError,
            "dilation_rates",
        ),
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=[16], dilation_rates=[1], density=0.5),
            ValueError,
            "^density: got 0.5 without a pattern",
        ),
        *(
            (
                lambda option=option: tessera.dilated_attention(
                    Q, K, V, segment_lengths=[16], dilation_rates=[1], **option
                ),
                ValueError,
                f"^{next(iter(option))}: got .* without a pattern; allowed: ",
            )
            for option in (
                {"block": 64},
                {"pattern_window": 4},
                {"pattern_rates": [1]},
                {"global_tokens": 0},
                {"stride": 2},
                {"pattern_seed": 1},
            )
        ),
        (
            lambda: tessera.dilated_attention(Q, K, V, segment_lengths=[16], dilation_rates=[1], pattern="x"),
            ValueError,
            "x",
        ),
        (lambda: tessera.merge(Q, Q, Q, Q), ValueError, "lse"),
        (lambda: tessera.merge(Q, None, Q, Q), TypeError, "lse_a: got "),
        (lambda: tessera.decode(Q, K, V, P, page_table=torch.zeros(2, 2)), ValueError, "page_table"),
        (
            lambda: tessera.decode(Q, K, V, P, page_table=torch.full((2, 2), 7, dtype=torch.int32)),
            ValueError,
            "page_table|k",
        ),
        (lambda: tessera.decode(Q, K, V, 3), TypeError, "pattern: got int"),
        (
            lambda: tessera.varlen_attention(Q[0], K[0], V[0], torch.tensor([0, 64]), torch.tensor([0, 64]), P),
            TypeError,
            "patterns",
        ),
        (
            lambda: tessera.varlen_attention(Q[0], K[0], V[0], torch.tensor([0, 63]), torch.tensor([0, 64]), [P]),
            ValueError,
            "cu_seqlens_q|patterns",
        ),
        (lambda: tessera.attention_weights(Q, K, None), TypeError, "pattern: got NoneType"),
    ],
)
def test_mistakes_elsewhere(call, error, words):
    with pytest.raises(error, match=words):
        call()
