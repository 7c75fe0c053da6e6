"""Dilated attention (LongNet) seen from outside: how much it keeps, its weights in block form, its quality.

The attention itself is the core's (include/tessera/dilated.h); here is only what describes it. ``inner`` below is a
function n -> BlockPattern: the pattern inside a dilated segment of n tokens, or None for dense segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pattern import BlockPattern, Spec
from ..pattern.spec import of_spec
from . import functional

_t = torch.ops.tessera
Inner = Callable[[int], BlockPattern]


class Dilation(NamedTuple):
    """(w, r) and the pattern inside, as operators take them."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    inner: dict[str, Any]


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
    return of_spec(Spec("dense", n, n, block, block, causal=causal))


@torch.no_grad()
def sampled_quality(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dilation: Dilation, causal: bool, scale: float | None, rows: int
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
            mask = _t.dilated_keys(seqlen, head, row, causal, *dilation[:2], **dilation.inner)
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


def share(seqlen: int, heads: int, block: int, causal: bool, dilation: Dilation) -> tuple[float, int]:
    """(density, blocks): the (q, k) pairs that any (w, r) admits over those of dense attention, in [0, 1], one that
    several admit counted once; and the blocks of the whole sequence, over all heads, that may hold one: those of
    :func:`weights`. A rate of r spreads a block over up to r x r of them."""
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen * seqlen)
    found = _t.dilated_share(seqlen, heads, block, causal, *dilation[:2], **dilation.inner)
    return (found["pairs"] / dense if dense else 0.0), int(found["blocks"])
