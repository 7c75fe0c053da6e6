"""DeepSpeed's sparse-attention layouts without DeepSpeed, which dropped its own sparse attention.

A layout is an integer tensor ``[heads, rows, cols]``, non-zero where a block is kept. The config classes make the
layouts that DeepSpeed's documentation describes (https://www.deepspeed.ai/tutorials/sparse-attention and the page of
sparse-attention options in its JSON configuration), with its argument names and defaults; ``Fixed`` is Child et al.
2019 ("Generating Long Sequences with Sparse Transformers"), ``BigBird`` Zaheer et al. 2020, ``BSLongformer`` a block
form of Beltagy et al. 2020. ``attention="unidirectional"`` layouts are of blocks: pass ``causal=True`` to the attention
call for the tokens inside the blocks of the diagonal.

Random blocks are drawn from ``seed``, so a layout is the same in every process. With ``seed=None`` they come from
Python's global generator, in DeepSpeed's order: after the same ``random.seed(n)`` its layouts and these are equal.

Where DeepSpeed does not do what it describes, the description holds: a unidirectional layout has nothing above the
diagonal (its Fixed and Variable ones have, inside a group of several global blocks; with ``causal=True`` both give the
same attention), and a row with fewer earlier blocks than ``num_random_blocks`` takes all of them (its BigBird fails).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pattern import BlockPattern
from ..pattern.checks import check_int, check_tensor


def from_layout(layout: Tensor, *, block: int, seqlen: int | None = None) -> BlockPattern:
    """The pattern of a layout: integer or bool ``[heads, rows, cols]``. ``seqlen``: default ``rows * block``. Heads
    that are all alike become one pattern head.

    Example:
        >>> layout = torch.eye(8, dtype=torch.int64)[None]  # [heads, rows, cols]
        >>> tessera.interop.from_layout(layout, block=64).num_blocks
        8
    """
    check_tensor("layout", layout)
    if layout.dim() != 3 or layout.shape[1] != layout.shape[2]:
        raise ValueError(f"layout: got {list(layout.shape)}; allowed: [heads, rows, rows]")
    kept = layout.detach().cpu() != 0
    if kept.shape[0] > 1 and bool((kept == kept[:1]).all()):
        kept = kept[:1]
    seqlen = layout.shape[1] * check_int("block", block) if seqlen is None else seqlen
    return BlockPattern.from_mask(kept, seqlen_q=seqlen, seqlen_k=seqlen, block=block)


def to_layout(pattern: BlockPattern, num_heads: int | None = None) -> Tensor:
    """The layout of a pattern: int64 ``[heads, rows, cols]``; a pattern of one head is repeated ``num_heads`` times.
    ValueError for patterns that a layout cannot say (bitmaps, batches, unequal block sizes).

    Example:
        >>> tessera.interop.to_layout(tessera.patterns.causal(512, block=64), num_heads=2).shape
        torch.Size([2, 8, 8])
    """
    if pattern.bitmaps is not None or pattern.batches != 1 or pattern.block_q != pattern.block_k:
        raise ValueError(f"pattern: got {pattern!r}; allowed: full square blocks, one batch")
    layout = pattern.to_mask()[0].long()
    if num_heads is None or num_heads == pattern.heads:
        return layout
    if pattern.heads != 1:
        raise ValueError(f"num_heads: got {num_heads}; allowed: {pattern.heads}, the heads of the pattern")
    return layout.repeat(num_heads, 1, 1)


def from_sparsity_config(config: Any, seqlen: int) -> BlockPattern:
    """The pattern that a config makes for a length: one of the classes here, DeepSpeed's own, or anything with
    ``block`` and ``make_layout(seq_len)``.

    Example:
        >>> from tessera.interop.deepspeed import FixedSparsityConfig
        >>> config = FixedSparsityConfig(num_heads=2, block=64)
        >>> tessera.interop.from_sparsity_config(config, 512).shape
        (512, 512)
    """
    if not hasattr(config, "make_layout") or not hasattr(config, "block"):
        raise TypeError(f"config: got {type(config).__name__}; allowed: an object with block and make_layout(seq_len)")
    return from_layout(torch.as_tensor(config.make_layout(seqlen)), block=config.block, seqlen=seqlen)


class SparsityConfig:
    """What all layouts share.

    Args:
        num_heads: heads of the attention.
        block: tokens of a block, a multiple of 16 in 16..256.
        different_layout_per_head: heads have layouts of their own; otherwise all have that of the first.

    Example:
        >>> from tessera.interop.deepspeed import SparsityConfig
        >>> SparsityConfig(num_heads=2, block=64).num_heads
        2
    """

    attention = "bidirectional"

    def __init__(self, num_heads: int, block: int = 16, different_layout_per_head: bool = False) -> None:
        self.num_heads = check_int("num_heads", num_heads, 1)
        self.block = check_int("block", block, 16)
        if block % 16 or block > 256:
            raise ValueError(f"block: got {block}; allowed: a multiple of 16 in 16..256")
        self.different_layout_per_head = bool(different_layout_per_head)

    def make_layout(self, seq_len: int) -> Tensor:
        """int64 ``[num_heads, rows, rows]``, rows = seq_len / block. ValueError if block does not divide seq_len."""
        if check_int("seq_len", seq_len, 0) % self.block:
            raise ValueError(f"seq_len: got {seq_len}; allowed: a multiple of block = {self.block}")
        rows = seq_len // self.block
        layout = torch.zeros(self.num_heads, rows, rows, dtype=torch.int64)
        for h in range(self.num_heads if self.different_layout_per_head else 1):
            self._fill(layout[h], h)
            if self.attention == "unidirectional":
                layout[h].tril_()
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout

    def make_pattern(self, seq_len: int) -> BlockPattern:
        """:func:`from_layout` of :meth:`make_layout`."""
        return from_layout(self.make_layout(seq_len), block=self.block)

    def _fill(self, layout: Tensor, head: int) -> None:
        """Sets what one head keeps in layout ``[rows, rows]``."""
        raise NotImplementedError


class DenseSparsityConfig(SparsityConfig):
    """Every block.

    Example:
        >>> from tessera.interop.deepspeed import DenseSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(DenseSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def _fill(self, layout: Tensor, head: int) -> None:
        layout.fill_(1)


class FixedSparsityConfig(SparsityConfig):
    """Local windows of ``num_local_blocks``, one after the other, and in each window ``num_global_blocks``
    representatives that everybody sees (unidirectional: everybody after them): the last ones, or, with
    ``num_different_global_patterns``, by head the last, the last but one, ... group. ``horizontal_global_attention``:
    they also see everybody.

    Example:
        >>> from tessera.interop.deepspeed import FixedSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(FixedSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_local_blocks = check_int("num_local_blocks", num_local_blocks, 1)
        self.num_global_blocks = check_int("num_global_blocks", num_global_blocks, 1)
        if num_local_blocks % num_global_blocks:
            raise ValueError(
                f"num_local_blocks: got {num_local_blocks}; allowed: a multiple of num_global_blocks = "
                f"{num_global_blocks}"
            )
        self.attention = _check_attention(attention, horizontal_global_attention)
        self.horizontal_global_attention = bool(horizontal_global_attention)
        groups = num_local_blocks // num_global_blocks
        self.num_different_global_patterns = num_different_global_patterns
        check_int("num_different_global_patterns", num_different_global_patterns, 1)
        if num_different_global_patterns > 1 and not different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns: got {num_different_global_patterns}; allowed: 1 unless "
                "different_layout_per_head"
            )
        if num_different_global_patterns > groups:
            raise ValueError(
                f"num_different_global_patterns: got {num_different_global_patterns}; allowed: up to {groups}, "
                "num_local_blocks / num_global_blocks"
            )

    def _fill(self, layout: Tensor, head: int) -> None:
        rows = layout.shape[0]
        for start in range(0, rows, self.num_local_blocks):
            end = start + self.num_local_blocks
            layout[start:end, start:end] = 1
        width = self.num_global_blocks
        first = self.num_local_blocks - (1 + head % self.num_different_global_patterns) * width
        whole = rows - rows % self.num_local_blocks
        starts = list(range(first, whole, self.num_local_blocks))
        if whole < rows:  # a window cut short has representatives too
            starts.append(max(0, min(whole + first, rows - width)))
        for start in starts:
            _global(layout, start, start + width, self.horizontal_global_attention)


class VariableSparsityConfig(SparsityConfig):
    """Local windows of the sizes in ``local_window_blocks``, the last size again to the end; global blocks by index, or
    ranges of them up to ``global_block_end_indices``; ``num_random_blocks`` a row.

    Example:
        >>> from tessera.interop.deepspeed import VariableSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(VariableSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = check_int("num_random_blocks", num_random_blocks, 0)
        self.local_window_blocks = [check_int("local_window_blocks", n, 1) for n in local_window_blocks]
        if not self.local_window_blocks:
            raise ValueError("local_window_blocks: got none; allowed: one size or more")
        self.global_ranges = _ranges(global_block_indices, global_block_end_indices)
        self.attention = _check_attention(attention, horizontal_global_attention)
        self.horizontal_global_attention = bool(horizontal_global_attention)
        self.seed = seed

    def _fill(self, layout: Tensor, head: int) -> None:
        rows = layout.shape[0]
        _random(layout, self.num_random_blocks, False, self.seed, head)
        start, sizes = 0, list(self.local_window_blocks)
        while start < rows:
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            layout[start : start + size, start : start + size] = 1
            start += size
        for begin, end in self.global_ranges:
            _global(layout, begin, end, self.horizontal_global_attention)


class BigBirdSparsityConfig(SparsityConfig):
    """``num_random_blocks`` a row, a sliding window of ``num_sliding_window_blocks`` around the diagonal, and the first
    ``num_global_blocks`` as rows and columns.

    Example:
        >>> from tessera.interop.deepspeed import BigBirdSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(BigBirdSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        seed: int | None = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = check_int("num_random_blocks", num_random_blocks, 0)
        self.num_sliding_window_blocks = check_int("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.num_global_blocks = check_int("num_global_blocks", num_global_blocks, 0)
        self.attention = _check_attention(attention, False)
        self.seed = seed

    def _fill(self, layout: Tensor, head: int) -> None:
        _random(layout, self.num_random_blocks, self.attention == "unidirectional", self.seed, head)
        _sliding(layout, self.num_sliding_window_blocks)
        _at_least("num_global_blocks", self.num_global_blocks, layout)
        _global(layout, 0, self.num_global_blocks, True)


class BSLongformerSparsityConfig(SparsityConfig):
    """A sliding window of ``num_sliding_window_blocks`` around the diagonal, and global blocks as rows and columns: by
    index, or ranges of them up to ``global_block_end_indices``.

    Example:
        >>> from tessera.interop.deepspeed import BSLongformerSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(BSLongformerSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_sliding_window_blocks = check_int("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.global_ranges = _ranges(global_block_indices, global_block_end_indices)
        self.attention = _check_attention(attention, False)

    def _fill(self, layout: Tensor, head: int) -> None:
        _sliding(layout, self.num_sliding_window_blocks)
        for begin, end in self.global_ranges:
            _global(layout, begin, end, True)


class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A sliding window of ``num_sliding_window_blocks`` around the diagonal; unidirectional (the default here): its
    earlier half.

    Example:
        >>> from tessera.interop.deepspeed import LocalSlidingWindowSparsityConfig, from_sparsity_config
        >>> from_sparsity_config(LocalSlidingWindowSparsityConfig(num_heads=2, block=64), 1024).shape
        (1024, 1024)
    """

    def __init__(
        self, num_heads: int, block: int = 16, num_sliding_window_blocks: int = 3, attention: str = "unidirectional"
    ) -> None:
        super().__init__(num_heads, block)
        self.num_sliding_window_blocks = check_int("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.attention = _check_attention(attention, False)

    def _fill(self, layout: Tensor, head: int) -> None:
        _sliding(layout, self.num_sliding_window_blocks)


# ---- pieces of layouts; layout is [rows, rows] of one head, written in place


def _check_attention(attention: str, horizontal: bool) -> str:
    if attention not in ("bidirectional", "unidirectional"):
        raise ValueError(f'attention: got {attention!r}; allowed: "bidirectional" or "unidirectional"')
    if horizontal and attention == "unidirectional":
        raise ValueError('horizontal_global_attention: got True; allowed: False with attention="unidirectional"')
    return attention


def _ranges(starts: Sequence[int], ends: Sequence[int] | None) -> list[tuple[int, int]]:
    begins = [check_int("global_block_indices", i, 0) for i in starts]
    if ends is None:
        return [(i, i + 1) for i in begins]
    if len(ends) != len(begins):
        raise ValueError(f"global_block_end_indices: got {len(ends)}; allowed: {len(begins)}, one for each start")
    pairs = list(zip(begins, (check_int("global_block_end_indices", i, 0) for i in ends)))
    for begin, end in pairs:
        if end <= begin:
            raise ValueError(f"global_block_end_indices: got {end}; allowed: above its start, {begin}")
    return pairs


def _at_least(name: str, wanted: int, layout: Tensor) -> None:
    if wanted > layout.shape[0]:
        raise ValueError(f"{name}: got {wanted}; allowed: up to {layout.shape[0]}, the blocks of the sequence")


def _global(layout: Tensor, begin: int, end: int, horizontal: bool) -> None:
    layout[:, begin:end] = 1
    if horizontal:
        layout[begin:end, :] = 1


def _sliding(layout: Tensor, width: int) -> None:
    _at_least("num_sliding_window_blocks", width, layout)
    place = torch.arange(layout.shape[0])
    layout[(place[:, None] - place).abs() <= width // 2] = 1


def _random(layout: Tensor, count: int, causal: bool, seed: int | None, head: int) -> None:
    _at_least("num_random_blocks", count, layout)
    draw: Any = random if seed is None else random.Random(f"{seed} {head}")
    for row in range(layout.shape[0] if count else 0):
        end = row + 1 if causal else layout.shape[0]
        layout[row, draw.sample(range(end), min(count, end))] = 1
