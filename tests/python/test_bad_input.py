"""What callers get wrong: every argument of every function takes hostile values in turn. Each must be a ValueError or a
TypeError of one line that names an argument, what came and what is allowed; never a crash, a trace of C++, or a result.
"""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import tessera
from tessera import patterns

import torch

S = 64
SENTENCE = re.compile(r"(sequence \d+: )?[a-z_0-9]+(\[\d+\])?: got .+; allowed: .+")


def tensor(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes)))


def calls():
    q, k, v = tensor(2, S, 4, 16), tensor(2, S, 2, 16), tensor(2, S, 2, 16)
    numbers = {"scale": 0.3, "softcap": 3.0, "window": 9, "causal": True}
    heads = {"alibi_slopes": tensor(4).abs(), "sinks": tensor(4)}
    lengths = {"key_lengths": torch.tensor([S, 50])}
    bias = {"attn_bias": tensor(1, 1, S, S)}
    offsets = {"q_offset": 1, "k_offset": 2}
    cu = torch.tensor([0, 40, 64])
    out = tensor(2, S, 4, 16)
    pages = {"k_cache": tensor(5, 32, 2, 16), "v_cache": tensor(5, 32, 2, 16)}
    whole, one = patterns.dense(S, block=32), patterns.dense(1, S, block=32)
    return {
        "block_sparse_attention": dict(
            q=q, k=k, v=v, pattern=whole, **numbers, **heads, **lengths, **bias, **offsets, block_bias=tensor(1, 1, 4),
            dropout_p=0.1, return_lse=False, layout="bshd",
        ),
        "attention_weights": dict(
            q=q, k=k, pattern=whole, **numbers, **heads, **lengths, **bias, **offsets, block_bias=tensor(1, 1, 4),
            layout="bshd",
        ),
        "decode": dict(
            q=q[:, :1], **pages, pattern=one, **numbers, **heads, **lengths, block_bias=tensor(1, 1, 2),
            attn_bias=tensor(1, 1, 1, S), page_table=torch.tensor([[4, 0], [2, 1]], dtype=torch.int32), layout="bshd",
        ),
        "varlen_attention": dict(
            q=q[0], k=k[0], v=v[0], cu_seqlens_q=cu, cu_seqlens_k=cu,
            patterns=[patterns.dense(40, block=32), patterns.dense(24, block=32)], **numbers, **heads, dropout_p=0.1,
        ),
        "dilated_attention": dict(
            q=q, k=k, v=v, segment_lengths=[16, 32], dilation_rates=[1, 2], pattern="bigbird", density=0.5, block=16,
            pattern_window=16, pattern_rates=[], global_tokens=16, stride=None, pattern_seed=1, **numbers, **lengths,
            **bias, alibi_slopes=heads["alibi_slopes"], dropout_p=0.1, layout="bshd",
        ),
        "merge": dict(out_a=out, lse_a=tensor(2, 4, S), out_b=out + 1, lse_b=tensor(2, 4, S), layout="bshd"),
    }  # fmt: skip


CALLS = calls()
OPTIONAL = {"alibi_slopes", "sinks", "key_lengths", "attn_bias", "block_bias", "page_table", "scale", "window",
            "q_offset", "pattern", "density", "pattern_window", "global_tokens", "stride"}  # fmt: skip
ANY_STRIDES = OPTIONAL | {"lse_a", "lse_b", "cu_seqlens_q", "cu_seqlens_k"}  # no head dim to be contiguous


def hostile_tensors(name: str, t: torch.Tensor):
    """(label, value): none of them may be accepted in place of t."""
    floating = t.is_floating_point()
    yield from (("list", t.tolist()), ("numpy", t.numpy()), ("number", 3), ("str", "x"))
    if name not in OPTIONAL:
        yield "None", None
    yield "scalar", t.flatten()[0]
    yield "more dimensions", t[None]
    yield "seven dimensions", t.reshape(*[1] * (7 - t.dim()), *t.shape)
    yield "fewer dimensions", t[0]
    yield "bool", t.bool()
    yield "complex", t.to(torch.complex64)
    yield "uint8", t.to(torch.uint8)
    yield "another kind of number", t.long() if floating else t.float()
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    yield "quantized", torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    if t.dim() > 1:
        yield "nested", torch.nested.nested_tensor([t[0], t[0]])
    if t.dim() > 2:
        yield "jagged", torch.nested.nested_tensor([t[0], t[0]], layout=torch.jagged)
    yield "empty", t[:0] if t.shape[0] > 1 or name not in OPTIONAL else t.expand(0, *t.shape[1:])
    for i in range(t.dim()):
        if not (i == t.dim() - 1 and name in ("v", "v_cache")):  # Dv is free
            yield f"dimension {i} too long", t.narrow(i, 0, 1).expand(*t.shape[:i], t.shape[i] + 4, *t.shape[i + 1 :])
        yield f"dimension {i} beyond any memory", t.narrow(i, 0, 1).expand(*t.shape[:i], 2**40, *t.shape[i + 1 :])
    if floating and name not in ANY_STRIDES:
        yield "last dimension not contiguous", t.transpose(-1, -2).contiguous().transpose(-1, -2)
        yield "every second number", torch.stack([t, t], -1)[..., 0]
        yield "one number expanded", t.flatten()[:1].expand(t.numel()).view(t.shape).requires_grad_()
    if not floating:
        yield "negative numbers", -t - 1
        yield "large numbers", t.long() + 2**40
    if name == "alibi_slopes":
        yield "requires grad", t.clone().requires_grad_()


NAN, HUGE = float("nan"), (2**63, -(2**70))
NUMBERS = {
    "scale": ("x", [1], NAN, float("inf"), 1e300, 2j, torch.ones(2), True, np.bool_(True), torch.tensor(True)),
    "softcap": (None, "x", NAN, -1.0, 1e300, torch.ones(2), True, torch.tensor(True)),
    "dropout_p": (None, "x", NAN, -0.1, 1.0, 2, torch.ones(2), True),
    "window": ("x", -1, 1.5, NAN, True, (1,), (1, 2, 3), (-1, 0), (0.5, 1), *HUGE),
    "causal": ("x", 1.5, [], torch.ones(2), 2j, 1),
    "return_lse": (None, "x", torch.ones(2)),
    "layout": (None, "sbhd", 3, [], "BSHD"),
    "q_offset": ("x", 1.5, NAN, True, [1], 2**62, *HUGE),
    "k_offset": (None, "x", 1.5, NAN, True, [1], -(2**62), *HUGE),
    "density": ("x", NAN, 0.0, -1, 1.5, [1]),
    "block": (None, "x", 0, -16, 17, 1.5, 2**40, *HUGE),
    "pattern_window": ("x", -1, 1.5, *HUGE),
    "pattern_rates": (None, 2, "x", [0], [-1], [1.5], ["a"], [2**63]),
    "global_tokens": ("x", -1, 1.5, *HUGE),
    "stride": ("x", -1, 0, 1.5, *HUGE),
    "pattern_seed": (None, "x", 1.5, *HUGE),
    "segment_lengths": (None, 16, "ab", [], [16], [0, 32], [-1, 32], [1.5, 32], [None, 32], [2**63, 32], [True, 32]),
    "dilation_rates": (None, 1, "ab", [], [1], [0, 2], [-1, 2], [1.5, 2], ["a", 2], [1, 2**63]),
}  # fmt: skip
PATTERNS = (None, 3, "x", torch.ones(2, 2), [patterns.dense(S, block=32)], patterns.dense(S - 1, block=32),
            patterns.dense(S, S + 1, block=32), patterns.random(S, block=32, density=1.0, heads=3))  # fmt: skip


def hostile(function: str, name: str, value):
    if isinstance(value, torch.Tensor):
        return list(hostile_tensors(name, value))
    if name == "patterns":
        bad = [*PATTERNS, [], value[:1], value[::-1], [None, None], iter(value)]
    elif name == "pattern" and function != "dilated_attention":
        bad = PATTERNS
    else:
        bad = NUMBERS.get(name, ("nothing", 3))
    return [(repr(x)[:40], x) for x in bad]


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_are_good_before_they_are_spoilt(function):
    with_lse = getattr(tessera, function)(**CALLS[function])
    assert all(torch.isfinite(t).all() for t in (with_lse if isinstance(with_lse, tuple) else (with_lse,))[:2])


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, given in CALLS.items() for name in given])
@pytest.mark.parametrize("training", [False, True])
def test_hostile(function, name, training):
    given = dict(CALLS[function])
    if training:
        differentiable = {"q", "k", "v", "attn_bias", "block_bias", "sinks", "out_a", "lse_a", "out_b", "lse_b"}
        given = {n: t.clone().requires_grad_() if n in differentiable else t for n, t in given.items()}
    for label, bad in hostile(function, name, CALLS[function][name]):
        if name == "alibi_slopes" and label == "requires grad" and function in ("attention_weights", "decode"):
            continue  # these have no gradients at all, and say so where one is asked for
        try:
            getattr(tessera, function)(**{**given, name: bad})
        except (ValueError, TypeError) as error:
            assert SENTENCE.fullmatch(str(error)), (label, error)
        except BaseException as error:
            raise AssertionError(f"{name} = {label}: {type(error).__name__}: {error}") from None
        else:
            raise AssertionError(f"{name} = {label}: accepted")


def test_the_argument_is_named_as_the_caller_knows_it():
    def message(function, **change):
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(tessera, function)(**{**CALLS[function], **change})
        return str(caught.value)

    x = tensor(2, S, 2, 15)
    assert message("decode", k_cache=x).startswith("k_cache: got ")
    assert message("decode", v_cache=x.double()).startswith("v_cache: got ")
    assert message("dilated_attention", pattern="random", pattern_window=3).startswith("pattern_window: got ")
    assert message("dilated_attention", pattern_rates=[1]).startswith("pattern_rates: got ")
    assert message("attention_weights", k=x).startswith("k: got ")
    assert message("merge", out_a=x.int()).startswith("out_a: got dtype Int")
    assert message("merge", lse_b=x).startswith("lse_b: got ")


def test_flags_and_numbers_of_numpy_are_welcome():
    given = CALLS["block_sparse_attention"]
    expected = tessera.block_sparse_attention(**{**given, "dropout_p": 0.0})
    same = {"causal": np.bool_(True), "scale": np.float64(0.3), "softcap": np.float32(3), "window": np.int64(9),
            "q_offset": np.int32(1), "dropout_p": 0}  # fmt: skip
    assert torch.equal(tessera.block_sparse_attention(**{**given, **same}), expected)
    lazy = {"q": torch._neg_view(-given["q"]), "k": torch._neg_view(-given["k"])}
    assert torch.equal(tessera.block_sparse_attention(**{**given, "dropout_p": 0.0, **lazy}), expected)


@pytest.mark.parametrize("sizes", [(0, 8, 8, 2), (2, 0, 0, 2), (2, 0, 8, 2), (2, 8, 0, 2), (2, 8, 8, 0)])
def test_nothing_to_do(sizes):
    """No batch, no queries, no keys, no heads: empty results and zero gradients."""
    batch, seqlen_q, seqlen_k, heads = sizes
    q, k, v = (torch.randn(batch, s, heads, 16, requires_grad=True) for s in (seqlen_q, seqlen_k, seqlen_k))
    p = patterns.dense(seqlen_q, seqlen_k, block=16)
    lengths = torch.full((batch,), seqlen_k)
    results = [tessera.block_sparse_attention(q, k, v, p, causal=True, key_lengths=lengths, return_lse=True)]
    if seqlen_q == seqlen_k:
        dilation = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}
        results.append(tessera.dilated_attention(q, k, v, key_lengths=lengths, return_lse=True, **dilation))
    for out, lse in results:
        assert out.shape == q.shape and lse.shape == (batch, heads, seqlen_q)
        assert seqlen_k or (not out.any() and (lse == -torch.inf).all())
        for g, t in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
            assert g.shape == t.shape and torch.isfinite(g).all()
    assert tessera.decode(q, k, v, p).shape == q.shape
    assert tessera.attention_weights(q, k, p).block_values.isfinite().all()


def test_overlapping_inputs_get_their_gradients():
    """One tensor as q, k and v, and views that repeat elements: gradients meet in what they are views of."""
    p = patterns.dense(S, block=32)
    x = torch.randn(1, S, 1, 16, requires_grad=True)

    def wide(t):
        return t.expand(2, S, 4, 16)

    (ours,) = torch.autograd.grad(tessera.block_sparse_attention(wide(x), wide(x), wide(x), p).sum(), x)
    copies = [wide(x).detach().clone().requires_grad_() for _ in range(3)]
    apart = torch.autograd.grad(tessera.block_sparse_attention(*copies, p).sum(), copies)
    torch.testing.assert_close(ours, sum(g.sum((0, 2), keepdim=True) for g in apart), atol=1e-5, rtol=1e-5)


def test_sizes_that_would_wrap():
    """Products of numbers from outside are errors that name the argument, never small numbers or memory of others."""
    ops = torch.ops.tessera
    values, tokens = torch.rand(16, 2), torch.ones(16, dtype=torch.int32)
    first, last = torch.zeros(4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    for shape in (
        (2**62 + 1, 32, 1, 16, 4, 4),
        (2**40, 2**40, 16, 16, 1, 1),
        (64, 32, 16, 16, 2**40, 2**40),
        (-1,) * 6,
    ):
        numbers = (*shape, 0, 0, 0)
        for op, more in ((ops.oracle_density, (0.5,)), (ops.oracle_coverage, (0.5,)), (ops.bound_pattern, (0.5,))):
            with pytest.raises(ValueError, match="^[a-z_]+: got .*; allowed: "):
                op(values, tokens, first, last, numbers, *more)
    p = tessera.patterns.dense(64, block=16)
    with pytest.raises(ValueError, match="^batch: got .* x 4294967296 x 4294967296; allowed"):
        ops.admitted_pairs(2**32, 2**32, *p.op_args)


def test_integers_are_checked_in_their_own_width():
    for number in (2**32, -(2**32), 2**62):
        with pytest.raises(ValueError, match=f"indices: got {number}"):
            tessera.BlockPattern(torch.tensor([0, 1]), torch.tensor([number]), seqlen_q=16, seqlen_k=16, block=16)


def test_errors_suggest():
    q = torch.randn(1, 512, 4, 16)
    pattern = patterns.causal(512)
    with pytest.raises(ValueError, match='512 x 512.*; q looks like the other layout: layout="bhsd"\\?'):
        tessera.block_sparse_attention(*[q.transpose(1, 2)] * 3, pattern)
    with pytest.raises(ValueError, match='; q looks like the other layout: layout="bshd"\\?'):
        tessera.block_sparse_attention(q, q, q, pattern, layout="bhsd")
    with pytest.raises(ValueError, match="512 x 512.*allowed: Sq x Sk = 511 x 511$"):
        tessera.block_sparse_attention(*[q[:, :511]] * 3, pattern)
    for call in (lambda: patterns.make("local_windw", 64), lambda: tessera.PatternConfig("local_windw"),
                 lambda: tessera.BlockSparseAttention("local_windw")):  # fmt: skip
        with pytest.raises(ValueError, match="got 'local_windw'; allowed: .*; did you mean 'local_window'"):
            call()
    with pytest.raises(TypeError, match="did you mean 'block_size'"):
        tessera.MultiheadAttention(32, 2, pattern={"pattern_type": "strided", "blok_size": 16})
    with pytest.raises(AttributeError, match="did you mean 'stride'"):
        tessera.PatternConfig("strided").strde = 3
    with pytest.raises(ValueError, match="hierarchical$"):
        patterns.make("xyzzy", 64)


def test_memory_that_cannot_be_had_is_a_memory_error():
    """Pages of a cache, of a tensor that takes no memory itself."""
    program = """
import resource, torch, tessera
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
cache = tessera.KVCache(1, 64, 4096)
k = torch.zeros(1, 1, 64, 4096).expand(1, 1 << 16, 64, 4096)
try:
    cache.append(k, k)
except MemoryError as e:
    print(e)
cache.append(k[:, :2], k[:, :2])
print(cache.lengths.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[0].startswith("memory: could not allocate"), lines
    assert lines[1] == "[2]", "what failed has changed nothing"
