"""Patterns of functions that say of each pair whether it counts, as FlexAttention's ``mask_mod``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .block_pattern import BlockPattern

# Pairs that a function is asked about in one go: what it makes of them (8 bytes a pair) stays near the cache.
_PAIRS = 1 << 18
# Times this, eight bytes of 0 or 1 become eight bits in the highest byte.
_GATHER = 0x0102040810204080


def pack(masks: Tensor) -> Tensor:
    """bool ``[n, block_q, block_k]`` as bitmaps, int64 ``[n, block_q, ceil(block_k / 64)]``: key k is bit ``k % 64`` of
    word ``k // 64``. block_k is a multiple of 16."""
    assert sys.byteorder == "little"
    n, block_q, block_k = masks.shape
    bits = torch.zeros(n, block_q, -(-block_k // 64) * 8, dtype=torch.uint8)
    eights = masks.contiguous().view(torch.uint8).view(torch.int64)
    bits[..., : block_k // 8] = ((eights * _GATHER) >> 56).to(torch.uint8)
    return bits.view(torch.int64)


def asked(mask_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``mask_mod`` with its answer checked: TypeError or ValueError that names it."""

    def ask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        answer = mask_mod(b, h, q, k)
        if not isinstance(answer, Tensor):
            raise TypeError(f"mask_mod: got {type(answer).__name__}; allowed: a function that returns a bool tensor")
        if answer.is_floating_point() or answer.dim():
            raise ValueError(
                f"mask_mod: got {answer.dtype} with {answer.dim()} dimensions; allowed: a function that returns one "
                "bool for scalars b, h, q_idx, kv_idx"
            )
        return answer.bool()

    return ask


def pattern_of_mask_mod(
    mask_mod: Callable[..., Tensor], *, seqlen_q: int, seqlen_k: int, block: tuple[int, int] = (128, 128),
    heads: int = 1, batches: int = 1, device: torch.device | str = "cpu",
) -> BlockPattern:  # fmt: skip
    """The pattern of all pairs that ``mask_mod(b, h, q, k)`` admits. Every pair is asked, as a function may say
    anything; nothing of ``seqlen_q x seqlen_k`` is held."""
    rows, cols = -(-seqlen_q // block[0]), -(-seqlen_k // block[1])
    ask = torch.vmap(asked(mask_mod), in_dims=(None, None, None, 0))
    ask = torch.vmap(ask, in_dims=(None, None, 0, None))
    ask = torch.vmap(ask, in_dims=(0, 0, None, None))
    columns, index = _Grown(torch.int32), _Grown(torch.int32)
    bitmaps = _Grown(torch.int64, block[0], -(-block[1] // 64))
    kept = torch.zeros(batches * heads * rows, dtype=torch.int64)
    for slabs, r, c in _parts(batches * heads, rows, cols, max(1, _PAIRS // (block[0] * block[1]))):
        slab = torch.arange(slabs.start, slabs.stop, device=device)
        # Past the ends the last token is asked about: a table of the length must not be read past it.
        q = torch.arange(r.start * block[0], r.stop * block[0], device=device).clamp(max=seqlen_q - 1)
        k = torch.arange(c.start * block[1], c.stop * block[1], device=device).clamp(max=seqlen_k - 1)
        pairs = ask(slab // heads, slab % heads, q, k).cpu().contiguous()
        pairs = pairs.view(len(slabs), len(r), block[0], len(c), block[1])
        counts = _pairs_of_blocks(pairs)
        at = counts.nonzero(as_tuple=True)
        some = counts[at]
        partial = some < block[0] * block[1]
        columns.append(at[2] + c.start)
        index.append(torch.where(partial, partial.cumsum(0) - 1 + bitmaps.size, -1))
        kept.view(batches * heads, rows)[slabs.start : slabs.stop, r.start : r.stop] += (counts > 0).sum(-1)
        if partial.any():
            slab, row, col = (x[partial] for x in at)
            bitmaps.append(pack(pairs[slab, row, :, col]))
    indptr = torch.zeros(kept.numel() + 1, dtype=torch.int64)
    indptr[1:] = kept.cumsum(0)
    return BlockPattern(
        indptr, columns.values(), seqlen_q=seqlen_q, seqlen_k=seqlen_k, block=block, heads=heads, batches=batches,
        bitmap_index=index.values(), bitmaps=bitmaps.values(),
    )  # fmt: skip


class _Grown:
    """Tensors joined as they come, in memory that doubles. A list of them would lie scattered in the memory that the
    temporaries of the next part want in one piece: 190 MB instead of 20 at 16,384 tokens."""

    def __init__(self, dtype: torch.dtype, *sizes: int) -> None:
        self.size = 0
        self._held = torch.empty(1024, *sizes, dtype=dtype)

    def append(self, values: Tensor) -> None:
        end = self.size + values.shape[0]
        if end > self._held.shape[0]:
            held = self._held.new_empty(max(end, 2 * self._held.shape[0]), *self._held.shape[1:])
            held[: self.size] = self._held[: self.size]
            self._held = held
        self._held[self.size : end] = values
        self.size = end

    def values(self) -> Tensor:
        return self._held[: self.size]


def _parts(slabs: int, rows: int, cols: int, blocks: int) -> Iterator[Any]:
    """Ranges of slabs (a batch and head), block rows and columns with about so many blocks, in the order of a
    pattern: several of one only where the next are whole."""
    if not (slabs and rows and cols):
        return
    wide = min(cols, blocks)
    high = min(rows, max(1, blocks // cols))
    deep = min(slabs, max(1, blocks // (cols * rows)))
    for slab in range(0, slabs, deep):
        for row in range(0, rows, high):
            for col in range(0, cols, wide):
                yield (
                    range(slab, min(slab + deep, slabs)), range(row, min(row + high, rows)),
                    range(col, min(col + wide, cols)),
                )  # fmt: skip


def _pairs_of_blocks(pairs: Tensor) -> Tensor:
    """How many of the pairs ``[..., block_q, cols, block_k]`` each block admits, ``[..., cols]``."""
    # Eight bytes are added at once, 128 rows at a time: none of them carries into its neighbour.
    eights = pairs.view(torch.uint8).view(torch.int64)
    return sum(part.sum(-3).view(torch.uint8).sum(-1) for part in eights.split(128, -3))
