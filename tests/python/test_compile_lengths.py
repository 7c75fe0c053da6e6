"""Patterns made inside a graph from symbolic lengths: one graph for all of them, also where it is exported."""

from __future__ import annotations

import pytest
import tessera
from tessera import patterns
from torch.export import Dim, export
from torch.testing import assert_close

import torch

LENGTHS = (100, 16, 17, 48, 64, 129, 257, 400)
# 24: a head dim that is none of the lengths; dynamo takes equal sizes of the first call for the same symbol.
D = 24


def _compiled(function, arguments):
    """Compiles once for all of the arguments, with equal results."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    for given in arguments:
        assert_close(compiled(*given), function(*given))
    assert len(graphs) == 1


MADE = {
    "dense": lambda n: patterns.dense(n, block=32),
    "causal": lambda n: patterns.causal(n, block=32),
    "local_window": lambda n: patterns.local_window(n, block=32, window=64, causal=True),
    "dilated_sparse": lambda n: patterns.dilated_sparse(n, block=32, density=0.3, causal=True, heads=2),
    "global_local": lambda n: patterns.global_local(n, block=32, window=64),
    "strided": lambda n: patterns.strided(n, n, block=32, stride=3),
    "random": lambda n: patterns.random(n, block=32, density=0.3),
    "bigbird": lambda n: patterns.make("bigbird", n, block=32, density=0.4, cached=True),
    "dilated_segments": lambda n: patterns.dilated_segments(n, block=32, segment_lengths=(64,), dilation_rates=(2,)),
    "hierarchical": lambda n: patterns.hierarchical(n, block=32, density=0.4),
    "rows of more": lambda n: patterns.local_window(n, block=32, window=64, causal=True, q_offset=0, seqlen_total=512),
}


def _attend(made):
    return lambda q: tessera.block_sparse_attention(q, q, q, made(q.shape[1]))


def _inputs():
    return [(torch.randn(1, n, 2, D),) for n in LENGTHS]


@pytest.mark.parametrize("name", MADE)
def test_one_graph_for_all_lengths(name):
    _compiled(_attend(MADE[name]), _inputs())


def test_one_graph_of_other_functions():
    def decode(q, k):
        return tessera.decode(q, k, k, patterns.causal(q.shape[1], k.shape[1], block=32))

    def weights(q):
        return tessera.attention_weights(q, q, patterns.causal(q.shape[1], block=32)).block_values

    def varlen(q, ends):
        return tessera.varlen_attention(q, q, q, ends, ends, [patterns.causal(q.shape[0] // 2, block=32)] * 2)

    def dilated(q):
        return tessera.dilated_attention(q, q, q, segment_lengths=(64, 256), dilation_rates=(1, 2))

    inputs = _inputs()
    _compiled(decode, [(torch.randn(1, 1, 2, D), k) for (k,) in inputs])
    _compiled(weights, inputs)
    _compiled(varlen, [(torch.randn(2 * n, 2, D), torch.tensor([0, n, 2 * n])) for n in LENGTHS])
    _compiled(dilated, [(torch.randn(1, n, 2, D),) for n in (256, 512, 300)])


@pytest.mark.parametrize("function", ["block_sparse", "decode", "varlen", "dilated", "weights"])
def test_numbers_from_sizes(function):
    """A scale of the head dim is a SymFloat, of which hasattr says nothing in a graph."""

    def call(q, ends):
        scale, n = q.shape[-1] ** -0.5, q.shape[1]
        pattern = patterns.causal(n, block=32)
        if function == "block_sparse":
            return tessera.block_sparse_attention(q, q, q, pattern, scale=scale, softcap=q.shape[-1] * 1.5)
        if function == "decode":
            return tessera.decode(q[:, -1:], q, q, patterns.causal(1, n, block=32), scale=scale)
        if function == "varlen":
            return tessera.varlen_attention(q[0], q[0], q[0], ends, ends, [pattern], scale=scale)
        if function == "dilated":
            return tessera.dilated_attention(q, q, q, segment_lengths=(64,), dilation_rates=(2,), scale=scale)
        return tessera.attention_weights(q, q, pattern, scale=scale).block_values

    _compiled(call, [(torch.randn(1, n, 2, D), torch.tensor([0, n])) for n in (100,)])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["local_window", "dilated_sparse", "bigbird"])
def test_export(name, strict):
    class Model(torch.nn.Module):
        def forward(self, q):
            return _attend(MADE[name])(q)

    lengths = Dim("length", min=16, max=4096)
    exported = export(Model(), (torch.randn(1, 100, 2, D),), dynamic_shapes=({1: lengths},), strict=strict).module()
    for (q,) in _inputs():
        assert_close(exported(q), Model()(q))


def test_modules():
    attention = tessera.MultiheadAttention(48, 2, pattern="dilated_sparse", batch_first=True).eval()
    _compiled(lambda x: attention(x, x, x)[0], [(torch.randn(1, n, 48),) for n in LENGTHS])
    attention = tessera.BlockSparseAttention("dilated_sparse", density=0.3, block=32, causal=True)
    _compiled(attention, [(q, q, q) for (q,) in _inputs()])


def test_wrong_numbers_are_still_named():
    for wrong, error in ((True, TypeError), (64.0, TypeError), (2**63, ValueError), ("64", TypeError)):
        with pytest.raises(error, match="^seqlen_q: got"):
            patterns.causal(wrong)
    assert patterns.causal(torch.tensor(64)).seqlen_q == 64
