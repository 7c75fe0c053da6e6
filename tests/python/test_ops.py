"""torch.ops.tessera: opcheck of each operator (schema, fake tensors, autograd, AOT dispatch), and gradcheck
of each gradient in fp64, where the core runs its plain reference."""

from __future__ import annotations

import pytest
import tessera
from tessera import BlockPattern, patterns
from torch.autograd import gradcheck
from torch.library import opcheck

import torch

ops = torch.ops.tessera
S, BLOCK = 40, 16


def qkv(dtype=torch.float32, heads=2, kv_heads=1, seqlen_q=S, seqlen_k=S, dim=8, grad=True, batch=1, layout="bshd"):
    def make(s, h):
        t = torch.randn(batch, s, h, dim, dtype=dtype)
        if layout == "bhsd":
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        return t.requires_grad_(grad)

    return make(seqlen_q, heads), make(seqlen_k, kv_heads), make(seqlen_k, kv_heads)


PATTERN = patterns.random(S, block=BLOCK, density=0.6)
PARTIAL = BlockPattern.from_token_mask(torch.rand(S, S, generator=torch.Generator().manual_seed(1)) < 0.5, block=BLOCK)


def options(**given):
    """Options by position, as in the schemas."""
    names = [a.name for a in ops.forward.default._schema.arguments][8:]
    defaults = [a.default_value for a in ops.forward.default._schema.arguments][8:]
    assert set(given) <= set(names)
    return [given.get(n, d) for n, d in zip(names, defaults)]


FORWARD_CASES = {
    "plain": (PATTERN, {}),
    "bitmaps": (PARTIAL, {"causal": True}),
    "window": (PATTERN, {"window_left": 9, "window_right": 3, "q_offset": 2, "k_offset": 1, "scale": 0.3}),
    "lengths": (PATTERN, {"key_lengths": torch.tensor([25]), "softcap": 5.0, "alibi_slopes": torch.rand(2)}),
    "biases": (
        PATTERN,
        {
            "block_bias": torch.randn(1, 2, PATTERN.num_blocks, requires_grad=True),
            "attn_bias": torch.randn(1, 1, S, S, requires_grad=True),
            "sinks": torch.randn(2, requires_grad=True),
        },
    ),
    "dropout": (PATTERN, {"dropout_p": 0.3, "rng": torch.tensor([3, 4])}),
}


@pytest.mark.parametrize(("case", "layout"), [("plain", "bhsd"), *((case, "bshd") for case in FORWARD_CASES)])
def test_opcheck_forward(case, layout):
    pattern, given = FORWARD_CASES[case]
    opcheck(ops.forward.default, (*qkv(layout=layout), *pattern.op_args, *options(**given)))


@pytest.mark.parametrize("wanted", [[True] * 6, [True, False, True, False, False, True]])
def test_opcheck_backward(wanted):
    q, k, v = qkv(grad=False, layout="bhsd")
    given = {name: t.detach() for name, t in FORWARD_CASES["biases"][1].items()}
    args = (*PATTERN.op_args, *options(**given))
    out, lse = ops.forward.default(q, k, v, *args)
    opcheck(ops.backward.default, (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, wanted, *args))


def test_opcheck_decode_weights_merge():
    q, k, v = qkv(grad=False, seqlen_q=3)
    p = patterns.dense(3, S, block=BLOCK)
    opcheck(ops.decode.default, (q, k, v, *p.op_args, None, *options(causal=True)))
    pages = torch.randn(5, BLOCK, 1, 8)
    opcheck(ops.decode.default, (q, pages, pages, *p.op_args, torch.tensor([[4, 0, 2]], dtype=torch.int32)))
    opcheck(ops.weights.default, (*qkv(grad=False)[:2], *PATTERN.op_args, *options(causal=True)))
    a, b = ([torch.randn(1, S, 2, 8, requires_grad=True), torch.randn(1, 2, S, requires_grad=True)] for _ in range(2))
    opcheck(ops.merge.default, (*a, *b))


def varlen_case(dtype=torch.float32):
    """Three sequences, one of them empty, the last with bitmaps."""
    q, k, v = (torch.randn(50, h, 8, dtype=dtype, requires_grad=True) for h in (2, 1, 1))
    cu = torch.tensor([0, 20, 20, 50], dtype=torch.int32)
    listed = [
        patterns.dense(20, block=BLOCK),
        patterns.dense(0, block=BLOCK),
        BlockPattern.from_token_mask(torch.rand(30, 30, generator=torch.Generator().manual_seed(2)) < 0.6, block=BLOCK),
    ]
    return q, k, v, cu, listed


@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, True]])
def test_opcheck_varlen(wanted):
    q, k, v, cu, listed = varlen_case()
    rest = (cu, cu, *tessera._ops.pattern_lists(listed))
    sinks = torch.randn(2, requires_grad=True)
    tail = (None, True, None, None, 0.0, None, sinks, 0.0, None)
    opcheck(ops.varlen_forward.default, (q, k, v, *rest, *tail))
    out, lse = (t.detach() for t in ops.varlen_forward.default(q, k, v, *rest, *tail))
    q, k, v = (t.detach() for t in (q, k, v))
    tail = (*tail[:6], sinks.detach(), *tail[7:])
    opcheck(ops.varlen_backward.default, (torch.randn_like(out), None, q, k, v, out, lse, wanted, *rest, *tail))


@pytest.mark.parametrize("wanted", [[True] * 4, [True, False, False, True], [False, False, True, False]])
def test_opcheck_dilated(wanted):
    q, k, v = qkv(layout="bhsd")
    dilation = ([16, 32], [1, 2], None, None, 16, "even", None, [], None, None, 0)
    bias = torch.randn(1, 1, S, S, requires_grad=True)
    opcheck(ops.dilated_forward.default, (q, k, v, *dilation, *options(causal=True, attn_bias=bias)))
    q, k, v, bias = (t.detach() for t in (q, k, v, bias))
    tail = (*dilation, *options(causal=True, attn_bias=bias))
    out, lse = ops.dilated_forward.default(q, k, v, *tail)
    opcheck(ops.dilated_backward.default, (out, None, q, k, v, out, lse, wanted, *tail))


@pytest.mark.parametrize("op", ["varlen", "dilated"])
def test_unwanted_gradients_are_empty_and_the_others_the_same(op):
    if op == "varlen":
        q, k, v, cu, listed = varlen_case()
        tail = (cu, cu, *tessera._ops.pattern_lists(listed), None, True, None, None, 0.0, None, torch.randn(2))
        forward, backward = ops.varlen_forward.default, ops.varlen_backward.default
    else:
        q, k, v = qkv()
        dilation = ([16, 32], [1, 2], None, None, 16, "even", None, [], None, None, 0)
        tail = (*dilation, *options(attn_bias=torch.randn(1, 2, S, S)))
        forward, backward = ops.dilated_forward.default, ops.dilated_backward.default
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = forward(q, k, v, *tail)
    given = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    full = backward(*given, [True] * 4, *tail)
    assert all(t.numel() for t in full)
    for case in range(16):
        wanted = [bool(case >> i & 1) for i in range(4)]
        for got, want, all_of_it in zip(backward(*given, wanted, *tail), wanted, full):
            assert torch.equal(got, all_of_it) if want else got.numel() == 0


GRADIENT_CASES = {
    "plain": {},
    "causal": {"causal": True, "scale": 0.7},
    "window": {"window": (7, 5), "q_offset": 3, "k_offset": 1},
    "lengths": {"key_lengths": torch.tensor([23])},
    "softcap": {"softcap": 1.5, "alibi_slopes": torch.tensor([0.1, 0.2])},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("pattern", [PATTERN, PARTIAL], ids=["full", "bitmaps"])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_of_q_k_v_through_out_and_lse(case, pattern):
    def f(q, k, v):
        torch.manual_seed(5)  # the same dropout in each evaluation
        out, lse = tessera.block_sparse_attention(q, k, v, pattern, return_lse=True, **GRADIENT_CASES[case])
        return out, lse.masked_fill(lse == -torch.inf, 0)  # rows that see no key: inf - inf is no difference

    assert gradcheck(f, qkv(torch.float64), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 2, S, S), (1, 1, 1, S), (1, 2, S, 1), (1, 1, 1, 1)])
def test_gradient_of_attn_bias(shape):
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv(torch.float64)
    assert gradcheck(
        lambda q, bias: tessera.block_sparse_attention(q, k, v, PATTERN, attn_bias=bias, return_lse=True),
        (q, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("name", ["block_bias", "sinks"])
def test_gradients_of_fp32_numbers(name):
    # These are fp32 whatever q is. A directional difference with a step that fp32 resolves.
    q, k, v = qkv(torch.float64)
    t = torch.randn((1, 2, PATTERN.num_blocks) if name == "block_bias" else (2,), requires_grad=True)
    weight, weight_lse = torch.randn(1, S, 2, 8, dtype=torch.float64), torch.randn(1, 2, S, dtype=torch.float64)

    def f(t):
        out, lse = tessera.block_sparse_attention(q, k, v, PATTERN, return_lse=True, **{name: t})
        return (out * weight).sum() + (lse * weight_lse).sum()

    (gradient,) = torch.autograd.grad(f(t), t)
    direction, step = torch.randn_like(t), 2.0**-8
    with torch.no_grad():
        up, down = t + step * direction, t - step * direction
        difference = f(up) - f(down)
        expected = ((up - down).double() * gradient.double()).sum()
    assert difference.item() == pytest.approx(expected.item(), rel=2e-3, abs=1e-5)


def test_gradients_dilated_varlen_merge():
    q, k, v = qkv(torch.float64)

    def dilated(q, k, v, attn_bias=None):
        return tessera.dilated_attention(
            q, k, v, segment_lengths=[16, 32], dilation_rates=[1, 2], causal=True, attn_bias=attn_bias, return_lse=True
        )

    assert gradcheck(dilated, (q, k, v), fast_mode=True)
    for shape in ((1, 2, S, S), (1, 1, S, S), (1, 2, 1, S), (1, 1, 1, 1)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda q, bias: dilated(q, k, v, bias), (q, bias), fast_mode=True)

    def merged(q, k, v):
        a = tessera.block_sparse_attention(q, k[:, :16], v[:, :16], patterns.dense(S, 16, block=16), return_lse=True)
        b = tessera.block_sparse_attention(q, k[:, 16:], v[:, 16:], patterns.dense(S, 24, block=16), return_lse=True)
        return tessera.merge(*a, *b)

    assert gradcheck(merged, (q, k, v), fast_mode=True)
    whole = tessera.block_sparse_attention(q, k, v, patterns.dense(S, block=16), return_lse=True)
    for a, b in zip(merged(q, k, v), whole):
        torch.testing.assert_close(a, b)

    q, k, v, cu, listed = varlen_case(torch.float64)

    def varlen(q, k, v):
        out, lse = tessera.varlen_attention(q, k, v, cu, cu, listed, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(varlen, (q, k, v), fast_mode=True)


def test_merge_of_nothing():
    out, lse = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 4)
    none = torch.full_like(lse, -torch.inf, requires_grad=True)
    hidden = torch.full_like(out, torch.nan, requires_grad=True)
    out.requires_grad_(), lse.requires_grad_()
    merged, merged_lse = tessera.merge(out, lse, hidden, none)
    torch.testing.assert_close(merged, out)
    (merged.sum() + merged_lse.sum()).backward()
    torch.testing.assert_close(out.grad, torch.ones_like(out))
    torch.testing.assert_close(lse.grad, torch.ones_like(lse))
    assert not hidden.grad.any() and not none.grad.any()
    zero, minus = tessera.merge(hidden.detach(), none.detach(), hidden.detach(), none.detach())
    assert not zero.any() and (minus == -torch.inf).all()


def test_only_wanted_gradients():
    q, k, v = qkv()
    k.requires_grad_(False)
    out = tessera.block_sparse_attention(q, k, v, PATTERN)
    dq, dv = torch.autograd.grad(out.sum(), (q, v))
    q2, k2, v2 = (t.detach().clone().requires_grad_() for t in (q, k, v))
    reference = torch.autograd.grad(tessera.block_sparse_attention(q2, k2, v2, PATTERN).sum(), (q2, v2))
    assert torch.equal(dq, reference[0]) and torch.equal(dv, reference[1])
    with pytest.raises(RuntimeError, match="not have been used|does not require grad"):
        torch.autograd.grad(tessera.block_sparse_attention(q, k, v, PATTERN).sum(), k)


def test_no_second_derivative_and_no_derivative_of_weights():
    q, k, v = qkv()
    out = tessera.block_sparse_attention(q, k, v, PATTERN).square().sum()
    (dq,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="backward: got a second derivative"):
        dq.sum().backward()
    with pytest.raises(RuntimeError, match="weights: got a backward pass"):
        tessera.attention_weights(q, k, PATTERN).block_values.sum().backward()
    with pytest.raises(RuntimeError, match="decode: got a backward pass"):
        tessera.decode(q, k, v, PATTERN).sum().backward()
    with pytest.raises(ValueError, match="q: got a tangent"):
        torch.func.jvp(lambda q: tessera.block_sparse_attention(q, k, v, PATTERN), (q,), (q,))


def test_freed_graph_and_changed_inputs_are_noticed():
    q, k, v = qkv()
    out = tessera.block_sparse_attention(q, k, v, PATTERN).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
    q2 = q.detach().clone().requires_grad_()
    x = q2 * 1
    out = tessera.block_sparse_attention(x, k, v, PATTERN).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.backward()


# ---- patterns behind their tensors


def fresh(**options):
    return patterns.make("random", 96, block=16, density=0.5, **options)


def gradients(p):
    q, k, v = qkv(seqlen_q=96, seqlen_k=96)
    torch.manual_seed(0)
    return torch.autograd.grad(tessera.block_sparse_attention(q, k, v, p).square().sum(), (q, k, v))


def test_the_transposed_form_is_made_once_a_pattern():
    """By the first backward, wherever the tensors go in between: the pattern behind them has it from then on."""

    def behind(p):
        return ops.pattern_bytes(*p.op_args)

    transposed = 8 * (6 + 1) + 12 * fresh().num_blocks  # of 6 columns: offsets, rows and entries
    p = fresh()
    before = behind(p)
    gradients(p)
    assert behind(p) >= before + transposed
    q, k, v = qkv(seqlen_q=96, seqlen_k=96)
    compiled = torch.compile(
        lambda q, p: tessera.block_sparse_attention(q, k, v, p).sum(), fullgraph=True, backend="aot_eager"
    )
    p = fresh(seed=1)
    before = behind(p)
    torch.autograd.grad(compiled(q, p), q)
    assert behind(p) >= before + transposed
    again = BlockPattern(*p.op_args[:2], seqlen_q=96, seqlen_k=96, block=16, q_offset=0)  # from its tensors
    assert behind(again) == behind(p) and again == p


def test_tensors_that_were_written_into_are_read_again():
    """Nothing of a pattern that was checked once is trusted: what the tensors say now counts, and is checked."""
    p, other = fresh(seed=2), fresh(seed=3)
    assert p.num_blocks == other.num_blocks and p != other
    q, k, v = qkv(seqlen_q=96, seqlen_k=96, grad=False)
    tessera.block_sparse_attention(q, k, v, p)
    p.indices.copy_(other.indices)
    want = tessera.block_sparse_attention(q, k, v, other)
    assert torch.equal(tessera.block_sparse_attention(q, k, v, p), want)
    for t, value, name in ((p.indices, 10**9, "indices"), (p.indices, -1, "indices"), (p.indptr, 10**9, "indptr")):
        kept = t.clone()
        t[-1] = value
        with pytest.raises(ValueError, match=f"^{name}: got "):
            tessera.block_sparse_attention(q, k, v, p)
        t.numpy()[:] = kept.numpy()  # of which torch's version counter knows nothing
        assert torch.equal(tessera.block_sparse_attention(q, k, v, p), want)
    partial = BlockPattern.from_token_mask(torch.rand(96, 96) < 0.5, block=16)
    partial.bitmaps.fill_(-1)
    dense = tessera.block_sparse_attention(q, k, v, patterns.dense(96, block=16))
    assert torch.equal(tessera.block_sparse_attention(q, k, v, partial), dense)
    partial.bitmap_index.fill_(10**6)
    with pytest.raises(ValueError, match="^bitmap_index: got 1000000"):
        tessera.block_sparse_attention(q, k, v, partial)
    with pytest.raises(ValueError, match="^pattern_shape: got 6 numbers"):
        ops.infer(q, k, v, *other.op_args[:4], other.op_args[4][:6])
