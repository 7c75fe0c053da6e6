"""Inside PyTorch: compile, export, functional transforms, autocast, checkpointing, FLOP counts, threads, processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap

import pytest
import tessera
import torch._dynamo
from tessera import BlockPattern, SparsePatternGenerator, patterns
from tessera.pattern import pattern_for
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torch

S = 64


def qkv(heads=2, kv_heads=1, dim=8, batch=1, grad=False, seqlen=S):
    return [torch.randn(batch, seqlen, h, dim, requires_grad=grad) for h in (heads, kv_heads, kv_heads)]


def random_pattern(seed, density=0.5):
    return patterns.random(S, block=16, density=density, seed=seed)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_backward(backend):
    p, bias = random_pattern(0), torch.randn(1, 2, random_pattern(0).num_blocks, requires_grad=True)

    def f(q, k, v, bias, p):
        out, lse = tessera.block_sparse_attention(q * 2, k, v, p, causal=True, block_bias=bias, return_lse=True)
        return out.square().sum() + lse.sum()

    inputs = [*qkv(grad=True), bias]
    expected = torch.autograd.grad(f(*inputs, p), inputs)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*inputs, p), f(*inputs, p))
    for a, b in zip(torch.autograd.grad(compiled(*inputs, p), inputs), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_compile_others(layout):
    swap = (lambda t: t.transpose(1, 2).contiguous()) if layout == "bhsd" else (lambda t: t)
    q, k, v = (swap(t).requires_grad_() for t in qkv(kv_heads=2))

    def f(q, k, v):
        a = tessera.dilated_attention(
            q, k, v, segment_lengths=[16, 32], dilation_rates=[1, 2], causal=True, return_lse=True, layout=layout
        )
        return tessera.merge(*a, *a, layout=layout)[0]

    expected = torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v)), expected):
        torch.testing.assert_close(a, b)


def test_a_new_pattern_of_the_same_shape_recompiles_nothing():
    counter = CompileCounter()
    compiled = torch.compile(
        lambda q, k, v, p: tessera.block_sparse_attention(q, k, v, p, causal=True), fullgraph=True, backend=counter
    )
    q, k, v = qkv()
    for seed in range(3):
        p = random_pattern(seed)
        torch.testing.assert_close(compiled(q, k, v, p), tessera.block_sparse_attention(q, k, v, p, causal=True))
    assert counter.frame_count == 1
    # Another number of kept blocks: once more, with that number dynamic; after that none.
    compiled(q, k, v, random_pattern(0, 0.25))
    after = counter.frame_count
    compiled(q, k, v, random_pattern(0, 0.75)), compiled(q, k, v, random_pattern(1, 1.0))
    assert after <= 2 and counter.frame_count == after


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_pattern_made_inside_the_graph(backend):
    def f(q):
        p = patterns.dilated_sparse(q.shape[1], block=16, density=0.5, causal=True)
        return tessera.block_sparse_attention(q, q, q, p, causal=True)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for seqlen in (64, 96, 112):
        q = torch.randn(1, seqlen, 2, 8, requires_grad=True)
        torch.testing.assert_close(compiled(q), f(q))
        (expected,) = torch.autograd.grad(f(q).square().sum(), q)
        torch.testing.assert_close(torch.autograd.grad(compiled(q).square().sum(), q)[0], expected)


def test_named_patterns_of_all_askers_are_one_operator_in_graphs():
    """Functions, configs, modules and the guides' generators: the graph has one node, and no tensors of a pattern."""
    seen = []

    def backend(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    config = tessera.PatternConfig("dilated_sparse", density=0.5, block_size=16)
    generator = SparsePatternGenerator(config)
    for make in (
        lambda n: patterns.dilated_sparse(n, block=16, density=0.5),
        lambda n: config.pattern(n),
        lambda n: patterns.cache.get("dilated_sparse", n, n, block=16, density=0.5),
        lambda n: pattern_for(config, n, n),
        lambda n: pattern_for(generator, n, n),
        lambda n: pattern_for(None, n, n),
    ):
        torch._dynamo.reset(), seen.clear()
        q = torch.randn(1, 64, 2, 8)
        got = torch.compile(
            lambda q, make=make: tessera.block_sparse_attention(q, q, q, make(q.shape[1])),
            fullgraph=True,
            backend=backend,
        )(q)
        torch.testing.assert_close(got, tessera.block_sparse_attention(q, q, q, make(64)))
        (calls,) = seen
        ours = [call.removesuffix(".default") for call in calls if "tessera" in call]
        assert ours == ["tessera.named_pattern", "tessera.forward"]


def test_compiled_dropout_is_reproducible():
    p = random_pattern(0)
    compiled = torch.compile(
        lambda q, k, v: tessera.block_sparse_attention(q, k, v, p, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q, k, v = qkv()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(q, k, v))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Attend(torch.nn.Module):
    def forward(self, q, k, v, p):
        return tessera.block_sparse_attention(q, k, v, p, causal=True)


def test_export_round_trip():
    q, k, v = qkv()
    program = torch.export.export(Attend(), (q, k, v, random_pattern(0)))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for seed in (0, 1):  # the pattern is an input, not baked in
        p = random_pattern(seed)
        torch.testing.assert_close(loaded(q, k, v, p), tessera.block_sparse_attention(q, k, v, p, causal=True))


def test_functional_transforms():
    _, k, v = qkv()
    x, p = torch.randn(3, 1, S, 2, 8), random_pattern(0)

    def f(q, k=k, v=v):
        return tessera.block_sparse_attention(q, k, v, p, causal=True)

    def loss(q, k=k, v=v):
        return f(q, k, v).square().sum()

    singly = torch.stack([f(q) for q in x])
    torch.testing.assert_close(torch.vmap(f)(x), singly)
    torch.testing.assert_close(torch.vmap(f, in_dims=2, out_dims=2)(x.movedim(0, 2)), singly.movedim(0, 2))
    grads = []
    for q in x:
        q = q.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(q), q)[0])
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), grads[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), torch.stack(grads))
    per_sample = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, None))(x, k, v)
    assert per_sample.shape == (3, *k.shape) and not torch.equal(per_sample[0], per_sample[1])

    def biased(b):
        return tessera.block_sparse_attention(x[0], k, v, p, block_bias=b).square().sum()

    biases = torch.randn(3, 1, 2, p.num_blocks)
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(biased))(biases), torch.stack([torch.func.grad(biased)(b) for b in biases])
    )
    listed = [random_pattern(i) for i in range(3)]
    many = torch.vmap(lambda q, i: torch.ops.tessera.decode(q, k, v, p.indptr, i, None, None, p.op_args[4])[0])
    torch.testing.assert_close(
        many(x, torch.stack([r.indices for r in listed])),
        torch.stack([tessera.block_sparse_attention(q, k, v, r) for q, r in zip(x, listed)]),
    )


def test_autocast():
    q, k, v = qkv(grad=True)
    p, bias = random_pattern(0), torch.randn(1, 2, random_pattern(0).num_blocks, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = tessera.block_sparse_attention(q, k, v, p, block_bias=bias)
        assert tessera.dilated_attention(q, k, v, segment_lengths=[16], dilation_rates=[1]).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tessera.block_sparse_attention(q, k, v, p, block_bias=bias), out)
    direct = tessera.block_sparse_attention(*(t.bfloat16() for t in (q, k, v)), p, block_bias=bias)
    assert torch.equal(out, direct)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32


def test_flop_counter_counts_admitted_pairs():
    q, k, v = qkv(grad=True, kv_heads=2)
    p = patterns.causal(S, block=16)
    with FlopCounterMode(display=False) as counter:
        tessera.block_sparse_attention(q, k, v, p, causal=True).sum().backward()
    assert counter.get_total_flops() == S * (S + 1) // 2 * 2 * 8 * (4 + 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tessera.dilated_attention(q, k, v, segment_lengths=[16], dilation_rates=[1])
    assert counter.get_total_flops() == S * 16 * 2 * 8 * 4
    mask = torch.rand(S, S) < 0.3
    packed = [t[0].detach().requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        varlen(*packed, [BlockPattern.from_token_mask(mask, block=16)]).sum().backward()
    assert counter.get_total_flops() == int(mask.sum()) * 2 * 8 * (4 + 10)


def varlen(q, k, v, listed):
    cu = torch.tensor([0, q.shape[0]])
    return tessera.varlen_attention(q, k, v, cu, cu, listed)


def test_packed_sequences_with_bitmaps_in_transforms():
    q, k, v = (t[0].requires_grad_() for t in qkv())
    listed = [BlockPattern.from_token_mask(torch.rand(S, S) < 0.5, block=16)]

    def loss(q, k, v):
        return varlen(q, k, v, listed).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), expected):
        torch.testing.assert_close(a, b)
    x = torch.stack([q.detach(), 2 * q.detach()])
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(0, None, None))(x, k, v)
    torch.testing.assert_close(per_sample[0], expected[0])
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss)(x[1], k, v))


def test_gradient_of_a_bias_in_dilated_attention_compiled_and_mapped():
    q, k, v = qkv(kv_heads=2)
    biases = torch.randn(3, 1, 2, S, S)

    def loss(bias):
        return (
            tessera.dilated_attention(
                q, k, v, segment_lengths=[16, 32], dilation_rates=[1, 2], causal=True, attn_bias=bias
            )
            .square()
            .sum()
        )

    expected = torch.stack([torch.func.grad(loss)(b) for b in biases])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(biases), expected)
    bias = biases[0].requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(bias), bias)[0], expected[0])


def test_checkpoint_sees_the_same_dropout():
    q, k, v = qkv(grad=True)
    p = random_pattern(0)

    def f(q):
        return tessera.block_sparse_attention(q * 1, k, v, p, dropout_p=0.5)

    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(f(q).square().sum(), q)
    torch.manual_seed(3)
    out = checkpoint(f, q, use_reentrant=False)
    torch.randn(5)
    (got,) = torch.autograd.grad(out.square().sum(), q)
    assert torch.equal(got, expected)


def test_threads_are_torchs_and_change_nothing():
    q, k, v = qkv(batch=2, seqlen=256, grad=True)
    p = patterns.dilated_sparse(256, block=32, density=0.4)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = tessera.block_sparse_attention(q, k, v, p)
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def run_alone(code: str) -> str:
    """In a fresh process: what this one has loaded or forked before does not count."""
    path = os.pathsep.join([os.path.dirname(os.path.dirname(tessera.__file__)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_openmp_runtime_and_as_many_threads_as_set():
    out = run_alone(
        """
        import os, torch, tessera
        torch.set_num_threads(3)
        q = torch.randn(1, 512, 8, 32)
        p = tessera.patterns.dense(512)
        before = len(os.listdir("/proc/self/task"))
        tessera.block_sparse_attention(q, q, q, p)
        maps = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
        print(len([m for m in maps if "libgomp" in m or "libiomp" in m or "libomp" in m]))
        print(len(os.listdir("/proc/self/task")) - before)
        """
    )
    assert out.split() == ["1", "2"]


def test_fork_after_a_call():
    out = run_alone(
        """
        import torch, tessera
        from torch.utils.data import DataLoader, Dataset

        q = torch.randn(1, 128, 2, 16)
        p = tessera.patterns.dilated_sparse(128, block=32, density=0.5)
        here = tessera.block_sparse_attention(q, q, q, p)

        class Calls(Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return tessera.block_sparse_attention(q, q, q, p)

        rows = list(DataLoader(Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
        print(all(torch.equal(r, here) for r in rows), len(rows))
        """
    )
    assert out.split() == ["True", "4"]


def test_pattern_in_a_module_survives_copies():
    class Holder(torch.nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

        def forward(self, x):
            return tessera.block_sparse_attention(x, x, x, self.p)

    import copy
    import pickle

    x, holder = qkv()[0], Holder(BlockPattern.from_token_mask(torch.rand(S, S) < 0.5, block=16))
    assert torch.equal(copy.deepcopy(holder)(x), holder(x))
    assert pickle.loads(pickle.dumps(holder.p)) == holder.p
    counter = CompileCounter()
    torch.testing.assert_close(torch.compile(holder, fullgraph=True, backend=counter)(x), holder(x))
