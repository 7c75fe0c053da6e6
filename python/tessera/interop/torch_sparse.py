"""Tensors of ``torch.sparse`` and masks, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pattern import BlockPattern
from ..pattern.checks import check_block, check_int, check_tensor
from ._blocks import Entries, entries, from_entries, pack, token_blocks


def from_torch(
    tensor: Tensor,
    *,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    block: int | Sequence[int] | None = None,
) -> BlockPattern:
    """A pattern from a tensor: non-zero keeps.

    Args:
        tensor: by layout,
            strided or sparse CSR or COO ``[rows, cols]``, also with heads, or batches and heads in front: a matrix of
            blocks, as :meth:`tessera.BlockPattern.from_mask`; stored zeros do not count;
            sparse BSR ``[seqlen_q, seqlen_k]``, also with heads, or batches and heads in front: token pairs, block by
            block; a block with some non-zeros gets a bitmap, one with none is not kept.
        seqlen_q, seqlen_k: tokens. Needed for matrices of blocks; of a BSR tensor, whose sides are whole blocks, they
            say where the sequences end inside the last ones.
        block: tokens of a block, default 128; a BSR tensor brings its own.

    Raises:
        TypeError: no tensor. ValueError: another layout, or sizes that do not fit together.

    Example:
        >>> kept = torch.eye(8).to_sparse_csr()
        >>> tessera.interop.from_torch(kept, seqlen_q=512, seqlen_k=512, block=64).num_blocks
        8
    """
    check_tensor("tensor", tensor)
    tensor = tensor.detach().cpu()
    if tensor.layout not in (torch.strided, torch.sparse_csr, torch.sparse_coo, torch.sparse_bsr):
        raise ValueError(f"tensor: got layout {tensor.layout}; allowed: strided, sparse_csr, sparse_bsr, sparse_coo")
    if not 2 <= tensor.dim() <= 4:
        raise ValueError(f"tensor: got {tensor.dim()} dimensions; allowed: 2, with heads 3, with batches too 4")
    seqlen_q = None if seqlen_q is None else check_int("seqlen_q", seqlen_q, 0)
    seqlen_k = None if seqlen_k is None else check_int("seqlen_k", seqlen_k, 0)
    if tensor.layout == torch.sparse_bsr:
        return _from_bsr(tensor, seqlen_q, seqlen_k, block)
    if seqlen_q is None or seqlen_k is None:
        raise ValueError("seqlen_q, seqlen_k: got None; allowed: the lengths in tokens, where the tensor is of blocks")
    sizes = check_block(128 if block is None else block)
    if tensor.layout == torch.strided:
        return BlockPattern.from_mask(tensor != 0, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block=sizes)
    rows, cols = -(-seqlen_q // sizes[0]), -(-seqlen_k // sizes[1])
    if tuple(tensor.shape[-2:]) != (rows, cols):
        raise ValueError(f"tensor: got {list(tensor.shape[-2:])} blocks; allowed: [{rows}, {cols}] for these lengths")
    lead = tensor.shape[:-2]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        place, values = tensor.indices(), tensor.values()
        if values.dim() != 1:
            raise ValueError(f"tensor: got {values.dim() - 1} dense dimensions; allowed: 0")
        batch, head = _leading(place[:-2], place.shape[1])
        row, col = place[-2], place[-1]
    else:
        counts = tensor.crow_indices().diff()  # [..., rows]
        line = torch.repeat_interleave(counts.reshape(-1))
        slab, row = line // max(rows, 1), line % max(rows, 1)
        heads = lead[-1] if lead else 1
        batch, head = slab // max(heads, 1), slab % max(heads, 1)
        col, values = tensor.col_indices().reshape(-1), tensor.values().reshape(-1)
    kept = values != 0
    return from_entries(
        Entries(*(x.long()[kept] for x in (batch, head, row, col))),
        None,
        None,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block=sizes,
        heads=lead[-1] if lead else 1,
        batches=lead[0] if len(lead) == 2 else 1,
    )


def _leading(place: Tensor, n: int) -> tuple[Tensor, Tensor]:
    none = torch.zeros(n, dtype=torch.int64)
    return (place[0] if place.shape[0] == 2 else none), (place[-1] if place.shape[0] else none)


def _from_bsr(
    tensor: Tensor, seqlen_q: int | None, seqlen_k: int | None, block: int | Sequence[int] | None
) -> BlockPattern:
    values = tensor.values()
    lead = tensor.shape[:-2]
    if values.dim() != len(lead) + 3:
        raise ValueError(f"tensor: got {list(tensor.shape)} in BSR; allowed: [Sq, Sk], with heads or batches, heads")
    sizes = (int(values.shape[-2]), int(values.shape[-1]))
    if block is not None and check_block(block) != sizes:
        raise ValueError(f"block: got {block}; allowed: None or {sizes}, the blocks of the BSR tensor")
    seqlen_q = tensor.shape[-2] if seqlen_q is None else seqlen_q
    seqlen_k = tensor.shape[-1] if seqlen_k is None else seqlen_k
    for name, length, side, size in (
        ("seqlen_q", seqlen_q, tensor.shape[-2], sizes[0]),
        ("seqlen_k", seqlen_k, tensor.shape[-1], sizes[1]),
    ):
        if -(-length // size) * size != side:
            raise ValueError(f"{name}: got {length}; allowed: {side - size + 1}..{side}, in its last block")
    rows = tensor.shape[-2] // sizes[0]
    line = torch.repeat_interleave(tensor.crow_indices().diff().reshape(-1))
    slab, heads = line // max(rows, 1), lead[-1] if lead else 1
    at = Entries(slab // heads, slab % heads, line % max(rows, 1), tensor.col_indices().reshape(-1).long())
    return from_entries(
        at,
        torch.arange(line.numel()),
        pack(values.reshape(-1, *sizes) != 0),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block=sizes,
        heads=heads,
        batches=lead[0] if len(lead) == 2 else 1,
    )


def to_torch(
    pattern: BlockPattern, layout: str = "csr", *, head: int = 0, batch: int = 0, dtype: torch.dtype = torch.bool
) -> Tensor:
    """One head of a pattern as a tensor of ones.

    Args:
        layout: "csr" or "coo": blocks ``[rows, cols]``, which forgets bitmaps (ValueError where there are some);
            "bsr": token pairs ``[rows * block_q, cols * block_k]``, zero past the ends and where a bitmap says so.
            The dense form is :meth:`tessera.BlockPattern.to_mask`.
        head, batch: which one, 0 .. heads - 1 and 0 .. batches - 1 of the pattern.

    Example:
        >>> tessera.interop.to_torch(tessera.patterns.causal(512, block=64)).layout
        torch.sparse_csr
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern: got {type(pattern).__name__}; allowed: tessera.BlockPattern")
    if layout not in ("csr", "coo", "bsr"):
        raise ValueError(f'layout: got {layout!r}; allowed: "csr", "coo" or "bsr"')
    for name, index, end in (("head", head, pattern.heads), ("batch", batch, pattern.batches)):
        if not 0 <= check_int(name, index) < end:
            raise ValueError(f"{name}: got {index}; allowed: 0..{end - 1}")
    if layout != "bsr" and pattern.bitmaps is not None:
        raise ValueError(f'layout: got {layout!r} for a pattern with partial blocks; allowed: "bsr", which keeps them')
    at = entries(pattern)
    mine = ((at.head == head) & (at.batch == batch)).nonzero().squeeze(-1)
    row, col = at.row[mine], at.col[mine]
    if layout == "coo":
        ones = torch.ones(mine.numel(), dtype=dtype)
        return torch.sparse_coo_tensor(torch.stack([row, col]), ones, (pattern.rows, pattern.cols), is_coalesced=True)
    crow = torch.zeros(pattern.rows + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(row, minlength=pattern.rows).cumsum(0)
    if layout == "csr":
        ones = torch.ones(mine.numel(), dtype=dtype)
        return torch.sparse_csr_tensor(crow, col, ones, (pattern.rows, pattern.cols))
    size = (pattern.rows * pattern.block_q, pattern.cols * pattern.block_k)
    return torch.sparse_bsr_tensor(crow, col, token_blocks(pattern, mine).to(dtype), size)
