"""BlockPattern: which blocks of the score matrix are computed, as an immutable value of a few integer tensors."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.utils._pytree as pytree

import torch
from torch import Tensor

from .. import _ops
from .checks import axes, check_block, check_bool, check_index, check_int, check_list, check_tensor, field_kinds

_t = torch.ops.tessera
_Slice = slice  # the built-in one, inside a class that has a method of that name


class Spread(NamedTuple):
    """Mean, smallest, largest and population standard deviation."""

    mean: float
    min: float
    max: float
    std: float


class PatternStatistics(NamedTuple):
    """What :meth:`BlockPattern.statistics` measures; over all pattern heads and batches.

    Densities count admissible pairs only: all, or with causality those that hold a (q, k) with
    ``k <= q + q_offset``.

    Example:
        >>> figures = tessera.patterns.causal(512, block=64).statistics()
        >>> figures.rows, figures.density, figures.empty_rows
        (8, 1.0, 0)
    """

    rows: int  # block rows and columns of one head
    cols: int
    kept_blocks: int
    partial_blocks: int  # those with a bitmap
    admissible_blocks: int
    density: float
    sparsity: float  # 1 - density
    row_density: Spread
    column_density: Spread
    diagonal_density: float  # share of the rows that keep their diagonal column
    empty_rows: int
    load_imbalance: float  # largest / mean kept blocks of a row


def by_name(cls: Any, figures: dict[str, float]) -> Any:
    """A named tuple of figures that come with their names; a part of another one as "name.part"."""

    def value(name: str, kind: str) -> Any:
        if kind == "Spread":
            return Spread(*(figures[f"{name}.{part}"] for part in Spread._fields))
        return int(figures[name]) if kind == "int" else figures[name]

    return cls(**{name: value(name, kind) for name, kind in field_kinds(cls).items()})


class BlockPattern:
    """The kept blocks of ``batches`` x ``heads`` score matrices ``[seqlen_q, seqlen_k]``, in blocks ``block_q`` x
    ``block_k`` (each a multiple of 16 in 16..256; the last row and column may be ragged).

    Immutable; made by :mod:`tessera.patterns`, by the ``from_...`` functions, or from other patterns. Validated once
    when it is made, and again by the operators, which take it as tensors.

    Attributes:
        indptr: int32 ``[batches * heads * rows + 1]``, where the blocks of each block row begin in ``indices``.
        indices: int32 ``[num_blocks]``, block columns, ascending in each row.
        bitmap_index: int32 ``[num_blocks]``, which bitmap (-1: the block is full); None when every block is full.
        bitmaps: int64 ``[n, block_q, ceil(block_k / 64)]``, bit ``k % 64`` of word ``k // 64`` admits key k; or None.
        seqlen_q, seqlen_k, block_q, block_k, heads, batches: int. heads and batches are 1 where all share a pattern.
        causal: bool. Calls that take a causal pattern are causal to the token without being told again.
        q_offset: position of query 0 among the keys; None: ``seqlen_k - seqlen_q``, and a pattern without causality may
            stand anywhere.
        q_skip: int, queries of the first block row that come before query 0 (rows of a longer sequence).

    Example:
        >>> kept = torch.eye(8, dtype=torch.bool)
        >>> kept[:, 0] = True
        >>> pattern = tessera.BlockPattern.from_mask(kept, seqlen_q=512, seqlen_k=512, block=64, causal=True)
        >>> pattern
        BlockPattern(512 x 512, block 64 x 64, 15 blocks, density 0.4167, causal)
        >>> (pattern | tessera.patterns.local_window(512, block=64, window=64, causal=True)).num_blocks
        21
    """

    indptr: Tensor
    indices: Tensor
    bitmap_index: Tensor | None
    bitmaps: Tensor | None
    seqlen_q: int
    seqlen_k: int
    block_q: int
    block_k: int
    heads: int
    batches: int
    causal: bool
    q_offset: int | None
    q_skip: int
    op_args: tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...]]  # as operators take it

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block: int | Sequence[int] = 128,
        heads: int = 1,
        batches: int = 1,
        bitmap_index: Tensor | None = None,
        bitmaps: Tensor | None = None,
        causal: bool = False,
        q_offset: int | None = None,
        q_skip: int = 0,
    ) -> None:
        """From CSR tensors as in the attributes. ValueError for anything that is not a pattern (negative, unsorted,
        duplicate or out-of-range indices, an indptr that falls)."""
        check_tensor("indptr", indptr), check_tensor("indices", indices)
        if bitmap_index is not None:
            check_tensor("bitmap_index", bitmap_index)
        if bitmaps is not None:
            check_tensor("bitmaps", bitmaps)
        shape = _shape_numbers(seqlen_q, seqlen_k, block, heads, batches, causal, q_offset, q_skip)
        self._set(*_t.pattern_canonical(indptr, indices, bitmap_index, bitmaps, shape))

    def _set(
        self, indptr: Any, indices: Any, bitmap_index: Any, bitmaps: Any, shape: Sequence[int]
    ) -> None:  # tensors; in traced graphs what stands for them
        if bitmaps is not None and bitmaps.numel() == 0:
            bitmap_index = bitmaps = None
        self._fill((indptr, indices, bitmap_index, bitmaps), tuple(shape))

    def _fill(self, tensors: Any, shape: tuple[Any, ...]) -> None:
        d = self.__dict__
        d["indptr"], d["indices"], d["bitmap_index"], d["bitmaps"] = tensors
        d["seqlen_q"], d["seqlen_k"], d["block_q"], d["block_k"], d["heads"], d["batches"], flags, at, skip = shape
        d["causal"], d["q_offset"], d["q_skip"] = bool(flags & 1), at if flags & 2 else None, skip
        d["op_args"] = (*tensors, shape)

    @classmethod
    def _make(cls, parts: Sequence[Any]) -> BlockPattern:
        self = object.__new__(cls)
        self._set(*parts)
        return self

    # ---- from what a caller holds

    @staticmethod
    def from_mask(
        mask: Tensor,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block: int | Sequence[int] = 128,
        causal: bool = False,
        q_offset: int | None = None,
    ) -> BlockPattern:
        """Blocks where ``mask`` is non-zero. mask: bool or integer ``[rows, cols]``, ``[heads, rows, cols]`` or
        ``[batches, heads, rows, cols]``, rows = ceil(seqlen_q / block_q), cols = ceil(seqlen_k / block_k)."""
        mask = _as_tensor("mask", mask)
        block_q, block_k = check_block(block)
        sizes = check_int("seqlen_q", seqlen_q), check_int("seqlen_k", seqlen_k)
        return BlockPattern._make(_t.pattern_from_mask(mask, *sizes, block_q, block_k))._placed(causal, q_offset)

    @staticmethod
    def from_token_mask(mask: Tensor, *, block: int | Sequence[int] = 128) -> BlockPattern:
        """Pairs where ``mask`` is non-zero; blocks with some pairs only get a bitmap. mask: bool or integer
        ``[seqlen_q, seqlen_k]``, with heads, or with batches and heads in front."""
        return BlockPattern._make(_t.pattern_from_token_mask(_as_tensor("mask", mask), *check_block(block)))

    @staticmethod
    def from_lists(
        lists: Sequence[Iterable[int]],
        *,
        seqlen_q: int,
        seqlen_k: int,
        block: int | Sequence[int] = 128,
        heads: int = 1,
        batches: int = 1,
        causal: bool = False,
        q_offset: int | None = None,
    ) -> BlockPattern:
        """The kept columns of each block row, in any order; rows of all heads of all batches one after the other."""
        rows = [
            sorted(check_int(f"lists[{i}]", j) for j in check_list(f"lists[{i}]", row, "the block columns of a row"))
            for i, row in enumerate(check_list("lists", lists, "block columns for each block row"))
        ]
        ends = [0]
        for row in rows:
            ends.append(ends[-1] + len(row))
        if any(j != j & 0x7FFFFFFF for row in rows for j in row):
            raise ValueError("lists: got a column below 0 or above 2^31; allowed: 0 .. cols - 1")
        flat = [j for row in rows for j in row]
        return BlockPattern(
            torch.tensor(ends, dtype=torch.int64),
            torch.tensor(flat, dtype=torch.int32),
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            block=block,
            heads=heads,
            batches=batches,
            causal=causal,
            q_offset=q_offset,
        )

    @staticmethod
    def from_csr(
        indptr: Tensor | Sequence[Tensor],
        indices: Tensor | Sequence[Tensor],
        blocks: Tensor | Sequence[Tensor] | None = None,
        *,
        seqlen_q: int,
        seqlen_k: int,
        block: int | Sequence[int] = 128,
        heads: int = 1,
        batches: int = 1,
        sort: bool = False,
        causal: bool = False,
        q_offset: int | None = None,
    ) -> BlockPattern:
        """One CSR matrix of blocks, or one a batch and head (batch first), as torch.sparse and SciPy hold them.

        Args:
            indptr: int32 or int64 ``[rows + 1]``.
            indices: int32 or int64 ``[entries]``, ascending in each row (``sort``: any order).
            blocks: None (every kept block is full), or bool or integer ``[entries, block_q, block_k]`` (BSR):
                non-zero admits the pair.
        """
        listed = [
            x if isinstance(x, (list, tuple)) else [x] for x in (indptr, indices, [] if blocks is None else blocks)
        ]
        for name, tensors in zip(("indptr", "indices", "blocks"), listed):
            for t in tensors:
                check_tensor(name, t)
        shape = _shape_numbers(seqlen_q, seqlen_k, block, heads, batches, causal, q_offset, 0)
        return BlockPattern._make(_t.pattern_from_csr(*listed, shape, check_bool("sort", sort)))

    # ---- from other patterns

    def __or__(self, other: BlockPattern) -> BlockPattern:
        """Admits what either admits. Lengths and blocks must agree; heads and batches too, or be 1."""
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return BlockPattern._make(_t.pattern_unite(*self.op_args, *other.op_args))

    def __and__(self, other: BlockPattern) -> BlockPattern:
        """Admits what both admit."""
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return BlockPattern._make(_t.pattern_intersect(*self.op_args, *other.op_args))

    def __sub__(self, other: BlockPattern) -> BlockPattern:
        """Admits what this one admits and the other does not."""
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return BlockPattern._make(_t.pattern_subtract(*self.op_args, *other.op_args))

    def __invert__(self) -> BlockPattern:
        """The admissible pairs (all, or those of causality) that this one does not admit."""
        return BlockPattern._make(_t.pattern_complement(*self.op_args))

    def with_causality(self, q_offset: int | None = None) -> BlockPattern:
        """The same blocks, causal to the token: query i admits keys up to position ``q_offset + i`` (default: where the
        pattern stands, else ``seqlen_k - seqlen_q``)."""
        at = None if q_offset is None else check_int("q_offset", q_offset)
        return BlockPattern._make(_t.pattern_make_causal(*self.op_args, at))

    def without_causality(self) -> BlockPattern:
        """The same pairs without the mark: causality becomes bitmaps of the blocks that it cuts."""
        return BlockPattern._make(_t.pattern_without_causality(*self.op_args))

    def for_queries(self, begin: int, end: int) -> BlockPattern:
        """Rows of a longer sequence: the pattern of queries begin .. end - 1, over the keys up to the last of them if
        causal, else over all. Every query sees the same pairs as in the whole; the position is carried along. What a
        decode step or a chunk of a prefill takes."""
        return BlockPattern._make(
            _t.pattern_for_queries(*self.op_args, check_int("begin", begin), check_int("end", end))
        )

    def blocks_only(self) -> BlockPattern:
        """The same blocks, neither causal nor made for a position: which pairs of a block count is left to the call."""
        return self._with_numbers(False, None, self.q_skip)

    def with_keys(self, seqlen_k: int) -> BlockPattern:
        """The same rows over the first ``seqlen_k`` keys. Blocks past them are dropped."""
        cols = -(-check_int("seqlen_k", seqlen_k, 0) // self.block_k)
        part = self.slice(cols=slice(cols))
        shape = _shape_numbers(
            self.seqlen_q, min(seqlen_k, self.seqlen_k), self.block, self.heads, self.batches, self.causal,
            self._diagonal, self.q_skip,
        )  # fmt: skip
        return BlockPattern._make(_t.pattern_canonical(*part.op_args[:4], shape))

    def _placed(self, causal: bool, q_offset: int | None) -> BlockPattern:
        """The same blocks, made for a place."""
        if not check_bool("causal", causal) and q_offset is None:
            return self
        return self._with_numbers(causal, q_offset, self.q_skip)

    def _with_numbers(self, causal: bool, q_offset: int | None, q_skip: int) -> BlockPattern:
        shape = _shape_numbers(*self.shape, self.block, self.heads, self.batches, causal, q_offset, q_skip)
        return BlockPattern._make(_t.pattern_canonical(*self.op_args[:4], shape))

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON of the program's ``--pattern-file``: beside the path, then renamed."""
        _t.pattern_save(*self.op_args, os.fspath(path))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BlockPattern:
        """What :meth:`save` or ``tessera pattern --output`` wrote. ValueError for anything else."""
        return BlockPattern._make(_t.pattern_load(os.fspath(path)))

    def to_json(self) -> str:
        """The text of :meth:`save`."""
        return _t.pattern_json(*self.op_args)

    @staticmethod
    def from_json(text: str) -> BlockPattern:
        """The pattern of such a text."""
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}; allowed: str")
        return BlockPattern._make(_t.pattern_from_json(text))

    # ---- parts

    def slice(self, rows: slice | None = None, cols: slice | None = None) -> BlockPattern:
        """Block rows and columns of two ranges (step 1), as ``pattern[rows, cols]``. The slice counts tokens from its
        own start; one of a pattern that is causal or has a position carries its own."""
        limits = []
        for name, s, n in (("rows", rows, self.rows), ("cols", cols, self.cols)):
            s = slice(None) if s is None else s
            if not isinstance(s, slice):
                raise TypeError(f"{name}: got {type(s).__name__}; allowed: a slice of block {name}")
            begin, end, step = s.indices(n)
            if step != 1:
                raise ValueError(f"{name}: got step {step}; allowed: 1")
            limits += [begin, max(begin, end)]
        return BlockPattern._make(_t.pattern_slice(*self.op_args, *limits))

    def __getitem__(self, key: _Slice | tuple[_Slice, _Slice]) -> BlockPattern:
        if isinstance(key, slice):
            key = (key, slice(None))
        if not isinstance(key, tuple) or len(key) != 2:
            raise TypeError(f"index: got {key!r}; allowed: pattern[rows, cols] with slices of block rows and columns")
        return self.slice(*key)

    def transpose(self) -> BlockPattern:
        """Rows become columns: lengths, block sizes and bitmaps change places."""
        return BlockPattern._make(_t.pattern_transpose(*self.op_args))

    @staticmethod
    def stack_heads(patterns: Sequence[BlockPattern]) -> BlockPattern:
        """Heads of all patterns, one after the other; everything else must agree."""
        return _stack(patterns, False)

    @staticmethod
    def stack_batches(patterns: Sequence[BlockPattern]) -> BlockPattern:
        """Batches of all patterns, one after the other; everything else must agree."""
        return _stack(patterns, True)

    # ---- what it is

    @property
    def rows(self) -> int:
        """Block rows of one head."""
        return -(-(self.q_skip + self.seqlen_q) // self.block_q) if self.q_skip else -(-self.seqlen_q // self.block_q)

    @property
    def cols(self) -> int:
        """Block columns of one head."""
        return -(-self.seqlen_k // self.block_k)

    @property
    def block(self) -> tuple[int, int]:
        """(block_q, block_k)."""
        return self.block_q, self.block_k

    @property
    def shape(self) -> tuple[int, int]:
        """(seqlen_q, seqlen_k)."""
        return self.seqlen_q, self.seqlen_k

    @property
    def num_blocks(self) -> int:
        """Kept block pairs over all pattern heads and batches."""
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Kept share of the admissible block pairs: all, or of a causal pattern those that causality admits."""
        if "_density" not in self.__dict__:
            self.__dict__["_density"] = self.statistics().density
        return self.__dict__["_density"]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.nbytes for t in self.op_args[:4] if t is not None)

    def statistics(self, causal: bool | None = None) -> PatternStatistics:
        """Densities, empty rows, load imbalance, among the admissible pairs. ``causal``: None is the pattern's own."""
        causal = None if causal is None else check_bool("causal", causal)
        return by_name(PatternStatistics, _t.pattern_statistics(*self.op_args, causal))

    def to_mask(self) -> Tensor:
        """Kept blocks (partial ones too) as bool ``[batches, heads, rows, cols]``. Grows with rows x cols."""
        counts = self.indptr.diff().long()
        row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        mask = torch.zeros(counts.numel(), self.cols, dtype=torch.bool)
        mask[row, self.indices.long()] = True
        return mask.view(self.batches, self.heads, self.rows, self.cols)

    def to_token_mask(self) -> Tensor:
        """Admitted pairs as bool ``[batches, heads, seqlen_q, seqlen_k]``: for tests and small lengths."""
        counts = self.indptr.diff().long()
        row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        full = torch.ones(self.num_blocks, self.block_q, self.block_k, dtype=torch.bool)
        if self.bitmap_index is not None and self.bitmaps is not None:
            bits = (self.bitmaps.unsqueeze(-1) >> torch.arange(64)) & 1
            bits = bits.flatten(2)[:, :, : self.block_k].bool()
            partial = self.bitmap_index >= 0
            full[partial] = bits[self.bitmap_index[partial].long()]
        tokens = torch.zeros(counts.numel(), self.cols, self.block_q, self.block_k, dtype=torch.bool)
        tokens[row, self.indices.long()] = full
        tokens = tokens.view(self.batches, self.heads, self.rows, self.cols, self.block_q, self.block_k)
        tokens = tokens.transpose(3, 4).reshape(
            self.batches, self.heads, self.rows * self.block_q, self.cols * self.block_k
        )
        tokens = tokens[:, :, self.q_skip : self.q_skip + self.seqlen_q, : self.seqlen_k].contiguous()
        return tokens.tril_(self._diagonal) if self.causal else tokens

    @property
    def _place(self) -> tuple[Any, ...]:
        """Sizes and where it stands, whether that was said or is the default."""
        return *self.op_args[4][:6], self.causal, self._diagonal, self.q_skip

    @property
    def _diagonal(self) -> int:
        """Position of query 0."""
        return self.seqlen_k - self.seqlen_q if self.q_offset is None else self.q_offset

    def ascii(self, head: int = 0, max_width: int = 80, batch: int = 0) -> str:
        """One head as text: '#' full, '+' partial, '.' skipped; wider patterns shaded by the kept share."""
        return _t.pattern_ascii(*self.op_args, head, max_width, batch)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPattern):
            return NotImplemented
        if self is other:
            return True
        if self._place != other._place or (self.bitmaps is None) != (other.bitmaps is None):
            return False
        pairs = zip(self.op_args[:4], other.op_args[:4])
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = _t.pattern_hash(*self.op_args)
        return self.__dict__["_hash"]

    def __repr__(self) -> str:
        parts = [
            f"BlockPattern({self.seqlen_q} x {self.seqlen_k}, block {self.block_q} x {self.block_k}",
            f"{self.num_blocks} blocks, density {self.density:.4g}",
        ]
        if self.causal:
            parts.append("causal")
        if self._diagonal != self.seqlen_k - self.seqlen_q:
            parts.append(f"queries from position {self._diagonal}")
        if self.heads > 1:
            parts.append(f"{self.heads} heads")
        if self.batches > 1:
            parts.append(f"{self.batches} batches")
        return ", ".join(parts) + ")"

    def _repr_png_(self) -> bytes:
        """What notebooks show: the first head, by the program's own picture."""
        return _t.encode_png(_t.draw_pattern(*self.op_args, "", 0, 0, None, 320, True)).numpy().tobytes()

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self._repr_png_()).decode()
        return f'<code>{html.escape(repr(self))}</code><br><img alt="" src="data:image/png;base64,{picture}">'

    def plot(self, ax: Any = None, *, head: int = 0, batch: int = 0) -> Any:
        """Draws one head on matplotlib's axes (default: the current ones) and returns them: full blocks dark, partial
        ones (with a bitmap, or cut by causality) lighter, tokens as coordinates.

        Example:
            >>> ax = tessera.patterns.bigbird(1024, block=64, density=0.3).plot()  # doctest: +SKIP
        """
        head, batch = check_index("head", head, self.heads), check_index("batch", batch, self.batches)
        kept = self.to_mask().expand(self.batches, self.heads, -1, -1)[batch, head].float()
        line = (batch * self.heads + head) * self.rows
        row = torch.repeat_interleave(self.indptr[line : line + self.rows + 1].diff().long())
        begin, end = int(self.indptr[line]), int(self.indptr[line + self.rows])
        col = self.indices[begin:end].long()
        if self.bitmap_index is not None:
            partial = self.bitmap_index[begin:end] >= 0
            kept[row[partial], col[partial]] = 0.5
        if self.causal:
            cut = (col + 1) * self.block_k - 1 > row * self.block_q - self.q_skip + self._diagonal
            kept[row[cut], col[cut]] = 0.5
        ax = axes(ax)
        width, top = self.cols * self.block_k, -self.q_skip  # the first block row may begin before query 0
        ax.imshow(
            kept,
            cmap="Blues",
            vmin=0,
            vmax=1.2,
            interpolation="nearest",
            extent=(0, width, self.rows * self.block_q + top, top),
        )
        ax.set(xlabel="key", ylabel="query", title=f"{self.num_blocks} blocks, density {self.density:.3g}")
        return ax

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a BlockPattern is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: a BlockPattern is immutable")

    def __copy__(self) -> BlockPattern:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPattern:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, self.op_args


def _shape_numbers(
    seqlen_q: int, seqlen_k: int, block: Any, heads: int, batches: int, causal: bool, q_offset: int | None, q_skip: int
) -> tuple[int, ...]:
    """As operators take them (shape_numbers of torch/convert.h)."""
    at = 0 if q_offset is None else check_int("q_offset", q_offset)
    flags = (1 if check_bool("causal", causal) else 0) | (0 if q_offset is None else 2)
    return (
        check_int("seqlen_q", seqlen_q), check_int("seqlen_k", seqlen_k), *check_block(block),
        check_int("heads", heads), check_int("batches", batches), flags, at, check_int("q_skip", q_skip),
    )  # fmt: skip


def _unpickle(
    indptr: Tensor, indices: Tensor, bitmap_index: Tensor | None, bitmaps: Tensor | None, shape: Sequence[int]
) -> BlockPattern:
    return BlockPattern._make(_t.pattern_canonical(indptr, indices, bitmap_index, bitmaps, shape))


def _as_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: got {type(value).__name__}; allowed: a tensor or array of bool") from None
    return value


def _stack(patterns: Sequence[BlockPattern], batches: bool) -> BlockPattern:
    patterns = check_list("patterns", patterns, "a sequence of BlockPattern")
    if not patterns:
        raise ValueError("patterns: got none; allowed: at least one BlockPattern")
    for p in patterns:
        if not isinstance(p, BlockPattern):
            raise TypeError(f"patterns: got {type(p).__name__} among them; allowed: BlockPattern")
    stack = _t.pattern_stack_batches if batches else _t.pattern_stack_heads
    return BlockPattern._make(stack(*_ops.pattern_lists(patterns)))


# A tree of four leaves for torch.export, torch.compile and vmap. Leaves need not be tensors: transforms put theirs in.
def _flatten(p: BlockPattern) -> tuple[list[Any], tuple[int, ...]]:
    return list(p.op_args[:4]), p.op_args[4]


def _unflatten(leaves: Iterable[Any], shape: Sequence[int]) -> BlockPattern:
    p = object.__new__(BlockPattern)
    p._fill(tuple(leaves), tuple(shape))
    return p


pytree.register_pytree_node(
    BlockPattern,
    _flatten,
    _unflatten,
    serialized_type_name="tessera.BlockPattern",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda p: (
        [(pytree.GetAttrKey(n), x) for n, x in zip(("indptr", "indices", "bitmap_index", "bitmaps"), p.op_args[:4])],
        p.op_args[4],
    ),
)


# What torch.load(weights_only=True) may make: only values, checked as they come.
torch.serialization.add_safe_globals([BlockPattern, _unpickle])
