"""FlexAttention's BlockMask and BlockPattern: what one admits, the other admits, and both attentions agree."""

from __future__ import annotations

import pytest
import tessera
from tessera import BlockPattern, interop, patterns
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

import torch


def causal(b, h, q, k):
    return q >= k


DOCUMENTS = torch.arange(200) // 37  # exactly as long as the sequence: reading past it is an error
SLOPES = torch.tensor([0, 40, 80])


def documents(b, h, q, k):
    return (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k)


def by_head_and_batch(b, h, q, k):
    return (q - k).abs() <= SLOPES[h] + 16 * b


def nothing(b, h, q, k):
    return q < 0


@pytest.mark.parametrize("mod", [causal, documents, nothing, lambda b, h, q, k: q >= 0])
@pytest.mark.parametrize("block", [16, 48, (32, 64), (256, 80)])
def test_admits_what_mask_mod_admits(mod, block):
    mask = create_block_mask(mod, None, None, 200, 200, device="cpu", BLOCK_SIZE=block)
    pattern = interop.from_block_mask(mask)
    assert pattern.block == ((block, block) if isinstance(block, int) else block)
    assert torch.equal(pattern.to_token_mask(), create_mask(mod, None, None, 200, 200, device="cpu"))


def test_heads_and_batches():
    mask = create_block_mask(by_head_and_batch, 2, 3, 130, 200, device="cpu", BLOCK_SIZE=32)
    pattern = interop.from_block_mask(mask)
    assert (pattern.batches, pattern.heads) == (2, 3)
    assert torch.equal(pattern.to_token_mask(), create_mask(by_head_and_batch, 2, 3, 130, 200, device="cpu"))


def _lists(counts, columns, full_counts=None, full_columns=None, mod=causal):
    def tensor(x):
        return None if x is None else torch.tensor(x, dtype=torch.int32)[None, None]

    return BlockMask(
        seq_lengths=(64, 64), kv_num_blocks=tensor(counts), kv_indices=tensor(columns),
        full_kv_num_blocks=tensor(full_counts), full_kv_indices=tensor(full_columns), q_num_blocks=None, q_indices=None,
        full_q_num_blocks=None, full_q_indices=None, BLOCK_SIZE=(32, 32), mask_mod=mod,
    )  # fmt: skip


def test_filler_past_the_counts_is_ignored_and_order_is_free():
    # 7777 and -1 are what may lie behind the counts; full blocks are not asked: causal would cut (0, 1) away.
    pattern = interop.from_block_mask(_lists([1, 2], [[0, 7777], [1, 0]], [1, 0], [[1, -1], [-1, -1]]))
    assert torch.equal(pattern.to_mask()[0, 0], torch.tensor([[True, True], [True, True]]))
    tokens = pattern.to_token_mask()[0, 0]
    assert tokens[:32, 32:].all() and torch.equal(tokens[:32, :32], torch.ones(32, 32).tril().bool())
    assert pattern.bitmaps.shape[0] == 1  # both diagonal blocks have the same one


@pytest.mark.parametrize(
    "mask, words",
    [
        (_lists([3, 0], [[0, 1], [0, 1]]), "kv_num_blocks: got 0..3"),
        (_lists([1, 1], [[2, 0], [0, 1]]), "kv_indices: got column 2"),
        (_lists([1, 1], [[-1, 0], [0, 1]]), "column -1"),
        (_lists([1, 0], [[0, 0], [0, 0]], [1, 0], [[0, 0], [0, 0]]), "indices"),  # partial and full at once
    ],
)
def test_masks_that_cannot_be(mask, words):
    with pytest.raises(ValueError, match=words):
        interop.from_block_mask(mask)


@pytest.mark.parametrize(
    "lengths, error, words",
    [
        ({"seqlen_q": "3"}, TypeError, "^seqlen_q: got str"),
        ({"seqlen_q": 65}, ValueError, "^seqlen_q: got 65; allowed: up to 64"),
        ({"seqlen_k": 65}, ValueError, "^seqlen_k: got 65; allowed: up to 64"),
    ],
)
def test_lengths_that_the_mask_does_not_cover(lengths, error, words):
    with pytest.raises(error, match=words):
        interop.from_block_mask(_lists([1, 1], [[0, 1], [0, 1]]), **lengths)


def test_no_block_mask():
    with pytest.raises(TypeError, match="mask: got Tensor"):
        interop.from_block_mask(torch.ones(2, 2))


def _patterns():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.rand(2, 3, 100, 130, generator=generator) < 0.02
    tokens[:, :, :32, :64] = True
    return [
        patterns.dilated_sparse(256, 256, block=32, density=0.3),
        patterns.random(200, 100, block=(32, 64), density=0.5, heads=3),
        BlockPattern.from_token_mask(tokens, block=(32, 64)),
        BlockPattern.from_token_mask(torch.ones(128, 128).tril().bool(), block=128),
    ]


@pytest.mark.parametrize("pattern", _patterns(), ids=repr)
def test_there_and_back(pattern):
    mask = interop.to_block_mask(pattern)
    assert interop.from_block_mask(mask) == pattern
    # mask_mod alone says all: FlexAttention may be asked for any pair.
    tokens = create_mask(mask.mask_mod, pattern.batches, pattern.heads, *pattern.shape, device="cpu")
    assert torch.equal(tokens, pattern.to_token_mask())


@pytest.mark.parametrize("pattern", _patterns()[2:], ids=repr)
def test_flex_attention_agrees(pattern):
    q = torch.randn(2, 3, pattern.seqlen_q, 16)
    k, v = torch.randn(2, 2, 3, pattern.seqlen_k, 16)
    ours = tessera.block_sparse_attention(q, k, v, pattern, layout="bhsd")
    theirs = flex_attention(q, k, v, block_mask=interop.to_block_mask(pattern))
    torch.testing.assert_close(ours, theirs.nan_to_num(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [24, 512, (8, 64)])
def test_block_sizes_that_patterns_do_not_have(block):
    mask = create_block_mask(causal, None, None, 600, 600, device="cpu", BLOCK_SIZE=block)
    with pytest.raises(ValueError, match="^block_q: got .*; allowed: .*16"):
        interop.from_block_mask(mask)


def test_compiled_flex_attention_agrees_on_a_mask_and_on_what_was_exported():
    mask = create_block_mask(by_head_and_batch, 2, 3, 130, 200, device="cpu", BLOCK_SIZE=(32, 64))
    pattern = interop.from_block_mask(mask)
    q = torch.randn(2, 3, 130, 16)
    k, v = torch.randn(2, 2, 3, 200, 16)
    ours = tessera.block_sparse_attention(q, k, v, pattern, layout="bhsd")
    for theirs in (mask, interop.to_block_mask(pattern)):
        out = torch.compile(flex_attention)(q, k, v, block_mask=theirs)
        torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-5)
