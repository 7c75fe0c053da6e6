"""``torch.nn.attention.flex_attention.BlockMask``, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pattern import BlockPattern
from ..pattern.checks import check_int
from ._blocks import Entries, entries

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Pairs for which mask_mod is asked in one go.
_PAIRS = 1 << 20


def from_block_mask(mask: BlockMask, *, seqlen_q: int | None = None, seqlen_k: int | None = None) -> BlockPattern:
    """The pattern of a FlexAttention block mask.

    Full blocks are kept whole; for partial ones ``mask_mod`` is asked, pair by pair, and the answer kept as a bitmap. A
    ``score_mod`` is not part of a block mask: pass biases to the attention call. Only the first ``kv_num_blocks``
    columns of a row count, in any order; what lies behind them is filler.

    Args:
        mask: on any device; its block sizes must be multiples of 16 in 16..256.
        seqlen_q, seqlen_k: default those of the mask; at most what its blocks cover.

    Returns:
        A pattern on the CPU with the mask's batches and heads (1 where the mask has 1).

    Raises:
        TypeError: not a BlockMask. ValueError: counts or columns that cannot be, or a block listed twice.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 512, 512, device="cpu")
        >>> tessera.interop.from_block_mask(mask).shape
        (512, 512)
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask: got {type(mask).__name__}; allowed: torch.nn.attention.flex_attention.BlockMask")
    seqlen_q = mask.seq_lengths[0] if seqlen_q is None else check_int("seqlen_q", seqlen_q, 0)
    seqlen_k = mask.seq_lengths[1] if seqlen_k is None else check_int("seqlen_k", seqlen_k, 0)
    block_q, block_k = mask.BLOCK_SIZE
    counts, columns = _four_dims(mask.kv_num_blocks, 3), _four_dims(mask.kv_indices, 4)
    rows, cols = columns.shape[2:]
    if rows * block_q < seqlen_q:
        raise ValueError(f"seqlen_q: got {seqlen_q}; allowed: up to {rows * block_q}, the {rows} rows of the mask")
    if cols * block_k < seqlen_k:
        raise ValueError(f"seqlen_k: got {seqlen_k}; allowed: up to {cols * block_k}, the {cols} columns of the mask")
    full: tuple[Tensor | None, Tensor | None] = None, None
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _four_dims(mask.full_kv_num_blocks, 3), _four_dims(mask.full_kv_indices, 4)
    partial = _listed("kv_num_blocks", counts, columns)
    answers = _ask(mask.mask_mod, partial, block_q, block_k, seqlen_q, seqlen_k, mask.kv_indices.device)
    return BlockPattern._make(
        torch.ops.tessera.pattern_from_flex(counts, columns, *full, answers, seqlen_q, seqlen_k, block_q, block_k)
    )


def _four_dims(t: Tensor, dims: int) -> Tensor:
    t = t.detach().cpu().long()
    while t.dim() < dims:
        t = t.unsqueeze(0)
    return t


def _listed(name: str, counts: Tensor, columns: Tensor) -> Entries:
    """The columns that count, as entries."""
    width = columns.shape[-1]
    if counts.shape != columns.shape[:-1]:
        raise ValueError(f"{name}: got {list(counts.shape)}; allowed: {list(columns.shape[:-1])}, as the indices")
    if counts.numel() and not (0 <= int(counts.min()) and int(counts.max()) <= width):
        raise ValueError(f"{name}: got {int(counts.min())}..{int(counts.max())}; allowed: 0..{width}")
    at = (torch.arange(width) < counts.unsqueeze(-1)).nonzero()
    return Entries(at[:, 0], at[:, 1], at[:, 2], columns[at[:, 0], at[:, 1], at[:, 2], at[:, 3]])


def _ask(
    mask_mod: Callable[..., Tensor], at: Entries, block_q: int, block_k: int, seqlen_q: int, seqlen_k: int, device: Any
) -> Tensor:
    """What mask_mod says about each pair of the entries' blocks: bool ``[n, block_q, block_k]``. Past the ends of the
    sequences it is asked about the last token: a mask_mod that reads a table of the length must not read past it."""
    ask = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    ask = torch.vmap(ask, in_dims=(None, None, 0, None))
    ask = torch.vmap(ask, in_dims=(0, 0, 0, 0))
    answers = [torch.zeros(0, block_q, block_k, dtype=torch.bool)]
    step = max(1, _PAIRS // (block_q * block_k))
    for i in range(0, at.row.numel(), step):
        b, h, row, col = (x[i : i + step].to(device) for x in at)
        q = (row[:, None] * block_q + torch.arange(block_q, device=device)).clamp(max=max(seqlen_q - 1, 0))
        k = (col[:, None] * block_k + torch.arange(block_k, device=device)).clamp(max=max(seqlen_k - 1, 0))
        answers.append(ask(b, h, q, k).bool().cpu())
    return torch.cat(answers)


def to_block_mask(pattern: BlockPattern, *, device: torch.device | str = "cpu") -> BlockMask:
    """The pattern as a block mask for ``flex_attention``: full blocks as such, partial ones with a ``mask_mod`` that
    reads their bitmaps. Causality and windows that were options of the attention call are not part of a pattern:
    combine ``mask_mod`` with them. The format grows with rows x cols of blocks.

    Example:
        >>> mask = tessera.interop.to_block_mask(tessera.patterns.local_window(512, window=128))
        >>> mask.BLOCK_SIZE
        (128, 128)
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern: got {type(pattern).__name__}; allowed: tessera.BlockPattern")
    at = entries(pattern)
    shape = (pattern.batches, pattern.heads, pattern.rows, pattern.cols)
    table = torch.full(shape, -2, dtype=torch.int64)  # -2: skipped, -1: full, else the bitmap
    table[at.batch, at.head, at.row, at.col] = -1 if pattern.bitmap_index is None else pattern.bitmap_index.long()
    counts, columns = _ordered(table >= 0)
    full_counts, full_columns = _ordered(table == -1)
    return BlockMask.from_kv_blocks(
        counts.to(device),
        columns.to(device),
        full_counts.to(device),
        full_columns.to(device),
        BLOCK_SIZE=pattern.block,
        mask_mod=_mask_mod(pattern, table, device),
        seq_lengths=pattern.shape,
    )


def _ordered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[..., rows]`` and columns ``[..., rows, cols]``, kept ones first and ascending; both int32."""
    return kept.sum(-1).int(), torch.argsort(kept.byte(), dim=-1, descending=True, stable=True).int()


def _mask_mod(pattern: BlockPattern, table: Tensor, device: Any) -> Callable[..., Tensor]:
    block_q, block_k = pattern.block
    batched, headed = pattern.batches > 1, pattern.heads > 1
    table = table.to(device)
    bitmaps = torch.zeros(1, block_q, 1, dtype=torch.int64) if pattern.bitmaps is None else pattern.bitmaps
    bitmaps = bitmaps.to(device)

    def admits(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kind = table[b if batched else b * 0, h if headed else h * 0, q // block_q, k // block_k]
        key = k % block_k
        word = bitmaps[kind.clamp(min=0), q % block_q, (key // 64).clamp(max=bitmaps.shape[2] - 1)]
        return (kind == -1) | ((kind >= 0) & (((word >> (key % 64)) & 1) == 1))

    return admits
