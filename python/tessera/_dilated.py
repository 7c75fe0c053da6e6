"""Dilated attention (LongNet) seen from outside: how much it keeps, its weights in block form, its quality.

The attention itself is the core's (include/tessera/dilated.h); here is only what describes it. ``inner`` below is a
function n -> BlockPattern: the pattern inside a dilated segment of n tokens, or None for dense segments.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional
from ._pattern import BlockPattern

Inner = Callable[[int], BlockPattern]


@dataclass(frozen=True)
class Part:
    """Rows start + offset, + rate, ... < stop of the heads offset, offset + rate, ...: they attend among themselves."""

    start: int
    stop: int
    rate: int
    offset: int

    @property
    def length(self) -> int:
        return max(0, -(-(self.stop - self.start - self.offset) // self.rate))

    @property
    def rows(self) -> slice:
        return slice(self.start + self.offset, self.stop, self.rate)

    @property
    def heads(self) -> slice:
        return slice(self.offset, None, self.rate)


def parts(seqlen: int, heads: int, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> Iterator[Part]:
    """All dilated segments that hold a row, of every (segment length, rate)."""
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        for start in range(0, seqlen, width):
            for offset in range(min(rate, heads)):
                part = Part(start, min(start + width, seqlen), rate, offset)
                if part.length > 0:
                    yield part


def token_pairs(pattern: BlockPattern, causal: bool) -> int:
    """Admitted (q, k) pairs of a pattern without bitmaps, over its heads and batches; causal: bottom-right aligned."""
    indptr = pattern.indptr.long()
    blocks = torch.repeat_interleave(torch.arange(indptr.numel() - 1), indptr.diff())
    rows_a_head = -(-pattern.seqlen_q // pattern.block_q) if pattern.seqlen_q else 1
    first_q = (blocks % rows_a_head) * pattern.block_q
    first_k = pattern.indices.long() * pattern.block_k
    rows = (pattern.seqlen_q - first_q).clamp(max=pattern.block_q)
    keys = (pattern.seqlen_k - first_k).clamp(max=pattern.block_k)
    if not causal:
        return int((rows * keys).sum())
    # Row t of a block sees clamp(seen + t, 0, keys) of its keys; sums of that are differences of this one.
    seen = first_q + pattern.seqlen_k - pattern.seqlen_q - first_k + 1

    def summed(x: Tensor) -> Tensor:
        inside = torch.minimum(x.clamp(min=0), keys)
        return inside * (inside + 1) // 2 + (x - keys).clamp(min=0) * keys

    return int((summed(seen + rows - 1) - summed(seen - 1)).sum())


def density(
    seqlen: int,
    heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool,
    inner: Inner | None,
) -> float:
    """Admitted (q, k) pairs, counted once for each (w, r) that admits them, over those of dense attention."""
    memo: dict[int, float] = {}

    def pairs(n: int) -> float:
        if n not in memo:
            full = n * (n + 1) // 2 if causal else n * n
            if inner is None:
                memo[n] = full
            else:
                pattern = inner(n)
                memo[n] = token_pairs(pattern, causal) / max(1, pattern.heads)
        return memo[n]

    kept = sum(
        pairs(part.length) * len(range(heads)[part.heads])
        for part in parts(seqlen, heads, segment_lengths, dilation_rates)
    )
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen)
    return kept / dense if dense else 0.0


def _key_heads(kv: Tensor, heads: int, part: Part) -> Tensor:
    """The key heads [B, n, |heads|, D] that the query heads of a part read."""
    group = heads // kv.shape[2]
    return kv[:, part.rows, [head // group for head in range(heads)[part.heads]]]


@torch.no_grad()
def weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool,
    scale: float | None,
    block_size: int,
    inner: Inner | None,
) -> tuple[Tensor, Tensor]:
    """Normalised weights of the joined softmax in blocks of the whole sequence.

    q [B, S, H, D], k [B, S, Hkv, D], lse [B, H, S] of the joined softmax. Returns block_indices int64 [n, 4] (batch,
    head, row, column), sorted, and values fp32 [n, block_size, block_size]: a key that several (w, r) admit has the
    sum. Only blocks that hold an admitted pair are there; a rate of r spreads a block over up to r x r of them.
    """
    batch, seqlen, heads, _ = q.shape
    blocks = -(-seqlen // block_size)
    found: list[tuple[Tensor, Tensor]] = []  # flat places in [B, H, blocks, blocks, block_size, block_size], values
    for part in parts(seqlen, heads, segment_lengths, dilation_rates):
        n = part.length
        sub_q, sub_k = q[:, part.rows, part.heads], _key_heads(k, heads, part)
        pattern = inner(n) if inner is not None else _dense(n, block_size, causal)
        _, part_lse = functional.block_sparse_attention(
            sub_q, sub_k, sub_k, pattern, causal=causal or None, scale=scale, return_lse=True
        )
        blocks_at, values, _, _ = functional.attention_weights(
            sub_q, sub_k, pattern, causal=causal or None, scale=scale
        )
        for at in range(0, len(blocks_at), 64):
            b, h, row, col = (column[:, None, None] for column in blocks_at[at : at + 64].unbind(1))
            value = values[at : at + 64]
            i = row * pattern.block_q + torch.arange(pattern.block_q)[None, :, None]
            j = col * pattern.block_k + torch.arange(pattern.block_k)[None, None, :]
            token_q = part.start + part.offset + i * part.rate
            token_k = part.start + part.offset + j * part.rate
            head = part.offset + h * part.rate
            inside = (i < n) & (j < n) & (value > 0)
            # Its own softmax becomes a share of the joined one.
            share = torch.exp(part_lse[b, h, i.clamp(max=n - 1)] - lse[b, head, token_q.clamp(max=seqlen - 1)])
            place = ((b * heads + head) * blocks + token_q // block_size) * blocks + token_k // block_size
            place = (place * block_size + token_q % block_size) * block_size + token_k % block_size
            found.append((place[inside], (value * share)[inside]))
    area = block_size * block_size
    if not found:
        return torch.empty(0, 4, dtype=torch.int64), torch.empty(0, block_size, block_size)
    # Neighbours lie in the same block: a linear pass leaves little to sort.
    kept = torch.unique(torch.cat([torch.unique_consecutive(place // area) for place, _ in found]))
    values = torch.zeros(len(kept) * area)
    for place, value in found:
        values.index_add_(0, torch.searchsorted(kept, place // area) * area + place % area, value.float())
    unraveled = torch.stack(torch.unravel_index(kept, (batch, heads, blocks, blocks)), dim=1)
    return unraveled, values.view(-1, block_size, block_size)


def _dense(n: int, block: int, causal: bool) -> BlockPattern:
    from . import patterns

    return patterns.dense(n, n, block=block, causal=causal)


def admitted_keys(
    row: int,
    head: int,
    seqlen: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool,
    inner: Inner | None,
) -> Tensor:
    """bool [S]: the keys that any (w, r) admits for one query."""
    mask = torch.zeros(seqlen, dtype=torch.bool)
    for width, rate in zip(segment_lengths, dilation_rates, strict=True):
        start = row - row % width
        part = Part(start, min(start + width, seqlen), rate, head % rate)
        place, off = divmod(row - start - part.offset, rate)
        if off or place < 0:
            continue
        local = torch.zeros(part.length, dtype=torch.bool)
        if inner is None:
            local[:] = True
        else:
            pattern = inner(part.length)
            line = place // pattern.block_q
            for column in pattern.indices[int(pattern.indptr[line]) : int(pattern.indptr[line + 1])].tolist():
                local[column * pattern.block_k : (column + 1) * pattern.block_k] = True
        if causal:
            local[place + 1 :] = False
        mask[part.rows] |= local
    return mask


@torch.no_grad()
def sampled_quality(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool,
    scale: float | None,
    inner: Inner | None,
    rows: int,
) -> tuple[float, float]:
    """(share of the true attention mass that lies on admitted keys: mean over sampled rows; |out - dense| / |dense|
    over them). One row at random in each of ``rows`` equal parts of the sequence; one row of scores is held."""
    batch, seqlen, heads, dim = q.shape
    rows = min(rows, seqlen)
    generator = torch.Generator().manual_seed(0)
    edges = torch.linspace(0, seqlen, rows + 1).long()
    picks = [
        int(torch.randint(int(a), max(int(b), int(a) + 1), (), generator=generator))
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    group = heads // k.shape[2]
    factor = dim**-0.5 if scale is None else scale
    mass = count = error = norm = 0.0
    for row in picks:
        for head in range(heads):
            mask = admitted_keys(row, head, seqlen, segment_lengths, dilation_rates, causal, inner)
            keys = row + 1 if causal else seqlen
            for b in range(batch):
                scores = (k[b, :keys, head // group].float() @ q[b, row, head].float()) * factor
                true = torch.softmax(scores, 0)
                dense = true @ v[b, :keys, head // group].float()
                mass += float(true[mask[:keys]].sum())
                count += 1
                error += float((out[b, row, head].float() - dense).square().sum())
                norm += float(dense.square().sum())
    return (mass / count if count else float("nan")), ((error / norm) ** 0.5 if norm else float("nan"))


def _alike(heads: int, rates: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(head, how many heads keep the same as it) for the heads' offsets in segments of these rates."""
    for offsets, count in Counter(tuple(h % rate for rate in rates) for h in range(heads)).items():
        yield next(h for h in range(heads) if tuple(h % rate for rate in rates) == offsets), count


def segment_density(seqlen: int, heads: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
                    inner: Inner) -> float:  # fmt: skip
    """(q, k) pairs that any (w, r) admits over those of dense attention, in [0, 1]: one that several admit counts once.
    inner: as above, of blocks of ``block`` tokens."""
    inner = functools.cache(inner)
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen)
    if not dense:
        return 0.0
    kept = round(density(seqlen, heads, widths, rates, causal, inner) * dense)
    # Every (w, r) starts anew with each period.
    period = math.lcm(*widths)
    for length, times in ((period, seqlen // period), (seqlen % period, 1)):
        if length and times:
            kept -= times * sum(count * _repeated(length, head, widths, rates, block, causal, inner)
                                for head, count in _alike(heads, rates))  # fmt: skip
    return kept / dense


def _repeated(length: int, head: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
              inner: Inner) -> int:  # fmt: skip
    """How often the (w, r) admit pairs of this head again that one admits already. Rows that lie in one row of blocks
    of every (w, r) see the same keys: a group of them is looked at once."""
    rows = torch.arange(length)
    group, covers = torch.zeros_like(rows), torch.zeros_like(rows)
    for width, rate in zip(widths, rates, strict=True):
        place = rows % width - head % rate
        inside = (place >= 0) & (place % rate == 0)
        line = torch.where(inside, 1 + rows // width * width + place // rate // block, 0)
        group = torch.unique(group * (length + 1) + line, return_inverse=True)[1]
        covers += inside
    rows, group = rows[covers > 1], group[covers > 1]
    total = 0
    for same in rows[group.argsort(stable=True)].split(group.unique(return_counts=True)[1].tolist()):
        row = int(same[0])
        parts = [Part(row - row % width, min(row - row % width + width, length), rate, head % rate)
                 for width, rate in sorted(zip(widths, rates, strict=True))
                 if row % width >= head % rate and (row % width - head % rate) % rate == 0]  # fmt: skip
        # What two admit lies in a segment that is not the widest.
        first, stop = min(p.start for p in parts[:-1]), max(p.stop for p in parts[:-1])
        hits = torch.zeros(stop - first, dtype=torch.int32)
        for part in parts:
            pattern = inner(part.length)
            mine = (row - part.start - part.offset) // part.rate // block
            kept = torch.zeros(-(-part.length // block), dtype=torch.bool)
            kept[pattern.indices[int(pattern.indptr[mine]) : int(pattern.indptr[mine + 1])].long()] = True
            begin = part.start + part.offset
            low, high = (min(max(0, -(-(at - begin) // part.rate)), part.length) for at in (first, stop))
            if low < high:
                hits[begin + low * part.rate - first :: part.rate][: high - low] += kept[
                    torch.arange(low, high) // block
                ]
        again = (hits - 1).clamp(min=0)
        if causal:
            total += int(again.cumsum(0)[same - first].sum())
        else:
            total += len(same) * int(again.sum())
    return total


def segment_blocks(seqlen: int, heads: int, widths: Sequence[int], rates: Sequence[int], block: int, causal: bool,
                   inner: Inner) -> int:  # fmt: skip
    """Blocks of the whole sequence, over all heads, that hold a pair which any (w, r) admits: those of
    weights(). A rate of r spreads a block over up to r x r of them."""
    inner = functools.cache(inner)
    side = -(-seqlen // block)
    total = 0
    for head, count in _alike(heads, rates):
        found = [torch.empty(0, dtype=torch.int64)]
        for width, rate in zip(widths, rates, strict=True):
            # Rows of an inner block at most a block apart: they touch all the blocks that it touches.
            picks = torch.tensor([*range(0, block, max(1, block // rate)), block - 1])
            for start in range(0, seqlen, width):
                part = Part(start, min(start + width, seqlen), rate, head % rate)
                if part.length == 0:
                    continue
                pattern = inner(part.length)
                lines = torch.arange(-(-part.length // block))
                local = (lines[:, None] * block + picks).clamp(max=part.length - 1)
                touched = (start + part.offset + local * rate) // block
                row = touched[torch.repeat_interleave(lines, pattern.indptr.long().diff())][:, :, None]
                column = touched[pattern.indices.long()][:, None, :]
                places = row * side + column
                found.append(places[(row >= column) | (not causal)].unique())
        total += count * len(torch.cat(found).unique())
    return total
