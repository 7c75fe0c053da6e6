"""The plain modules measure themselves as the guides' do."""

from __future__ import annotations

import pickle

import pytest
import tessera
from multihead_cases import E, H, L, N, layer, sparse
from tessera.nn import MultiheadAttention

import torch
from torch import nn

# ---- monitoring


def test_measures_itself():
    """What it measures is what the figures mean, and measuring changes neither results nor gradients."""
    module = MultiheadAttention(E, H, batch_first=True, pattern={"pattern_type": "random", "block_size": 16})
    assert module._monitor is None and "performance_monitor" not in str(list(module.state_dict()))
    x = torch.randn(N, L, E)
    expected = module(x, x, x, need_weights=False)[0]
    gradient = torch.autograd.grad(expected.square().sum(), module.in_proj_weight)[0]
    assert module.get_performance_stats()["forwards"] == 0  # asking turns nothing on
    module(x, x, x, need_weights=False)
    assert module.get_performance_stats()["forwards"] == 0
    module.performance_monitor.enable(sample_every=1, sample_rows=L)
    out = module(x, x, x, need_weights=False)[0]
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out.square().sum(), module.in_proj_weight)[0], gradient)
    stats = module.get_performance_stats()
    assert stats["forwards"] == stats["sampled_forwards"] == 1 and stats["avg_forward_time_ms"] > 0
    pattern = tessera.patterns.random(L, block=16, density=0.1, heads=H)
    assert stats["density"] == pytest.approx(pattern.statistics().density) and stats["avg_speedup"] > 0
    _, weights = nn.MultiheadAttention.forward(_dense_twin(module), x, x, x, average_attn_weights=False)
    kept = (weights * pattern.to_token_mask()).sum(-1)
    assert stats["quality_score"] == pytest.approx(kept.mean().item(), rel=1e-4)
    assert 0 < stats["output_error"] < 2
    again = pickle.loads(pickle.dumps(module))
    assert again.performance_monitor.enabled and again.get_performance_stats()["forwards"] == 0
    module.performance_monitor.disable()
    module(x, x, x)
    assert module.get_performance_stats()["forwards"] == 1


def _dense_twin(module):
    twin = nn.MultiheadAttention(E, H, batch_first=True)
    twin.load_state_dict(module.state_dict())
    return twin


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_block_sparse_attention_measures_itself(layout):
    module = tessera.BlockSparseAttention(sparse(), causal=True, layout=layout)
    q, k, v = (torch.randn((N, L, H, 16) if layout == "bshd" else (N, H, L, 16)) for _ in range(3))
    expected, lse = module(q, k, v, return_lse=True)
    module.performance_monitor.enable(sample_every=1, sample_rows=L)
    out, measured_lse = module(q, k, v, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, measured_lse)
    q, k = (t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k))
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    true = (q @ k.mT / 4).masked_fill(~causal, float("-inf")).softmax(-1)
    stats = module.get_performance_stats()
    assert stats["quality_score"] == pytest.approx((true * sparse().to_token_mask()).sum(-1).mean().item(), rel=1e-4)
    module.performance_monitor.reset()
    bias = torch.zeros(1, 1, sparse().num_blocks, requires_grad=True)  # of the pattern: timed, not judged
    module(*(torch.randn_like(v) for _ in range(3)), block_bias=bias)
    stats = module.get_performance_stats()
    assert stats["forwards"] == 1 and stats["quality_score"] != stats["quality_score"]


def test_masks_are_part_of_the_truth():
    """Padding and masks reach the judge: dense attention under them is perfect."""
    module = MultiheadAttention(E, H, batch_first=True, dropout=0.0).eval()
    module.performance_monitor.enable(sample_every=1, sample_rows=L)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 60:] = padding[0, 3] = True
    mask = torch.rand(L, L) < 0.3
    mask.fill_diagonal_(False)
    with torch.no_grad():  # also where torch's inference operator would be taken
        module(x, x, x, key_padding_mask=padding, attn_mask=mask)
        module(x, x, x, is_causal=True, need_weights=False)
    stats = module.get_performance_stats()
    assert stats["forwards"] == 2 and stats["density"] == 1
    assert stats["quality_score"] == pytest.approx(1) and stats["output_error"] == pytest.approx(0, abs=1e-5)


def test_the_lightning_callback_sees_it():
    lightning = pytest.importorskip("tessera.integrations.lightning", exc_type=ImportError)
    model = nn.Sequential(layer({"pattern_type": "dilated_sparse", "block_size": 16}), tessera.BlockSparseAttention())
    assert set(lightning.monitored(model)) == {"0.self_attn", "1"}
    callback = lightning.AttentionStats(sample_every=1, per_module=True)
    callback.setup(None, model, "fit")
    x = torch.randn(N, L, E)
    model[0](x)
    stats = callback.stats(model)
    callback.teardown(None, model, "fit")
    assert stats["tessera/0.self_attn/density"] < 0.5 and stats["tessera/quality"] < 1 and stats["tessera/speedup"] > 0
    assert not model[0].self_attn.performance_monitor.enabled


def test_a_monitor_does_not_break_graphs_and_transforms():
    module = MultiheadAttention(E, H, batch_first=True, pattern=sparse())
    module.performance_monitor.enable(sample_every=1)
    x = torch.randn(3, N, L, E)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = torch.stack([module(y, y, y, need_weights=False)[0] for y in x])
        torch.testing.assert_close(compiled(x[0], x[0], x[0], need_weights=False)[0], expected[0])
        one = torch.vmap(lambda y: module(y, y, y, need_weights=False)[0])
        torch.testing.assert_close(one(x), expected)
    assert module.get_performance_stats()["forwards"] == 3
    torch._dynamo.reset()
