"""Quality, mass maps, search and pictures reach Python unchanged; the core has its own tests of the numbers."""

from __future__ import annotations

import pytest
import torch

from tessera import analysis, patterns

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
    assert sheet.dtype == torch.uint8 and sheet.shape[2] == 3 and len(sheet.flatten(0, 1).unique(dim=0)) > 10
    analysis.write_png(sheet, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == analysis.encode_png(sheet)
    with pytest.raises(ValueError, match="image: got"):
        analysis.encode_png(sheet.float())
    with pytest.raises(ValueError, match="max_bytes"):
        analysis.attention_mass(torch.randn(1, S, 1, 8), torch.randn(1, S, 1, 8), block=BLOCK, max_bytes=16)
