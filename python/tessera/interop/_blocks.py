"""What the conversions share: token masks of blocks as bitmaps and back, entries of a pattern as coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..pattern import BlockPattern
from ..pattern.mask_mod import pack

__all__ = ["Entries", "entries", "from_entries", "pack", "token_blocks", "unpack"]


def unpack(bitmaps: Tensor, block_k: int) -> Tensor:
    """The inverse of :func:`tessera.pattern.mask_mod.pack`."""
    bits = (bitmaps.unsqueeze(-1) >> torch.arange(64)) & 1
    return bits.flatten(2)[..., :block_k].bool()


class Entries(NamedTuple):
    """Where the kept blocks of a pattern lie; int64 ``[num_blocks]`` each, in the order of ``pattern.indices``."""

    batch: Tensor
    head: Tensor
    row: Tensor
    col: Tensor


def entries(pattern: BlockPattern) -> Entries:
    line = torch.repeat_interleave(pattern.indptr.diff().long())
    slab = line // max(pattern.rows, 1)
    return Entries(slab // pattern.heads, slab % pattern.heads, line % max(pattern.rows, 1), pattern.indices.long())


def token_blocks(pattern: BlockPattern, chosen: Tensor | slice = slice(None)) -> Tensor:
    """bool ``[n, block_q, block_k]``: the pairs that the chosen entries admit, False past the ends."""
    at = entries(pattern)
    row, col = at.row[chosen], at.col[chosen]
    masks = torch.ones(row.numel(), pattern.block_q, pattern.block_k, dtype=torch.bool)
    if pattern.bitmap_index is not None and pattern.bitmaps is not None:
        index = pattern.bitmap_index.long()[chosen]
        partial = index >= 0
        masks[partial] = unpack(pattern.bitmaps[index[partial]], pattern.block_k)
    q = row[:, None] * pattern.block_q + torch.arange(pattern.block_q)
    k = col[:, None] * pattern.block_k + torch.arange(pattern.block_k)
    return masks & (q < pattern.seqlen_q)[:, :, None] & (k < pattern.seqlen_k)[:, None, :]


def from_entries(
    at: Entries,
    bitmap_index: Tensor | None,
    bitmaps: Tensor | None,
    *,
    seqlen_q: int,
    seqlen_k: int,
    block: tuple[int, int],
    heads: int,
    batches: int,
) -> BlockPattern:
    """A pattern of entries in any order. Duplicates and what lies outside are ValueErrors."""
    rows, cols = (-(-s // b) for s, b in zip((seqlen_q, seqlen_k), block))
    for name, index, end in (("row", at.row, rows), ("column", at.col, cols)):
        if index.numel() and not (0 <= int(index.min()) and int(index.max()) < end):
            raise ValueError(f"indices: got {name} {int(index.min())}..{int(index.max())}; allowed: 0..{end - 1}")
    line = (at.batch * heads + at.head) * rows + at.row
    order = torch.argsort(line * max(cols, 1) + at.col)
    indptr = torch.zeros(batches * heads * rows + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(line, minlength=batches * heads * rows).cumsum(0)
    return BlockPattern(
        indptr,
        at.col[order].int(),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block=block,
        heads=heads,
        batches=batches,
        bitmap_index=None if bitmap_index is None else bitmap_index[order].int(),
        bitmaps=bitmaps,
    )
