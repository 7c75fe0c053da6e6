"""BlockPattern as a Python value: builders, combinators, conversions, errors. The core has its own tests of what each
pattern keeps; here it is whether the value arrives."""

from __future__ import annotations

import copy
import pickle

import pytest
import tessera
from tessera import BlockPattern, patterns

import torch

OPTIONS = {
    "dense": {},
    "causal": {},
    "local_window": {"window": 64},
    "dilated_sparse": {"density": 0.4},
    "global_local": {"global_tokens": 16, "window": 32},
    "strided": {"stride": 3},
    "random": {"density": 0.4, "seed": 3},
    "bigbird": {"density": 0.5, "seed": 3},
    "dilated_segments": {"segment_lengths": [64, 128], "dilation_rates": [1, 2]},
    "hierarchical": {"density": 0.4, "ranks": 2},
}


@pytest.mark.parametrize("name", patterns.NAMES)
def test_every_name_is_a_function_and_makes_what_make_makes(name):
    p = getattr(patterns, name)(200, 300, block=(16, 32), **OPTIONS[name])
    assert p == patterns.make(name, 200, 300, block=(16, 32), **OPTIONS[name])
    assert (p.rows, p.cols, p.block, p.shape) == (13, 10, (16, 32), (200, 300))
    assert p.num_blocks == int(p.to_mask().sum()) > 0
    admissible = patterns.causal(200, 300, block=(16, 32)).to_mask() if p.causal else torch.ones_like(p.to_mask())
    assert p.density == pytest.approx((p.to_mask().sum() / admissible.sum()).item())


def test_options_reach_the_core():
    base = patterns.random(512, block=16, density=0.2, seed=1)
    assert base != patterns.random(512, block=16, density=0.2, seed=2)
    assert base.num_blocks == 32 * 6
    heads = patterns.random(512, block=16, density=0.2, seed=1, heads=3)
    assert heads.to_mask().shape == (1, 3, 32, 32)
    window = patterns.local_window(256, block=16, window=32, causal=True).to_mask()[0, 0]
    i, j = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(window, (j <= i) & ((i - j - 1) * 16 + 1 <= 32))
    strided = patterns.strided(256, block=16, stride=4).to_mask()[0, 0]
    assert torch.equal(strided, ((i - j) % 4 == 0) | ((i - j).abs() <= 1))


def test_from_mask_and_back():
    mask = torch.rand(2, 3, 5, 7) < 0.4
    p = BlockPattern.from_mask(mask, block=(32, 16), seqlen_q=150, seqlen_k=110)
    assert (p.batches, p.heads) == (2, 3)
    assert torch.equal(p.to_mask(), mask)
    assert BlockPattern.from_mask(mask[0, 0].numpy(), block=(32, 16), seqlen_q=150, seqlen_k=110).heads == 1


def test_token_mask_has_bitmaps_and_comes_back():
    mask = torch.rand(2, 70, 90) < 0.3
    mask[:, :16, :16] = True
    p = BlockPattern.from_token_mask(mask, block=16)
    assert p.bitmaps is not None and int(p.bitmap_index.min()) == -1
    assert torch.equal(p.to_token_mask()[0], mask)
    full = BlockPattern.from_token_mask(torch.ones(70, 90, dtype=torch.bool), block=16)
    assert full.bitmaps is None and full == patterns.dense(70, 90, block=16)


def test_lists_csr_and_bsr_agree():
    lists = [[2, 0], [1], [], [0, 1, 2]]
    p = BlockPattern.from_lists(lists, seqlen_q=64, seqlen_k=48, block=16)
    indptr, indices = torch.tensor([0, 2, 3, 3, 6]), torch.tensor([2, 0, 1, 0, 1, 2])
    assert p == BlockPattern.from_csr(indptr, indices, seqlen_q=64, seqlen_k=48, block=16, sort=True)
    assert p == BlockPattern(indptr, torch.tensor([0, 2, 1, 0, 1, 2]), seqlen_q=64, seqlen_k=48, block=16)
    with pytest.raises(ValueError, match="indices"):
        BlockPattern.from_csr(indptr, indices, seqlen_q=64, seqlen_k=48, block=16)
    blocks = torch.zeros(6, 16, 16, dtype=torch.bool)
    blocks[:, 3, 5] = True
    bsr = BlockPattern.from_csr(indptr, indices, blocks, seqlen_q=64, seqlen_k=48, block=16, sort=True)
    assert int(bsr.to_token_mask().sum()) == 6


def test_combinators_are_those_of_masks():
    a, b = torch.rand(80, 96) < 0.3, torch.rand(80, 96) < 0.3
    pa, pb = (BlockPattern.from_token_mask(m, block=(16, 32)) for m in (a, b))
    assert torch.equal((pa | pb).to_token_mask()[0, 0], a | b)
    assert torch.equal((pa & pb).to_token_mask()[0, 0], a & b)
    assert torch.equal(pa.transpose().to_token_mask()[0, 0], a.T)
    assert torch.equal(pa[1:4, 1:].to_token_mask()[0, 0], a[16:64, 32:])
    assert torch.equal(pa[-2:].to_token_mask()[0, 0], a[48:])
    assert torch.equal(BlockPattern.stack_heads([pa, pb]).to_token_mask()[0], torch.stack([a, b]))
    assert torch.equal(BlockPattern.stack_batches([pa, pb]).to_token_mask()[:, 0], torch.stack([a, b]))


def test_statistics_and_pictures():
    p = patterns.dilated_sparse(1024, block=64, density=0.25, causal=True)
    s = p.statistics(causal=True)
    assert s.kept_blocks == p.num_blocks and s.admissible_blocks == 16 * 17 // 2
    assert s.density == pytest.approx(p.num_blocks / s.admissible_blocks) and s.sparsity == pytest.approx(1 - s.density)
    assert (
        s.diagonal_density == 1 and s.empty_rows == 0 and s.row_density.min <= s.row_density.mean <= s.row_density.max
    )
    assert p.ascii().count("#") == p.num_blocks


def test_value_semantics():
    p = patterns.random(256, block=16, density=0.3)
    same = patterns.random(256, block=16, density=0.3)
    other = patterns.random(256, block=16, density=0.3, seed=1)
    assert p == same and hash(p) == hash(same) and len({p, same, other}) == 2
    assert p != other and p != "p" and p != patterns.random(257, block=16, density=0.3)
    assert copy.deepcopy(p) == p and pickle.loads(pickle.dumps(p)) == p
    masked = BlockPattern.from_token_mask(torch.rand(64, 64) < 0.5, block=32)
    assert pickle.loads(pickle.dumps(masked)) == masked and masked != patterns.dense(64, block=32)
    with pytest.raises(AttributeError, match="immutable"):
        p.heads = 2
    with pytest.raises(AttributeError, match="immutable"):
        del p.heads
    assert repr(p).startswith("BlockPattern(256 x 256, block 16 x 16, ")


def test_cache_counts_and_forgets():
    cache = patterns.cache
    cache.clear()
    before = cache.stats()
    first = cache.get("random", 512, block=16, density=0.1, seed=11)
    assert cache.get("random", 512, block=16, density=0.1, seed=11) == first
    assert cache.get("random", 512, block=16, density=0.1, seed=12) != first
    now = cache.stats()
    assert (now.hits - before.hits, now.misses - before.misses, now.entries) == (1, 2, 2)
    cache.resize(max_entries=1)
    assert len(cache) == 1 and cache.stats().evictions == now.evictions + 1
    cache.resize(max_entries=before.max_entries)
    cache.clear()
    cache.warm_up("dilated_sparse", [256, 512], block=64, density=0.5)
    hits = cache.stats().hits
    patterns.make("dilated_sparse", 512, block=64, density=0.5, cached=True)
    assert len(cache) == 2 and cache.stats().hits == hits + 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: patterns.dense(-1), ValueError, "seqlen_q"),
        (lambda: patterns.dense("x"), TypeError, "seqlen_q: got str"),
        (lambda: patterns.dense(True), TypeError, "seqlen_q: got bool"),
        (lambda: patterns.dense(64, 2.5), TypeError, "seqlen_k: got float"),
        (lambda: patterns.dense(64, block=24), ValueError, "^block: got 24"),
        (lambda: patterns.dense(64, block=2**40), ValueError, "^block: got 1099511627776"),
        (lambda: patterns.dense(64, block=(16, 2**40)), ValueError, "block_k"),
        (lambda: patterns.dense(64, block=(24, 16)), ValueError, "block_q: got 24"),
        (lambda: patterns.dense(64, causal="no"), TypeError, "causal: got str"),
        (lambda: patterns.dense(64).statistics("no"), TypeError, "causal: got str"),
        (lambda: patterns.make(None, 64), TypeError, "name: got NoneType"),
        (lambda: patterns.dense(64, block=(16, 16, 16)), ValueError, "block: got 3"),
        (lambda: patterns.dense(64, heads=0), ValueError, "heads"),
        (lambda: patterns.dilated_sparse(64, density=0.0), ValueError, "density"),
        (lambda: patterns.dilated_sparse(64, density=1.5), ValueError, "density"),
        (lambda: patterns.dilated_sparse(64, density=float("nan")), ValueError, "density"),
        (lambda: patterns.dilated_sparse(64, density="much"), TypeError, "density: got str"),
        (lambda: patterns.dilated_sparse(64, density=0.5, dilation_rates=[0]), ValueError, "dilation_rates"),
        (lambda: patterns.dilated_sparse(64, density=0.5, dilation_rates=2), TypeError, "dilation_rates: got int"),
        (lambda: patterns.local_window(64), ValueError, "window"),
        (lambda: patterns.make("spiral", 64), ValueError, "^name: got 'spiral'"),
        (lambda: patterns.make("dense", 64, window=3), ValueError, "window"),
        (lambda: patterns.make("dense", 64, colour=3), TypeError, "colour"),
        (
            lambda: BlockPattern.from_mask(torch.ones(3, 3), seqlen_q=64, seqlen_k=64),
            ValueError,
            "mask: got dtype Float",
        ),
        (
            lambda: BlockPattern.from_mask(torch.ones(3, 3, dtype=torch.bool), seqlen_q=64, seqlen_k=64),
            ValueError,
            "mask",
        ),
        (lambda: BlockPattern.from_mask(object(), seqlen_q=64, seqlen_k=64), TypeError, "mask: got object"),
        (lambda: BlockPattern.from_lists([[0, -1]], seqlen_q=16, seqlen_k=16, block=16), ValueError, "lists"),
        (lambda: BlockPattern.from_lists(None, seqlen_q=16, seqlen_k=16), TypeError, "^lists: got NoneType"),
        (lambda: BlockPattern.from_lists([[0], 1], seqlen_q=16, seqlen_k=16), TypeError, r"^lists\[1\]: got int"),
        (lambda: BlockPattern.from_lists([[0, 0]], seqlen_q=16, seqlen_k=16, block=16), ValueError, "indices"),
        (lambda: BlockPattern([0], [0], seqlen_q=16, seqlen_k=16), TypeError, "indptr: got list"),
        (
            lambda: BlockPattern(torch.tensor([0, 2**62]), torch.tensor([0]), seqlen_q=16, seqlen_k=16),
            ValueError,
            "indptr",
        ),
        (lambda: patterns.dense(64) | patterns.dense(65), ValueError, "seqlen"),
        (lambda: patterns.dense(64, block=16)[::2], ValueError, "rows: got step 2"),
        (lambda: patterns.dense(64, block=16)[3], TypeError, "index: got 3"),
        (lambda: BlockPattern.stack_heads([]), ValueError, "patterns"),
        (lambda: BlockPattern.stack_heads(1), TypeError, "^patterns: got int"),
        (lambda: BlockPattern.stack_heads([1]), TypeError, "patterns: got int"),
        (lambda: patterns.dense(64).ascii(head=1), ValueError, "head"),
    ],
)
def test_mistakes_name_the_argument(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_million_tokens_take_milliseconds():
    p = tessera.patterns.dilated_sparse(1 << 20, block=128, density=0.005, causal=True)
    assert p.rows == 8192 and p.num_blocks == pytest.approx(0.005 * 8192 * 8193 / 2, rel=0.05)


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_load(tmp_path, weights_only):
    masked = BlockPattern.from_token_mask(torch.rand(2, 40, 40) < 0.5, block=16).with_causality()
    config = tessera.PatternConfig("strided", density=0.3)
    torch.save({"a": patterns.bigbird(256, density=0.3, causal=True), "b": masked, "c": config}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=weights_only)
    assert loaded["a"] == patterns.bigbird(256, density=0.3, causal=True) and loaded["b"] == masked
    assert loaded["c"] == config


def test_an_expanded_token_mask_is_as_any_other():
    """Of strides 0: a row for all queries, a column for all keys, one element for all."""
    row, column = torch.rand(1, 200) > 0.3, torch.rand(150, 1) > 0.3
    for mask in (row, column, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int32)):
        wide = mask.expand(2, 150, 200)
        got = BlockPattern.from_token_mask(wide, block=(16, 48))
        assert got == BlockPattern.from_token_mask(wide.contiguous(), block=(16, 48))
        assert torch.equal(got.to_token_mask()[0], wide.bool())
