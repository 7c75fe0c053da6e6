"""What people see of patterns and mass in notebooks and on matplotlib's axes."""

from __future__ import annotations

import base64
import re

import pytest
import tessera

import torch

S = 512


def test_a_notebook_shows_a_picture_and_the_figures():
    pattern = tessera.patterns.dilated_sparse(S, block=64, density=0.3, causal=True)
    png = pattern._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) > 500
    page = pattern._repr_html_()
    assert "BlockPattern(512 x 512, block 64 x 64" in page and "density" in page
    assert base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]) == png
    many = tessera.patterns.random(S, block=64, density=0.3, heads=3)
    assert many._repr_png_() != tessera.patterns.dense(S, block=64)._repr_png_()


@pytest.fixture
def ax():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots()
    yield ax
    pyplot.close(figure)


def test_plot_of_a_pattern(ax):
    window = lambda b, h, q, k: (k <= q) & (q - k < 100)
    for pattern in (
        tessera.patterns.local_window(S, block=64, density=0.4, causal=True, heads=2),
        tessera.patterns.from_mask_mod(window, seqlen_q=S, block=64),
    ):
        assert pattern.plot(ax) is ax
        image = ax.images[-1]
        values = torch.tensor(image.get_array().data)
        kept = pattern.to_mask()[0, 0]
        assert torch.equal(values > 0, kept)
        full = pattern.to_token_mask()[0, 0]
        if pattern.causal:
            full = full & torch.ones(S, S, dtype=torch.bool).tril()
        whole = full.unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).all(3).all(1)
        assert torch.equal(values == 1, whole), "what is cut is lighter"
        assert list(image.get_extent()) == [0, S, S, 0]
    assert "density" in ax.get_title()
    with pytest.raises(ValueError, match="^head: got 2; allowed: 0..1"):
        tessera.patterns.dense(S, block=64, heads=2).plot(ax, head=2)
    with pytest.raises(TypeError, match="^ax: got int"):
        pattern.plot(3)


def test_plot_of_mass_with_a_pattern_over_it(ax):
    q = torch.randn(1, S, 2, 16)
    mass = tessera.analysis.attention_mass(q, q, block=64, causal=True)
    pattern = mass.oracle_pattern(0.3)
    mass.plot(ax, pattern=pattern, head=1)
    shown = ax.images[0].get_array()
    assert shown.shape == (8, 8) and bool(shown.mask[0, 1]), "the future has no colour"
    coverage, _ = mass.coverage(pattern)
    assert f"{coverage:.1%}" in ax.get_title()
    lines = sum(len(c.get_segments()) for c in ax.collections)
    edges = torch.nn.functional.pad(pattern.to_mask()[0, 1 if pattern.heads > 1 else 0].int(), (1, 1, 1, 1))
    assert lines == int(edges.diff(dim=0).abs().sum() + edges.diff(dim=1).abs().sum())
    assert mass.plot(ax, head=0) is ax and "keeps" not in ax.get_title()
    with pytest.raises(ValueError, match="^head: got 2"):
        mass.plot(ax, head=2)
