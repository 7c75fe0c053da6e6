"""MultiheadAttention: torch's module over a pattern. Every comparison is with torch.nn.MultiheadAttention under the
mask that the pattern means, in fp64 unless the test is about other dtypes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tessera
from multihead_cases import BLOCK, DOUBLE, E, H, L, N, draw, pair, same, sparse, torch_mask
from tessera.nn import MultiheadAttention

import torch
from torch import nn


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 10, "vdim": 14},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
    ],
    ids=str,
)
def test_equals_torch_under_the_mask(options, need_weights, heads):
    seqlen_k = 70
    pattern = sparse(L, seqlen_k, heads)
    ours, theirs = pair(pattern, **options)
    x = draw(options.get("batch_first", False), seqlen_k, options.get("kdim", E), options.get("vdim", E))
    average = heads == 1
    kwargs = {"need_weights": need_weights, "average_attn_weights": average}
    same(ours, theirs, x, x, kwargs, {**kwargs, "attn_mask": torch_mask(pattern)}, need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("shape", ["2d", "3d"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("padding", [None, "end", "holes", "float"])
def test_masks(kind, shape, padding, need_weights):
    pattern = sparse(heads=H)
    ours, theirs = pair(pattern)
    kept = torch_mask(pattern)
    mask = torch.rand((L, L) if shape == "2d" else (N * H, L, L)) < 0.3
    # Column 0 of the diagonal block stays, so that no row is empty: torch gives NaN there.
    diagonal = (torch.arange(L) // BLOCK) * BLOCK
    mask[..., torch.arange(L), diagonal] = False
    kpm = None
    if padding is not None:
        kpm = torch.zeros(N, L, dtype=torch.bool)
        kpm[1, 97:] = True
        if padding != "end":
            kpm[0, 5:9] = kpm[1, 1] = True
    additive = torch.randn(mask.shape, **DOUBLE).masked_fill(mask, float("-inf"))
    both = additive.masked_fill(kept, float("-inf")) if kind == "float" else mask | kept
    kpm_float = None if kpm is None else torch.zeros(N, L, **DOUBLE).masked_fill(kpm, float("-inf"))
    if padding == "float":
        kpm_float[0, :3] = 0.5
        kpm = kpm_float
    x = draw()
    kwargs = {"need_weights": need_weights, "key_padding_mask": kpm}
    ours_mask = additive if kind == "float" else mask
    # torch wants both masks of one type
    theirs_kwargs = {**kwargs, "attn_mask": both}
    if kpm is not None and kpm.dtype != both.dtype:
        theirs_kwargs["key_padding_mask"] = kpm_float
        if kind == "bool":
            theirs_kwargs["attn_mask"] = torch.zeros(both.shape, **DOUBLE).masked_fill(both, float("-inf"))
    same(ours, theirs, x, x, {**kwargs, "attn_mask": ours_mask}, theirs_kwargs, need_weights)


def test_attn_mask_gets_its_gradient():
    ours, theirs = pair(sparse())
    x = draw()
    kept = torch_mask(sparse())
    a = torch.randn(L, L, **DOUBLE, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ours(*x, attn_mask=a, need_weights=False)[0].square().sum().backward()
    theirs(*x, attn_mask=b.masked_fill(kept, float("-inf")), need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("with_mask", [False, True])
def test_is_causal(with_mask):
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    pattern = sparse()
    ours, theirs = pair(pattern)
    x = draw()
    for need_weights in (False, True):
        same(
            ours, theirs, x, x,
            {"is_causal": True, "need_weights": need_weights, "attn_mask": causal if with_mask else None},
            {"attn_mask": causal | torch_mask(pattern), "need_weights": need_weights}, need_weights,
        )  # fmt: skip


def test_rows_without_keys_are_zero():
    ours, _ = pair(sparse(), bias=False)
    x = draw()
    out, w = ours(
        *x, need_weights=True, attn_mask=torch.ones(L, L, dtype=torch.bool).index_fill(0, torch.arange(1, L), False)
    )
    assert not out[0].any() and not w[:, 0].any() and out[1:].any()
    for grad in torch.autograd.grad(out.sum() + w.square().sum(), [*ours.parameters(), *x]):
        assert grad.isfinite().all()


def test_unbatched_and_same_tensor():
    pattern = sparse(heads=H)
    ours, theirs = pair(pattern)
    x = torch.randn(L, E, **DOUBLE, requires_grad=True)
    mask = torch_mask(pattern, batch=1)
    out, w = ours(x, x, x, need_weights=True)
    expected, expected_w = theirs(x, x, x, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(w, expected_w)
    padding = torch.arange(L) >= 60
    got = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    wide = torch.zeros(1, L, dtype=torch.bool) | padding
    batched = ours(x[:, None], x[:, None], x[:, None], key_padding_mask=wide, need_weights=False)[0]
    torch.testing.assert_close(got, batched.squeeze(1))


@pytest.mark.parametrize("extra", [False, True])
def test_weights_in_blocks(extra):
    pattern = sparse(L, 70, heads=H)
    ours, _ = pair(pattern, add_bias_kv=extra)
    x = draw(seqlen_k=70)
    padding = torch.zeros(N, 70, dtype=torch.bool)
    padding[0, 50:] = True
    with torch.no_grad():
        out, blocks = ours(*x, need_weights="blocks", key_padding_mask=padding)
        expected, dense = ours(*x, need_weights=True, average_attn_weights=False, key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    assert blocks["block_size"] == (BLOCK, BLOCK) and blocks["shape"] == (N, H, L, 70)
    assert blocks["block_indices"].shape == (N * pattern.num_blocks, 4)
    full = torch.zeros(N, H, 128, 96)
    for (b, h, i, j), values in zip(blocks["block_indices"].tolist(), blocks["block_values"]):
        full[b, h, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = values
    torch.testing.assert_close(full[:, :, :L, :70].double(), dense[..., :70], atol=1e-6, rtol=1e-5)


def test_sources_of_patterns():
    x = draw()
    seen = []

    def make(seqlen_q, seqlen_k):
        seen.append((seqlen_q, seqlen_k))
        return sparse(seqlen_q, seqlen_k)

    a, _ = pair(make)
    expected = MultiheadAttention(E, H, pattern=sparse(), **DOUBLE)
    expected.load_state_dict(a.state_dict())
    torch.testing.assert_close(a(*x)[0], expected(*x)[0])
    assert seen == [(L, L)]
    config = {"pattern_type": "local_window", "local_window_size": 20, "block_size": 32}
    named = MultiheadAttention(E, H, pattern=config, **DOUBLE)
    named.load_state_dict(a.state_dict())
    expected.pattern = tessera.patterns.local_window(L, window=20, block=32)
    torch.testing.assert_close(named(*x)[0], expected(*x)[0])
    named.pattern = "dense"
    expected.pattern = None
    torch.testing.assert_close(named(*x)[0], expected(*x)[0])


def test_bad_patterns():
    with pytest.raises(TypeError, match="pattern"):
        MultiheadAttention(E, H, pattern=3)
    with pytest.raises(ValueError, match="pattern_type"):
        MultiheadAttention(E, H, pattern="nonsense")
    with pytest.raises(ValueError, match="pattern.*100 x 70"):
        pair(sparse())[0](*draw(seqlen_k=70))
    with pytest.raises(TypeError, match="callable"):
        pair(lambda q, k: None)[0](*draw())
    with pytest.raises(ValueError, match="need_weights"):
        pair(sparse())[0](*draw(), need_weights="all")
    with pytest.raises(TypeError, match="query"):
        pair(sparse())[0](None, None, None)


# ---- as a module


@pytest.mark.parametrize("options", [{}, {"kdim": 10}, {"add_bias_kv": True}, {"bias": False}], ids=str)
def test_initialisation_and_state_are_torchs(options):
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H, pattern="dilated_sparse", **options)
    assert isinstance(ours, nn.MultiheadAttention)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    theirs.load_state_dict(a)
    ours.load_state_dict(b)


def test_copy_and_pickle():
    ours, _ = pair(sparse())
    x = draw()
    expected = ours(*x)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert other.pattern == ours.pattern and other.in_proj_weight is not ours.in_proj_weight
        assert torch.equal(other(*x)[0], expected)


def test_from_torch_shares_parameters():
    theirs = nn.MultiheadAttention(E, H).eval()
    ours = MultiheadAttention.from_torch(theirs, pattern=sparse())
    assert ours.in_proj_weight is theirs.in_proj_weight and not ours.training
    assert theirs._qkv_same_embed_dim and not ours._qkv_same_embed_dim
    with pytest.raises(TypeError, match="module"):
        MultiheadAttention.from_torch(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype):
    """Error against fp64 at most twice torch's in the same dtype (and its epsilon)."""
    pattern = sparse()
    ours, theirs = pair(pattern)
    x = tuple(t.detach() for t in draw())
    expected = theirs(*x, attn_mask=torch_mask(pattern), need_weights=False)[0]
    low = tuple(t.to(dtype) for t in x)
    plain = theirs.to(dtype)(*low, attn_mask=torch_mask(pattern), need_weights=False)[0]
    got, weights = ours.to(dtype)(*low, need_weights=True)
    assert got.dtype == weights.dtype == dtype
    bound = 2 * (plain.double() - expected).abs().max() + torch.finfo(dtype).eps
    assert (got.double() - expected).abs().max() <= bound


def test_autocast():
    ours = MultiheadAttention(E, H, pattern=sparse())
    x = tuple(t.detach().float() for t in draw())
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ours(*x, need_weights=False)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ours(*x, need_weights=False)[0], atol=0.02, rtol=0.02)


def test_dropout_in_training_only():
    ours = MultiheadAttention(E, H, pattern=sparse(), dropout=0.5)
    x = [t.detach().float() for t in draw()]
    still = ours.eval()(*x, need_weights=False)[0]
    torch.manual_seed(1)
    a = ours.train()(*x, need_weights=False)[0]
    torch.manual_seed(1)
    b = ours(*x, need_weights=False)[0]
    c = ours(*x, need_weights=False)[0]
    assert torch.equal(a, b) and not torch.allclose(a, c) and not torch.allclose(a, still)
    mean = torch.stack([ours(*x, need_weights=False)[0].detach() for _ in range(60)]).mean(0)
    assert (mean - still).abs().mean() < 0.3 * (a - still).abs().mean()


@pytest.mark.parametrize("pattern", ["dense", "blocks", "dilated_sparse"])
def test_compiles_whole(pattern):
    module = MultiheadAttention(E, H, batch_first=True)
    module.pattern = {"dense": None, "blocks": sparse(90, 90), "dilated_sparse": "dilated_sparse"}[pattern]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=pattern == "dense")
    for length in [90] if pattern == "blocks" else [90, 40]:
        x = torch.randn(N, length, E)
        padding = torch.zeros(N, length, dtype=torch.bool)
        padding[1, 30:] = padding[0, 3] = True
        for options in ({}, {"key_padding_mask": padding}):
            expected = module(x, x, x, need_weights=False, **options)[0]
            out = compiled(x, x, x, need_weights=False, **options)[0]
            torch.testing.assert_close(out, expected)
            a = torch.autograd.grad(out.square().sum(), module.in_proj_weight)[0]
            b = torch.autograd.grad(expected.square().sum(), module.in_proj_weight)[0]
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_vmap():
    ours = MultiheadAttention(E, H, pattern=sparse())
    x = torch.randn(3, L, N, E)
    padding = torch.zeros(3, N, L, dtype=torch.bool)
    padding[1, 0, 60:] = padding[2, 1, 3] = True

    def one(y, mask):
        return ours(y, y, y, key_padding_mask=mask, need_weights=False)[0]

    with torch.no_grad():
        expected = torch.stack([one(y, mask) for y, mask in zip(x, padding)])
        torch.testing.assert_close(torch.vmap(one)(x, padding), expected)


# ---- BlockSparseAttention


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_block_sparse_attention(layout):
    module = tessera.BlockSparseAttention("local_window", causal=True, layout=layout, dropout=0.5).eval()
    module.pattern = sparse()
    assert not list(module.parameters())
    shape = (N, L, H, 16) if layout == "bshd" else (N, H, L, 16)
    q, k, v = (torch.randn(shape) for _ in range(3))
    out, lse, weights = module(q, k, v, return_lse=True, need_weights=True)
    expected, expected_lse = tessera.block_sparse_attention(
        q, k, v, sparse(), causal=True, layout=layout, return_lse=True
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert weights.shape == (N, H, L, L)
    assert not torch.equal(module.train()(q, k, v), expected)
    with pytest.raises(ValueError, match="layout"):
        tessera.BlockSparseAttention(layout="sbhd")
    with pytest.raises(ValueError, match="dropout"):
        tessera.BlockSparseAttention(dropout=1.0)
    with pytest.raises(ValueError, match="q: got 3"):
        module(q[0], k, v)
