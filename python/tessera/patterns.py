"""The named patterns. Each function returns a :class:`tessera.BlockPattern`, made in O(kept blocks), deterministically.

Common arguments: ``seqlen_q``, ``seqlen_k`` (default: seqlen_q) in tokens; ``block``, an int or (block_q, block_k),
each a multiple of 16 in 16..256; ``causal`` admits the block pairs that hold at least one (q, k) with
``k <= q + seqlen_k - seqlen_q``, and the pattern carries it: calls that take it are causal to the token; ``heads`` is
1, or the number of heads where they shall differ. ``density`` is the KEPT share of the admissible pairs, in (0, 1].
Every row of blocks keeps the same number of them, as far as it has them, so that all together come nearest to the
density (``budget="even"``), or each ``max(1, round(density * admissible in the row))`` (``budget="proportional"``);
always its diagonal. Explicit geometry (window, global_tokens, stride) wins over density; the achieved density is
``pattern.density``. ``q_offset``: the queries are rows of a longer sequence, tokens q_offset .. q_offset + seqlen_q -
1; each sees the blocks that it sees in the pattern of the whole, whose length, ``seqlen_total``, is to be given where
steps of different lengths have to agree (budgets are of the whole; default: the longer of seqlen_k and q_offset +
seqlen_q). seqlen_k is then, if not given, that of the keys which the queries may see. Errors: ValueError or TypeError
naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from .pattern import BlockPattern
from .pattern.checks import check_block, check_int
from .pattern.mask_mod import pattern_of_mask_mod
from .pattern.spec import NAMES, CacheStats, PatternCache, Request, Spec, cache, filled, of_spec, spec

__all__ = [
    "NAMES", "CacheStats", "Named", "PatternCache", "Request", "Spec", "bigbird", "cache", "causal", "dense",
    "dilated_segments", "dilated_sparse", "from_mask_mod", "global_local", "hierarchical", "local_window", "make",
    "of_spec", "random", "spec", "strided",
]  # fmt: skip


class Named:
    """A source: the pattern of one name with its options, for any lengths; made once a process.

    Example:
        >>> named = tessera.patterns.Named("random", block=64, density=0.3, seed=7)
        >>> tessera.BlockSparseAttention(named).pattern is named
        True
    """

    def __init__(self, name: str, *, block: int | Sequence[int] = 128, **options: Any) -> None:
        self.template = spec(name, 0, 0, block=block, **options)

    def pattern_for(self, request: Request) -> BlockPattern:
        """The pattern of a request, from :data:`cache`."""
        return cache.find(filled(self.template, request, self.template.heads))


class Rows(TypedDict, total=False):
    """Where the queries stand, and how a density is shared out; see the top of this module."""

    budget: str
    q_offset: int | None
    seqlen_total: int | None


def make(
    name: str,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    block: int | Sequence[int] = 128,
    causal: bool = False,
    heads: int = 1,
    cached: bool = False,
    **options: Any,
) -> BlockPattern:
    """The pattern of that name, with the options of the function of that name. ``cached``: through :data:`cache`.

    Example:
        >>> tessera.patterns.make("strided", 512, block=64, stride=4, causal=True)
        BlockPattern(512 x 512, block 64 x 64, 19 blocks, density 0.5278, causal)
    """
    defined = spec(name, seqlen_q, seqlen_k, block=block, causal=causal, heads=heads, **options)
    return cache.find(defined) if cached else of_spec(defined)


def dense(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, causal: bool = False,
    heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """Every admissible pair.

    Example:
        >>> tessera.patterns.dense(512, 256, block=64)
        BlockPattern(512 x 256, block 64 x 64, 32 blocks, density 1)
    """
    return make("dense", seqlen_q, seqlen_k, block=block, causal=causal, heads=heads, **rows)


def causal(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """Every pair that causality admits. Calls that take it are causal to the token.

    Example:
        >>> tessera.patterns.causal(512, block=64)
        BlockPattern(512 x 512, block 64 x 64, 36 blocks, density 1, causal)
    """
    return make("causal", seqlen_q, seqlen_k, block=block, causal=True, heads=heads, **rows)


def local_window(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, window: int | None = None,
    density: float | None = None, causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """Pairs whose tokens come within ``window / 2`` on either side (causal: ``window`` back), or with ``density`` alone
    the nearest pairs up to the budget.

    Example:
        >>> print(tessera.patterns.local_window(384, block=64, window=64, causal=True).ascii())
        #.....
        ##....
        .##...
        ..##..
        ...##.
        ....##
    """
    return make(
        "local_window", seqlen_q, seqlen_k, block=block, window=window, density=density, causal=causal, heads=heads,
        **rows,
    )  # fmt: skip


def dilated_sparse(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, density: float,
    dilation_rates: Sequence[int] | None = None, causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """The budget shared round-robin among ``dilation_rates`` (blocks; default 1, 2, 4, 8, 16): each rate r in turn adds
    its next unused nearest pair at distance +-r, +-2r, ...

    Example:
        >>> tessera.patterns.dilated_sparse(1024, block=64, density=0.2, causal=True)
        BlockPattern(1024 x 1024, block 64 x 64, 31 blocks, density 0.2279, causal)
    """
    return make(
        "dilated_sparse", seqlen_q, seqlen_k, block=block, density=density, dilation_rates=dilation_rates,
        causal=causal, heads=heads, **rows,
    )  # fmt: skip


def global_local(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, global_tokens: int | None = None,
    window: int | None = None, density: float | None = None, causal: bool = False, heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """The first ``global_tokens`` (default 64) as rows and columns, and the local window (or density).

    Example:
        >>> print(tessera.patterns.global_local(384, block=64, global_tokens=64, window=64).ascii())
        ######
        ###...
        ####..
        #.###.
        #..###
        #...##
    """
    return make(
        "global_local", seqlen_q, seqlen_k, block=block, global_tokens=global_tokens, window=window, density=density,
        causal=causal, heads=heads, **rows,
    )  # fmt: skip


def strided(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, stride: int | None = None,
    density: float | None = None, causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """``(i - j) % stride == 0``, or neighbours (Child et al. 2019).

    Example:
        >>> print(tessera.patterns.strided(384, block=64, stride=3, causal=True).ascii())
        #.....
        ##....
        .##...
        #.##..
        .#.##.
        ..#.##
    """
    return make(
        "strided", seqlen_q, seqlen_k, block=block, stride=stride, density=density, causal=causal, heads=heads,
        **rows,
    )  # fmt: skip


def random(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, density: float, seed: int = 0,
    causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """Random pairs, exactly the budget a row; every (seed, head, row) draws on its own.

    Example:
        >>> tessera.patterns.random(1024, block=64, density=0.25, heads=4)
        BlockPattern(1024 x 1024, block 64 x 64, 256 blocks, density 0.25, 4 heads)
    """
    return make(
        "random", seqlen_q, seqlen_k, block=block, density=density, seed=seed, causal=causal, heads=heads, **rows,
    )  # fmt: skip


def bigbird(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, density: float,
    global_tokens: int | None = None, window: int | None = None, seed: int = 0, causal: bool = False, heads: int = 1,
    **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """Global, window and random pairs up to the budget (Zaheer et al. 2020).

    Example:
        >>> tessera.patterns.bigbird(1024, block=64, density=0.3, seed=1)
        BlockPattern(1024 x 1024, block 64 x 64, 76 blocks, density 0.2969)
    """
    return make(
        "bigbird", seqlen_q, seqlen_k, block=block, density=density, global_tokens=global_tokens, window=window,
        seed=seed, causal=causal, heads=heads, **rows,
    )  # fmt: skip


def dilated_segments(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, segment_lengths: Sequence[int],
    dilation_rates: Sequence[int], causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """LongNet on blocks (Ding et al. 2023): for some (w, r) the same segment of w tokens and i = j = offset (mod r),
    the offset shifting by head.

    Example:
        >>> tessera.patterns.dilated_segments(1024, block=64, segment_lengths=(256, 1024), dilation_rates=(1, 4))
        BlockPattern(1024 x 1024, block 64 x 64, 76 blocks, density 0.2969)
    """
    return make(
        "dilated_segments", seqlen_q, seqlen_k, block=block, segment_lengths=segment_lengths,
        dilation_rates=dilation_rates, causal=causal, heads=heads, **rows,
    )  # fmt: skip


def hierarchical(
    seqlen_q: int, seqlen_k: int | None = None, *, block: int | Sequence[int] = 128, density: float | None = None,
    local_density: float | None = None, global_density: float | None = None, inter_node_density: float | None = None,
    ranks: int = 1, ranks_per_node: int = 1, causal: bool = False, heads: int = 1, **rows: Unpack[Rows],
) -> BlockPattern:  # fmt: skip
    """By place: one density inside a rank, one inside a node, one across nodes (``density`` for those not given); far
    parts keep the same columns for all rows of a rank.

    Example:
        >>> tessera.patterns.hierarchical(1024, block=64, local_density=0.5, global_density=0.1,
        ...     inter_node_density=0.1, ranks=4)
        BlockPattern(1024 x 1024, block 64 x 64, 48 blocks, density 0.1875)
    """
    return make(
        "hierarchical", seqlen_q, seqlen_k, block=block, density=density, local_density=local_density,
        global_density=global_density, inter_node_density=inter_node_density, ranks=ranks,
        ranks_per_node=ranks_per_node, causal=causal, heads=heads, **rows,
    )  # fmt: skip


def from_mask_mod(
    mask_mod: Callable[..., Tensor], seqlen_q: int, seqlen_k: int | None = None, *,
    block: int | Sequence[int] = 128, heads: int = 1, batches: int = 1, device: torch.device | str = "cpu",
) -> BlockPattern:  # fmt: skip
    """The pairs that FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)`` admits, exactly: blocks with some pairs only get
    a bitmap. Every pair is asked once (a second at 16,384 tokens), many in one go under ``torch.vmap``, nothing of
    ``seqlen_q x seqlen_k`` is held.

    Args:
        mask_mod: from int64 scalars to a bool. It may read tensors, which are on ``device``.
        heads, batches: how many of them it tells apart; h counts to heads - 1, b to batches - 1.

    Raises:
        TypeError, ValueError: naming the argument; also if mask_mod does not return a bool tensor.

    Example:
        >>> sinks = lambda b, h, q, k: (q >= k) & ((q - k < 128) | (k < 4))
        >>> print(tessera.patterns.from_mask_mod(sinks, 384, block=64).ascii())
        +.....
        #+....
        +#+...
        ++#+..
        +.+#+.
        +..+#+
    """
    if not callable(mask_mod):
        raise TypeError(f"mask_mod: got {type(mask_mod).__name__}; allowed: a function of (b, h, q_idx, kv_idx)")
    seqlen_q = check_int("seqlen_q", seqlen_q, 0)
    return pattern_of_mask_mod(
        mask_mod, seqlen_q=seqlen_q, seqlen_k=seqlen_q if seqlen_k is None else check_int("seqlen_k", seqlen_k, 0),
        block=check_block(block), heads=check_int("heads", heads, 1), batches=check_int("batches", batches, 1),
        device=device,
    )  # fmt: skip


# What torch.load(weights_only=True) may make: what configurations hold.
torch.serialization.add_safe_globals([Named])
