"""Sparse matrices of SciPy, both ways. SciPy is loaded when a function is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..pattern import BlockPattern
from .torch_sparse import from_torch, to_torch


def from_scipy(
    matrix: Any, *, seqlen_q: int | None = None, seqlen_k: int | None = None, block: int | Sequence[int] | None = None
) -> BlockPattern:
    """A pattern from a SciPy sparse matrix or array, or a sequence of them, one a head: non-zero keeps.

    BSR is token pairs with blocks of its own; any other format is a matrix of blocks ``[rows, cols]``, for which
    ``seqlen_q`` and ``seqlen_k`` are needed. As :func:`tessera.interop.from_torch`.

    Example:
        >>> import scipy.sparse
        >>> kept = scipy.sparse.csr_array(torch.eye(8).numpy())
        >>> tessera.interop.from_scipy(kept, seqlen_q=512, seqlen_k=512, block=64).num_blocks
        8
    """
    import scipy.sparse

    if isinstance(matrix, (list, tuple)):
        if not matrix:
            raise ValueError("matrix: got an empty sequence; allowed: a matrix a head")
        sizes: dict[str, Any] = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "block": block}
        return BlockPattern.stack_heads([from_scipy(m, **sizes) for m in matrix])
    if not scipy.sparse.issparse(matrix):
        raise TypeError(f"matrix: got {type(matrix).__name__}; allowed: a sparse matrix or array of SciPy")
    if matrix.ndim != 2:
        raise ValueError(f"matrix: got {matrix.ndim} dimensions; allowed: 2")
    build = torch.sparse_bsr_tensor if matrix.format == "bsr" else torch.sparse_csr_tensor
    if matrix.format != "bsr":
        matrix = matrix.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    tensor = build(
        torch.from_numpy(matrix.indptr.astype("int64")),
        torch.from_numpy(matrix.indices.astype("int64")),
        torch.from_numpy(matrix.data != 0),
        matrix.shape,
    )
    return from_torch(tensor, seqlen_q=seqlen_q, seqlen_k=seqlen_k, block=block)


def to_scipy(pattern: BlockPattern, format: str = "csr", *, head: int = 0, batch: int = 0) -> Any:
    """One head of a pattern as a ``scipy.sparse`` array of bool: "csr" (blocks ``[rows, cols]``) or "bsr" (token
    pairs). As :func:`tessera.interop.to_torch`.

    Example:
        >>> tessera.interop.to_scipy(tessera.patterns.causal(512, block=64)).nnz
        36
    """
    import scipy.sparse

    if format not in ("csr", "bsr"):
        raise ValueError(f'format: got {format!r}; allowed: "csr" or "bsr"')
    t = to_torch(pattern, format, head=head, batch=batch)
    parts = (t.values().numpy(), t.col_indices().numpy(), t.crow_indices().numpy())
    if format == "csr":
        return scipy.sparse.csr_array(parts, shape=tuple(t.shape))
    return scipy.sparse.bsr_array(parts, shape=tuple(t.shape), blocksize=pattern.block)
