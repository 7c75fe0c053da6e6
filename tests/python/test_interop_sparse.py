"""Patterns from torch.sparse, SciPy and DeepSpeed layouts, and back."""

from __future__ import annotations

import random

import pytest
import tessera
from tessera import BlockPattern, interop, patterns
from tessera.interop import deepspeed as ds

import torch

scipy_sparse = pytest.importorskip("scipy.sparse")


def _mask(*lead):
    return torch.rand(*lead, 5, 4, generator=torch.Generator().manual_seed(3)) < 0.4


CSR = torch.eye(4).to_sparse_csr()
SIZES = {"seqlen_q": 70, "seqlen_k": 100, "block": (16, 32)}  # 5 x 4 blocks, ragged


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("convert", [torch.Tensor.to_dense, torch.Tensor.to_sparse], ids=["strided", "coo"])
def test_matrices_of_blocks(lead, convert):
    mask = _mask(*lead)
    want = BlockPattern.from_mask(mask, **SIZES)
    assert interop.from_torch(convert(mask), **SIZES) == want
    assert (want.batches, want.heads) == (*(1, 1), *lead)[-2:]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_csr_with_stored_zeros(lead):
    # Batched CSR needs equally many entries a matrix: all stored, values decide.
    mask = _mask(*lead)
    crow = (torch.arange(6) * 4).expand(*lead, 6)
    col = torch.arange(4).repeat(5).expand(*lead, 20)
    csr = torch.sparse_csr_tensor(crow, col, mask.reshape(*lead, 20).float(), (*lead, 5, 4))
    assert interop.from_torch(csr, **SIZES) == BlockPattern.from_mask(mask, **SIZES)


@pytest.mark.parametrize("lead", [(), (2,), (2, 2)])
def test_bsr_keeps_pairs(lead):
    tokens = torch.zeros(*lead, 64, 96, dtype=torch.bool)
    tokens[..., :16, 32:64] = True  # a full block
    tokens[..., 20, 5] = True  # one pair of a block
    bsr = tokens.float().to_sparse_bsr((16, 32))
    pattern = interop.from_torch(bsr)
    assert pattern.block == (16, 32) and torch.equal(pattern.to_token_mask().squeeze(), tokens.squeeze())
    short = interop.from_torch(bsr, seqlen_q=50, seqlen_k=70)
    assert torch.equal(short.to_token_mask().squeeze(), tokens[..., :50, :70].squeeze())


@pytest.mark.parametrize("layout", ["csr", "coo", "bsr"])
def test_torch_there_and_back(layout):
    pattern = patterns.random(100, 200, block=(16, 32), density=0.3, heads=2)
    one = interop.to_torch(pattern, layout, head=1)
    sizes = {"seqlen_q": 100, "seqlen_k": 200, "block": (16, 32)}
    assert torch.equal(interop.from_torch(one, **sizes).to_mask()[0, 0], pattern.to_mask()[0, 1])


def test_bsr_keeps_bitmaps_and_csr_says_that_it_cannot():
    pattern = BlockPattern.from_token_mask(torch.ones(100, 100).tril().bool(), block=16)
    dense = interop.to_torch(pattern, "bsr", dtype=torch.float32).to_dense()
    assert torch.equal(dense[:100, :100], torch.ones(100, 100).tril()) and dense.sum() == 100 * 101 / 2
    with pytest.raises(ValueError, match="layout: got 'csr' for a pattern with partial blocks"):
        interop.to_torch(pattern)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: interop.from_torch([[1]]), TypeError, "tensor: got list"),
        (lambda: interop.from_torch(torch.ones(2, 2)), ValueError, "seqlen_q, seqlen_k: got None"),
        (lambda: interop.from_torch(torch.eye(3).to_sparse_csc(), **SIZES), ValueError, "layout torch.sparse_csc"),
        (lambda: interop.from_torch(torch.eye(3).to_sparse_csr(), **SIZES), ValueError, "allowed: \\[5, 4\\]"),
        (lambda: interop.from_torch(torch.eye(32).to_sparse_bsr(16), seqlen_q=16), ValueError, "allowed: 17..32"),
        (lambda: interop.from_torch(torch.eye(32).to_sparse_bsr(16), block=32), ValueError, "block: got 32"),
        (lambda: interop.from_torch(torch.eye(32).to_sparse_bsr(8)), ValueError, "block_q: got 8"),
        (lambda: interop.from_torch(torch.eye(32).to_sparse_bsc(16)), ValueError, "layout torch.sparse_bsc"),
        (lambda: interop.from_torch(torch.ones(4), **SIZES), ValueError, "^tensor: got 1 dimensions; allowed: 2,"),
        (lambda: interop.from_torch(torch.ones(1, 1, 1, 5, 4), **SIZES), ValueError, "^tensor: got 5 dimensions"),
        (lambda: interop.from_torch(CSR, seqlen_q="64", seqlen_k=64), TypeError, "^seqlen_q: got str"),
        (lambda: interop.from_torch(torch.eye(32).to_sparse_bsr(16), seqlen_k="3"), TypeError, "^seqlen_k: got str"),
        (lambda: interop.from_torch(CSR, seqlen_q=64, seqlen_k=64, block=0), ValueError, "^block: got 0; allowed: a"),
        (lambda: interop.from_torch(CSR, seqlen_q=64, seqlen_k=64, block=(0, 16)), ValueError, "^block_q: got 0"),
        (lambda: interop.to_torch(torch.eye(4)), TypeError, "^pattern: got Tensor"),
        (lambda: interop.to_torch(patterns.dense(64), head="1"), TypeError, "^head: got str"),
        (lambda: interop.to_torch(patterns.dense(64), "csc"), ValueError, "layout: got 'csc'"),
        (lambda: interop.to_torch(patterns.dense(64), head=1), ValueError, "head: got 1"),
        (lambda: interop.from_scipy(torch.eye(2)), TypeError, "matrix: got Tensor"),
        (lambda: interop.from_layout(torch.ones(2, 3, 4), block=16), ValueError, "layout: got \\[2, 3, 4\\]"),
        (lambda: interop.from_sparsity_config(3, 64), TypeError, "config: got int"),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("format", ["csr", "csc", "coo", "lil", "dia"])
def test_scipy_block_matrices(format):
    mask = _mask()
    matrix = scipy_sparse.coo_array(mask.int().numpy()).asformat(format)
    assert interop.from_scipy(matrix, **SIZES) == BlockPattern.from_mask(mask, **SIZES)
    per_head = interop.from_scipy([matrix, matrix], **SIZES)
    assert per_head == BlockPattern.from_mask(torch.stack([mask, mask]), **SIZES)


def test_scipy_unsorted_and_duplicate_entries():
    matrix = scipy_sparse.csr_array(([1, 1, 1], [3, 0, 3], [0, 3, 3, 3, 3, 3]), shape=(5, 4))
    assert interop.from_scipy(matrix, **SIZES).indices.tolist() == [0, 3]
    assert matrix.nnz == 3  # the caller's matrix is as it was


def test_scipy_bsr_and_back():
    pattern = BlockPattern.from_token_mask(torch.ones(60, 90).triu(20).bool(), block=(16, 32))
    matrix = interop.to_scipy(pattern, "bsr")
    assert interop.from_scipy(matrix, seqlen_q=60, seqlen_k=90) == pattern
    blocks = patterns.dilated_sparse(512, block=64, density=0.4)
    assert interop.from_scipy(interop.to_scipy(blocks), seqlen_q=512, seqlen_k=512, block=64) == blocks


@pytest.mark.parametrize("case", range(30))
def test_there_and_back_at_random(case):
    draw = random.Random(case)
    block = draw.choice([(16, 16), (16, 32), (64, 32)])
    sizes = {"seqlen_q": draw.randint(0, 200), "seqlen_k": draw.randint(0, 200), "block": block}
    heads, batches = draw.choice([1, 3]), draw.choice([1, 2])
    shape = (batches, heads, -(-sizes["seqlen_q"] // block[0]), -(-sizes["seqlen_k"] // block[1]))
    mask = torch.rand(shape) < draw.choice([0.0, 0.2, 0.6, 1.0])
    mask[:, :, ::3] = False  # empty rows
    pattern = BlockPattern.from_mask(mask, **sizes)
    assert interop.from_torch(mask.float().to_sparse(), **sizes) == pattern
    for b in range(batches):
        for layout in ("csr", "coo", "bsr"):
            heads_of = [interop.to_torch(pattern, layout, head=h, batch=b) for h in range(heads)]
            back = BlockPattern.stack_heads([interop.from_torch(t, **sizes) for t in heads_of])
            assert torch.equal(back.to_mask()[0], mask[b]), layout
        for format in ("csr", "bsr"):
            heads_of = [interop.to_scipy(pattern, format, head=h, batch=b) for h in range(heads)]
            back = interop.from_scipy(heads_of, **sizes)
            assert torch.equal(back.to_mask()[0], mask[b]) and back.shape == pattern.shape, format


def test_interop_loads_nothing_of_others():
    import subprocess
    import sys

    code = "import sys, tessera.interop; assert not {'scipy', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- DeepSpeed layouts, drawn by hand from their description


def _drawn(text):
    return torch.tensor([[int(c == "#") for c in line] for line in text.split()])


def test_dense():
    assert ds.DenseSparsityConfig(2).make_layout(64).tolist() == torch.ones(2, 4, 4).long().tolist()


def test_fixed_bidirectional():
    # Windows of 4; the last of each is seen by all; the window of 2 that is left has its last as representative.
    layout = ds.FixedSparsityConfig(1, num_local_blocks=4).make_layout(160)[0]
    want = """
        ####...#.#
        ####...#.#
        ####...#.#
        ####...#.#
        ...#####.#
        ...#####.#
        ...#####.#
        ...#####.#
        ...#...###
        ...#...###"""
    assert torch.equal(layout, _drawn(want))


def test_fixed_unidirectional_with_patterns_by_head():
    config = ds.FixedSparsityConfig(
        2, 16, True, num_local_blocks=2, attention="unidirectional", num_different_global_patterns=2
    )
    layout = config.make_layout(96)
    want = ("#..... ##.... .##... .###.. .#.##. .#.###", "#..... ##.... #.#... #.##.. #.#.#. #.#.##")
    for head, text in enumerate(want):
        assert torch.equal(layout[head], _drawn(text)), head


def test_fixed_horizontal():
    layout = ds.FixedSparsityConfig(1, num_local_blocks=2, horizontal_global_attention=True).make_layout(64)[0]
    assert torch.equal(layout, _drawn("##.# #### .### ####"))


def test_variable():
    config = ds.VariableSparsityConfig(1, local_window_blocks=[1, 2], global_block_indices=[5])
    assert torch.equal(config.make_layout(96)[0], _drawn("#....# .##..# .##..# ...### ...### .....#"))
    ranges = ds.VariableSparsityConfig(
        1, local_window_blocks=[1], global_block_indices=[1], global_block_end_indices=[3], attention="unidirectional"
    )
    assert torch.equal(ranges.make_layout(64)[0], _drawn("#... .#.. .##. .###"))
    random = ds.VariableSparsityConfig(1, num_random_blocks=3, local_window_blocks=[1], global_block_indices=[])
    counts = random.make_layout(160)[0].sum(-1)
    assert int(counts.min()) >= 3 and int(counts.max()) <= 4


def test_bigbird():
    config = ds.BigBirdSparsityConfig(1, num_random_blocks=0, num_sliding_window_blocks=3)
    assert torch.equal(config.make_layout(80)[0], _drawn("##### ###.. ####. #.### #..##"))
    config = ds.BigBirdSparsityConfig(4, 16, True, num_random_blocks=2, attention="unidirectional")
    layout = config.make_layout(320)
    assert torch.equal(layout, layout.tril()) and not torch.equal(layout[0], layout[1])
    assert torch.equal(layout, config.make_layout(320))


def test_bslongformer():
    config = ds.BSLongformerSparsityConfig(1, global_block_indices=[2])
    assert torch.equal(config.make_layout(80)[0], _drawn("###.. ###.. ##### ..### ..###"))
    config = ds.BSLongformerSparsityConfig(
        1, global_block_indices=[0], global_block_end_indices=[2], attention="unidirectional"
    )
    assert torch.equal(config.make_layout(80)[0], _drawn("#.... ##... ###.. ####. ##.##"))


def test_local_sliding_window():
    config = ds.LocalSlidingWindowSparsityConfig(2, num_sliding_window_blocks=4)
    assert torch.equal(config.make_layout(80)[1], _drawn("#.... ##... ###.. .###. ..###"))
    config = ds.LocalSlidingWindowSparsityConfig(1, attention="bidirectional")
    assert torch.equal(config.make_layout(64)[0], _drawn("##.. ###. .### ..##"))


def test_unidirectional_layouts_have_nothing_above_the_diagonal():
    # Groups of two global blocks: their first row does not see the second one.
    fixed = ds.FixedSparsityConfig(1, num_local_blocks=4, num_global_blocks=2, attention="unidirectional")
    assert torch.equal(fixed.make_layout(96)[0], _drawn("#..... ##.... ###... ####.. ..###. ..####"))
    # Shorter than one group.
    fixed = ds.FixedSparsityConfig(1, num_local_blocks=3, num_global_blocks=3, attention="unidirectional")
    assert torch.equal(fixed.make_layout(32)[0], _drawn("#. ##"))
    variable = ds.VariableSparsityConfig(4, 16, True, num_random_blocks=3, attention="unidirectional")
    layout = variable.make_layout(320)
    assert torch.equal(layout, layout.tril()) and not torch.equal(layout[0], layout[1])


@pytest.mark.parametrize("kind", [ds.VariableSparsityConfig, ds.BigBirdSparsityConfig])
def test_random_blocks_of_pythons_generator(kind):
    def layout(python_seed):
        random.seed(python_seed)
        return kind(2, 16, True, num_random_blocks=2, seed=None).make_layout(320)

    assert torch.equal(layout(1), layout(1)) and not torch.equal(layout(1), layout(2))
    random.seed(1)  # head by head, row by row, a sample each
    drawn = torch.zeros(2, 20, 20, dtype=torch.int64)
    for line in drawn.view(40, 20):
        line[random.sample(range(20), 2)] = 1
    assert ((layout(1) - drawn) >= 0).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ds.DenseSparsityConfig(1).make_layout(100), "seq_len: got 100; allowed: a multiple of block = 16"),
        (lambda: ds.DenseSparsityConfig(1, block=24), "block: got 24"),
        (lambda: ds.FixedSparsityConfig(1, num_local_blocks=4, num_global_blocks=3), "num_local_blocks: got 4"),
        (lambda: ds.FixedSparsityConfig(1, attention="both"), "attention: got 'both'"),
        (lambda: ds.FixedSparsityConfig(1, attention="unidirectional", horizontal_global_attention=True), "horizontal"),
        (lambda: ds.FixedSparsityConfig(2, num_different_global_patterns=2), "num_different_global_patterns: got 2"),
        (lambda: ds.FixedSparsityConfig(2, 16, True, num_different_global_patterns=5), "allowed: up to 4"),
        (lambda: ds.BSLongformerSparsityConfig(1, num_sliding_window_blocks=9).make_layout(64), "got 9"),
        (lambda: ds.BigBirdSparsityConfig(1, num_random_blocks=9).make_layout(64), "num_random_blocks: got 9"),
        (lambda: ds.VariableSparsityConfig(1, global_block_end_indices=[0]), "global_block_end_indices: got 0"),
    ],
)
def test_config_mistakes(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_layout_attention_equals_its_mask():
    config = ds.BigBirdSparsityConfig(2, different_layout_per_head=True, attention="unidirectional")
    layout = config.make_layout(128)
    assert torch.equal(interop.to_layout(interop.from_layout(layout, block=16)), layout)
    assert interop.from_sparsity_config(config, 128) == config.make_pattern(128)
    q, k, v = torch.randn(3, 1, 2, 128, 32)
    tokens = layout.bool().repeat_interleave(16, 1).repeat_interleave(16, 2).tril()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tokens)
    got = tessera.block_sparse_attention(q, k, v, config.make_pattern(128), causal=True, layout="bhsd")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_alike_heads_become_one():
    layout = ds.BSLongformerSparsityConfig(8).make_layout(128)
    pattern = interop.from_layout(layout, block=16)
    assert pattern.heads == 1 and torch.equal(interop.to_layout(pattern, 8), layout)
