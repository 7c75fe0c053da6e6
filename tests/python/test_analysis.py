"""Quality, mass maps, search and pictures reach Python unchanged; the core has its own tests of the numbers."""

from __future__ import annotations

import pytest
import tessera
from tessera import analysis, patterns

import torch

S, BLOCK = 256, 32


def test_quality_is_the_mass_that_a_pattern_keeps():
    q, k, v = (torch.randn(1, S, 2, 16) for _ in range(3))
    p = patterns.local_window(S, block=BLOCK, window=64, causal=True)
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    rows = (weights * p.to_token_mask()).sum(-1)
    found, heads = analysis.quality(q, k, v, p, causal=True, per_head=True)
    assert found.coverage == pytest.approx(rows.mean().item(), abs=1e-5)
    assert found.coverage_min == pytest.approx(rows.min().item(), abs=1e-5)
    assert [h.coverage for h in heads] == pytest.approx(rows.mean(-1)[0].tolist(), abs=1e-5)
    assert found.density == pytest.approx(p.statistics(causal=True).density)
    several = analysis.quality(q, k, v, [p, patterns.causal(S, block=BLOCK)], causal=True)
    assert several[0] == found and several[1].coverage == pytest.approx(1, abs=1e-6)

    mass = analysis.attention_mass(q, k, block=BLOCK, causal=True)
    blocks = weights.view(1, 2, 8, BLOCK, 8, BLOCK).sum((3, 5)) / BLOCK
    torch.testing.assert_close(mass.values.double(), blocks, atol=1e-5, rtol=1e-4)
    assert mass.coverage(p)[0] == pytest.approx(found.coverage, abs=1e-5)
    oracle = mass.oracle_pattern(0.4)
    assert mass.coverage(oracle)[0] == pytest.approx(mass.oracle_coverage(0.4), abs=1e-6)
    best = mass.optimize(0.8)
    assert best.reached and best.bound_density <= best.oracle_density <= best.density
    assert mass.coverage(mass.make(best.spec)) == pytest.approx((best.coverage, best.density), abs=1e-5)


def test_heads_before_tokens():
    q, k, v = (torch.randn(1, S, h, 16) for h in (4, 2, 2))
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    p = patterns.local_window(S, block=BLOCK, window=64, causal=True)
    bias = torch.randn(1, 4, S, S)
    want = analysis.quality(q, k, v, p, attn_bias=bias, per_head=True)
    assert analysis.quality(*heads_first, p, attn_bias=bias, per_head=True, layout="bhsd") == want
    assert analysis.quality(*heads_first[:2], None, p, layout="bhsd") != want
    mass = analysis.attention_mass(*heads_first[:2], block=BLOCK, causal=True, layout="bhsd")
    assert torch.equal(mass.values, analysis.attention_mass(q, k, block=BLOCK, causal=True).values)
    for tensors, layout, other in ((heads_first, "bshd", "bhsd"), ((q, k, v), "bhsd", "bshd")):
        with pytest.raises(ValueError, match=f'q looks like the other layout: layout="{other}"'):
            analysis.quality(*tensors, p, layout=layout)
    with pytest.raises(ValueError) as plain:  # another mistake
        analysis.quality(q, k[:, :, :, :8], v, p)
    assert "layout" not in str(plain.value)
    for of in (lambda **o: analysis.quality(q, k, v, p, **o), lambda **o: analysis.attention_mass(q, k, **o)):
        with pytest.raises(ValueError, match='^layout: got \'sbhd\'; allowed: "bshd" or "bhsd"'):
            of(layout="sbhd")
    with pytest.raises(ValueError, match="^q: got 3 dimensions"):
        analysis.attention_mass(q[0], k, layout="bhsd")


def _truth(q, k, bias=0.0, softcap=0.0, sinks=None, admitted=None):
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if admitted is not None:
        scores = scores.masked_fill(~admitted, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


I, J = torch.arange(S)[:, None], torch.arange(S)
OPTIONS = {
    "attn_bias": ({"attn_bias": 3 * torch.cos(0.1 * (I - J))[None, None]}, {"bias": 3 * torch.cos(0.1 * (I - J))}),
    "softcap": ({"softcap": 0.7}, {"softcap": 0.7}),
    "window": ({"window": (50, 20)}, {"admitted": (I - J <= 50) & (J - I <= 20)}),
    "key_lengths": ({"key_lengths": torch.tensor([200])}, {"admitted": J < 200}),
    "alibi_slopes": ({"alibi_slopes": torch.tensor([0.1, 0.02])},
                     {"bias": -torch.tensor([0.1, 0.02])[:, None, None] * (I - J).abs()}),
    "q_offset": ({"q_offset": 30, "k_offset": 10, "causal": True}, {"admitted": J <= I + 20}),
    "sinks": ({"sinks": torch.tensor([4.0, 7.0])}, {"sinks": torch.tensor([4.0, 7.0])}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_part_of_the_true_attention(name):
    options, truth = OPTIONS[name]
    q, k, v = (torch.randn(1, S, 2, 16) for _ in range(3))
    p = patterns.random(S, block=BLOCK, density=0.4)
    weights = _truth(q, k, **truth)
    keys = weights / weights.sum(-1, keepdim=True)  # coverage is of the keys: what a sink takes is left out
    coverage = (keys * p.to_token_mask()).sum(-1).mean().item()
    found = analysis.quality(q, k, v, p, **options)
    assert found.coverage == pytest.approx(coverage, abs=1e-5)
    dense = torch.einsum("bhij,bjhd->bihd", weights, v.double())
    sparse = tessera.block_sparse_attention(q, k, v, p, **options).double()
    assert found.output_error == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), rel=1e-4)
    mass = analysis.attention_mass(q, k, block=BLOCK, **options)
    torch.testing.assert_close(mass.values.double(), keys.view(1, 2, 8, BLOCK, 8, BLOCK).sum((3, 5)) / BLOCK,
                               atol=1e-5, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"softcap": -1.0}, ValueError, "softcap: got -1"),
        ({"softcap": "1"}, TypeError, "softcap: got str"),
        ({"sinks": [1.0, 2.0]}, TypeError, "sinks: got list"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks: got"),
        ({"attn_bias": torch.zeros(1, 1, 3, 3)}, ValueError, "attn_bias: got"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"q_offset": 0.5}, TypeError, "q_offset: got float"),
        ({"dropout_p": 0.5}, TypeError, "dropout_p: got an option"),
        ({"causal": "no"}, TypeError, "causal: got str; allowed: a bool"),
    ],
)
def test_mistakes(options, error, words):
    q = torch.randn(1, S, 2, 16)
    with pytest.raises(error, match=words):
        analysis.quality(q, q, None, patterns.dense(S, block=BLOCK), **options)
    with pytest.raises(error, match=words):
        analysis.attention_mass(q, q, block=BLOCK, **options)


@pytest.mark.parametrize(
    "name, draw",
    [
        ("title", lambda p: analysis.draw_pattern(p, None)),
        ("head", lambda p: analysis.draw_pattern(p, head="x")),
        ("causal", lambda p: analysis.draw_pattern(p, causal="no")),
        ("pattern", lambda p: analysis.draw_pattern(torch.ones(2, 2))),
        ("title", lambda p: analysis.draw_heat_map(torch.rand(8, 8), 3)),
        ("title", lambda p: analysis.draw_sheet([analysis.draw_pattern(p)], 1, None)),
        ("x_label", lambda p: analysis.draw_lines({"a": ([1], [2])}, x_label=None)),
    ],
)
def test_mistakes_of_pictures(name, draw):
    with pytest.raises(TypeError, match=f"^{name}: got .*; allowed: "):
        draw(patterns.bigbird(S, block=BLOCK, density=0.5))


def test_pictures(tmp_path):
    p = patterns.bigbird(S, block=BLOCK, density=0.5)
    sheet = analysis.draw_sheet(
        [
            analysis.draw_pattern(p, "pattern"),
            analysis.draw_heat_map(torch.rand(8, 8), "mass", log_scale=True),
            analysis.draw_lines({"a": ([0.1, 0.2], [1, 2])}, "curve", dashed=["a"]),
        ],
        columns=2,
    )
    assert sheet.dtype == torch.uint8 and sheet.shape[2] == 3
    assert len((sheet.int() * torch.tensor([1 << 16, 1 << 8, 1])).sum(-1).unique()) > 10  # colours
    analysis.write_png(sheet, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == analysis.encode_png(sheet)
    with pytest.raises(ValueError, match="image: got"):
        analysis.encode_png(sheet.float())
    with pytest.raises(ValueError, match="max_bytes"):
        analysis.attention_mass(torch.randn(1, S, 1, 8), torch.randn(1, S, 1, 8), block=BLOCK, max_bytes=16)
