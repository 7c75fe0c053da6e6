"""Judging patterns against the true attention of real queries and keys, and pictures. Exact and streamed: nothing of
size Sq x Sk is held. q: ``[B, Sq, H, D]``, k: ``[B, Sk, Hkv, D]``, v: ``[B, Sk, Hkv, Dv]``, or with
``layout="bhsd"`` heads before tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from . import _ops
from . import patterns as named_patterns
from .attention.functional import as_bshd, other_layout, pack_options
from .pattern import BlockPattern
from .pattern.block_pattern import by_name
from .pattern.checks import axes, check_block, check_bool, check_index, check_int, check_tensor

_t = torch.ops.tessera


class Quality(NamedTuple):
    """How much of the true attention a pattern holds.

    Example:
        >>> q, k = (torch.randn(1, 512, 2, 32) for _ in range(2))
        >>> found = tessera.analysis.quality(q, k, None, tessera.patterns.causal(512))
        >>> round(found.coverage, 4), found.density, found.rows
        (1.0, 1.0, 1024)
    """

    coverage: float  # share of the true attention mass in the kept blocks: mean over rows, 0..1
    coverage_p5: float  # ... the row at the 5th percentile
    coverage_min: float  # ... the worst row
    density: float  # kept / admissible block pairs
    efficiency: float  # coverage / density
    locality: float  # coverage of the nearest blocks to the diagonal at the same budget
    oracle_coverage: float  # of the best choice of whole blocks at the same budget
    oracle_ratio: float  # coverage / oracle_coverage
    bound_coverage: float  # the most that any choice of as many blocks keeps, over all rows
    output_error: float  # |sparse - dense| / |dense| of the outputs; NaN without v
    rows: int  # token rows judged


class Options(TypedDict, total=False):
    """What the true attention is, as arguments of :func:`tessera.block_sparse_attention`.

    Example:
        >>> options: tessera.analysis.Options = {"window": 128, "softcap": 30.0}
        >>> q, k = (torch.randn(1, 512, 2, 32) for _ in range(2))
        >>> mass = tessera.analysis.attention_mass(q, k, causal=True, **options)
    """

    scale: float | None
    window: int | tuple[int | None, int | None] | None
    key_lengths: Tensor | None
    softcap: float
    alibi_slopes: Tensor | None
    attn_bias: Tensor | None
    sinks: Tensor | None
    q_offset: int | None
    k_offset: int


def _options(causal: bool | None, given: Options, carried: bool = False) -> dict[str, Any]:
    """As the operators take them."""
    if unknown := given.keys() - Options.__annotations__.keys():
        raise TypeError(f"{min(unknown)}: got an option of that name; allowed: {', '.join(Options.__annotations__)}")
    packed = pack_options(carried, {"causal": causal, **given})
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in packed.items()}


def quality(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    pattern: BlockPattern | Sequence[BlockPattern],
    *,
    causal: bool | None = None,
    sample_rows: int = 0,
    seed: int = 0,
    per_head: bool = False,
    layout: str = "bshd",
    **options: Unpack[Options],
) -> Any:
    """Quality of a pattern (:class:`Quality`) or of several (a list: those of one block size share a pass).

    The true attention is the dense one under ``causal`` (None: as the pattern) and ``options`` (:class:`Options`). Mass
    is shared among keys: what ``sinks`` take is left out.
    ``sample_rows``: about so many token rows of each head, 0: all. ``per_head``: (all, [one a (batch, head)]).
    ``layout``: "bshd", or "bhsd" for heads before tokens.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> pattern = tessera.patterns.local_window(512, block=64, density=0.3, causal=True)
        >>> found = tessera.analysis.quality(q, k, v, pattern)
        >>> 0 < found.coverage <= found.bound_coverage < 1
        True
    """
    several = not isinstance(pattern, BlockPattern)
    patterns = [pattern] if isinstance(pattern, BlockPattern) else list(pattern)
    found = _judge(q, k, v, patterns, causal, sample_rows, seed, options, layout)
    results = found if per_head else [whole for whole, _ in found]
    return results if several else results[0]


def quality_if_finite(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, causal: bool | None = None, sample_rows: int = 0,
    **options: Unpack[Options],
) -> Quality | None:  # fmt: skip
    """:func:`quality`; None where an admitted score or value is NaN or infinite, which attention takes and a share of
    its mass cannot be said of.

    Example:
        >>> q, k, v = (torch.randn(1, 512, 4, 32) for _ in range(3))
        >>> pattern = tessera.patterns.causal(512)
        >>> tessera.analysis.quality_if_finite(q / 0, k, v, pattern) is None
        True
    """
    found = _judge(q, k, v, [pattern], causal, sample_rows, 0, options, skip_not_finite=True)
    return found[0][0] if found else None


def _judge(
    q: Tensor, k: Tensor, v: Tensor | None, patterns: list[Any], causal: bool | None, sample_rows: int, seed: int,
    options: Options, layout: str = "bshd", **how: bool,
) -> list[tuple[Quality, list[Quality]]]:  # fmt: skip
    """Of each pattern: all together, and each (batch, head)."""
    for p in patterns:
        if not isinstance(p, BlockPattern):
            raise TypeError(f"pattern: got {type(p).__name__}; allowed: BlockPattern, or several")
    tensors = as_bshd(layout, q=q, k=k, **({} if v is None else {"v": v}))
    packed = _options(causal, options, bool(patterns) and all(p.causal for p in patterns))
    try:
        names, figures = _t.quality(
            tensors["q"],
            tensors["k"],
            tensors.get("v"),
            *_ops.pattern_lists(patterns),
            check_int("sample_rows", sample_rows, 0),
            check_int("seed", seed),
            **how,
            **packed,
        )
    except ValueError as error:
        if patterns and (hint := other_layout(tensors["q"], tensors["k"], patterns[0], layout)):
            raise ValueError(f"{error}{hint}") from None
        raise
    found = [[by_name(Quality, dict(zip(names, row))) for row in table] for table in figures.tolist()]
    return [(table[0], table[1:]) for table in found]


class OptimizeResult(NamedTuple):
    """What :meth:`AttentionMass.optimize` found.

    Example:
        >>> q, k = (torch.randn(1, 512, 2, 32) for _ in range(2))
        >>> found = tessera.analysis.attention_mass(q, k, block=64, causal=True).optimize(0.8)
        >>> found.reached, found.bound_density <= found.density
        (True, True)
    """

    spec: dict[str, Any]  # name and options of the cheapest pattern that reaches the target (or of most coverage)
    coverage: float
    density: float
    reached: bool
    oracle_density: float  # of the cheapest per-row choice that reaches the target
    bound_density: float  # no pattern does with less
    evaluated: int
    candidates: list[
        tuple[dict[str, Any], float, float, bool]
    ]  # the best of each kind: spec, coverage, density, reached


def _candidate(found: dict[str, Any]) -> tuple[dict[str, Any], float, float, bool]:
    spec = {"name": found["spec"].pop("kind"), **found["spec"]}
    return spec, found["coverage"], found["density"], found["reached"]


class AttentionMass:
    """The true attention summed over blocks, from :func:`attention_mass`. ``values``: fp32 ``[B, H, rows, cols]``, the
    mean over a row's tokens of their mass in the block.

    Example:
        >>> q, k = (torch.randn(1, 512, 2, 32) for _ in range(2))
        >>> mass = tessera.analysis.attention_mass(q, k, block=64, causal=True)
        >>> pattern = mass.oracle_pattern(0.3)
        >>> coverage, density = mass.coverage(pattern)
        >>> coverage <= mass.coverage(mass.bound_pattern(density))[0] + 1e-6
        True
    """

    def __init__(self, parts: Sequence[Any], causal: bool) -> None:
        self._parts = tuple(parts)
        self.causal = causal

    @property
    def values(self) -> Tensor:
        return self._parts[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(seqlen_q, seqlen_k)."""
        return self._parts[4][0], self._parts[4][1]

    @property
    def block(self) -> tuple[int, int]:
        """(block_q, block_k)."""
        return self._parts[4][2], self._parts[4][3]

    def coverage(self, pattern: BlockPattern) -> tuple[float, float]:
        """(coverage, density) of a pattern without bitmaps, in O(kept blocks)."""
        found = _t.mass_coverage(*self._parts, *pattern.op_args)
        return found["coverage"], found["density"]

    def oracle_pattern(self, density: float, budget: str = "even") -> BlockPattern:
        """In each row the blocks of most mass, up to the row's budget of the density (:mod:`tessera.patterns`)."""
        return BlockPattern._make(_t.oracle_pattern(*self._parts, float(density), budget))

    def oracle_coverage(self, density: float, budget: str = "even") -> float:
        """Coverage of :meth:`oracle_pattern`."""
        return _t.oracle_coverage(*self._parts, float(density), budget)

    def oracle_density(self, coverage: float, budget: str = "even") -> float:
        """Density of the cheapest oracle pattern that reaches ``coverage``."""
        return _t.oracle_density(*self._parts, float(coverage), budget)

    def bound_pattern(self, density: float) -> BlockPattern:
        """The best pattern of all: the blocks of most mass, chosen freely over all rows, heads and batches."""
        return BlockPattern._make(_t.bound_pattern(*self._parts, float(density)))

    def bound_density(self, coverage: float) -> float:
        """No pattern of whole blocks reaches ``coverage`` with less."""
        return _t.bound_density(*self._parts, float(coverage))

    def optimize(self, target_coverage: float = 0.9, names: Sequence[str] = (), seed: int = 0) -> OptimizeResult:
        """The cheapest named pattern that reaches the target coverage (mean over rows, heads and batches)."""
        found = json.loads(
            _t.optimize(*self._parts, self.causal, float(target_coverage), list(names), check_int("seed", seed))
        )
        best, *others = (_candidate(x) for x in (found.pop("best"), *found.pop("candidates")))
        return OptimizeResult(*best, **found, candidates=others)

    def plot(self, ax: Any = None, *, pattern: BlockPattern | None = None, head: int = 0, batch: int = 0) -> Any:
        """Draws one head's mass (logarithmic) on matplotlib's axes (default: the current ones) and returns them. With a
        pattern of this length and block its blocks are framed, and the title says what of the mass they keep.

        Example:
            >>> q = torch.randn(1, 512, 1, 16)
            >>> mass = tessera.analysis.attention_mass(q, q, block=64, causal=True)
            >>> ax = mass.plot(pattern=mass.oracle_pattern(0.2))  # doctest: +SKIP
        """
        batches, heads, rows, cols = self.values.shape
        values = self.values[check_index("batch", batch, batches), check_index("head", head, heads)]
        width, height = cols * self.block[1], rows * self.block[0]
        ax = axes(ax)
        first, last = (x.view(-1, rows)[batch, :, None] for x in self._parts[2:4])
        outside = (torch.arange(cols) < first) | (torch.arange(cols) >= last)  # what no query may see: no colour
        shown = values.clamp(min=1e-4).log10().masked_fill(outside, float("nan"))
        image = ax.imshow(shown, cmap="viridis", vmin=-4, vmax=0, interpolation="nearest", extent=(0, width, height, 0))
        ax.figure.colorbar(image, ax=ax, label="log10 of the share of a row's attention")
        title = f"attention mass, head {head}"
        if pattern is not None:
            coverage, density = self.coverage(pattern)
            kept = pattern.to_mask().expand(batches, heads, -1, -1)[batch, head].float()
            _frame(ax, kept, self.block)
            title += f"\nthe pattern keeps {coverage:.1%} at density {density:.2g} (all heads)"
        ax.set(xlabel="key", ylabel="query", title=title)
        return ax

    def make(self, spec: dict[str, Any]) -> BlockPattern:
        """The pattern of a spec that :meth:`optimize` gave."""
        options = dict(spec)
        return named_patterns.make(options.pop("name"), *self.shape, block=self.block, **options)


def _frame(ax: Any, kept: Tensor, block: tuple[int, int]) -> None:
    """Lines between kept blocks and others, and around all of them."""
    padded = torch.nn.functional.pad(kept, (1, 1, 1, 1))
    across, down = padded.diff(dim=0)[:, 1:-1].nonzero(), padded.diff(dim=1)[1:-1].nonzero()
    y, x = across[:, 0] * block[0], across[:, 1] * block[1]
    ax.hlines(y, x, x + block[1], colors="red", linewidths=0.8)
    y, x = down[:, 0] * block[0], down[:, 1] * block[1]
    ax.vlines(x, y, y + block[0], colors="red", linewidths=0.8)


def attention_mass(
    q: Tensor,
    k: Tensor,
    *,
    block: int | tuple[int, int] = 128,
    causal: bool | None = None,
    max_bytes: int = 1 << 32,
    layout: str = "bshd",
    **options: Unpack[Options],
) -> AttentionMass:
    """The true attention of q and k summed over blocks. ``options``: :class:`Options`; ``layout`` as
    :func:`quality`. ValueError if it would need more than ``max_bytes``.

    Example:
        >>> q, k = (torch.randn(1, 512, 2, 32) for _ in range(2))
        >>> mass = tessera.analysis.attention_mass(q, k, block=64, causal=True)
        >>> mass.values.shape
        torch.Size([1, 2, 8, 8])
        >>> torch.allclose(mass.values.sum(-1), torch.ones(1, 2, 8))  # a row's attention is 1
        True
    """
    tensors = as_bshd(layout, q=q, k=k)
    sizes = check_block(block)
    parts = _t.attention_mass(
        tensors["q"], tensors["k"], *sizes, check_int("max_bytes", max_bytes), **_options(causal, options)
    )
    return AttentionMass(parts, bool(causal))


# ---- pictures: uint8 [height, width, 3]


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: str")
    return value


def draw_pattern(
    pattern: BlockPattern,
    title: str = "",
    *,
    batch: int = 0,
    head: int = 0,
    causal: bool | None = None,
    size: int = 512,
    legend: bool = True,
) -> Tensor:
    """Kept blocks full or partial; ``causal`` (None: the pattern's own) shades what causality excludes. ValueError or
    TypeError naming the argument.

    Example:
        >>> image = tessera.analysis.draw_pattern(tessera.patterns.causal(512, block=64), "causal")
        >>> image.dtype, image.shape[2]
        (torch.uint8, 3)
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern: got {type(pattern).__name__}; allowed: BlockPattern")
    return _t.draw_pattern(
        *pattern.op_args, _check_text("title", title), check_int("batch", batch, 0), check_int("head", head, 0),
        None if causal is None else check_bool("causal", causal), check_int("size", size), check_bool("legend", legend),
    )  # fmt: skip


def draw_heat_map(values: Tensor, title: str = "", **options: Any) -> Tensor:
    """Values ``[rows, cols]`` as colours. Options: seqlen_q, seqlen_k (for the axes), value_label, min, max, log_scale,
    size.

    Example:
        >>> image = tessera.analysis.draw_heat_map(torch.rand(8, 8), "mass", seqlen_q=512, seqlen_k=512)
        >>> image.dtype
        torch.uint8
    """
    return _t.draw_heat_map(check_tensor("values", values).detach(), _check_text("title", title), **options)


def draw_sheet(images: Sequence[Tensor], columns: int, title: str = "") -> Tensor:
    """Images in a grid, row by row.

    Example:
        >>> images = [tessera.analysis.draw_pattern(tessera.patterns.causal(n), str(n)) for n in (512, 1024)]
        >>> sheet = tessera.analysis.draw_sheet(images, 2, "two lengths")
        >>> sheet.shape[1] > images[0].shape[1]
        True
    """
    return _t.draw_sheet(list(images), check_int("columns", columns, 1), _check_text("title", title))


def draw_lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
    *,
    x_label: str = "",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    dashed: Sequence[str] = (),
) -> Tensor:
    """Curves: name -> (x, y).

    Example:
        >>> image = tessera.analysis.draw_lines({"coverage": ([0.1, 0.5, 1], [0.6, 0.9, 1])}, x_label="density")
        >>> image.dtype
        torch.uint8
    """
    x, y = ([torch.as_tensor(s[i], dtype=torch.float64) for s in series.values()] for i in (0, 1))
    which = [i for i, name in enumerate(series) if name in dashed]
    texts = [_check_text(n, x) for n, x in (("title", title), ("x_label", x_label), ("y_label", y_label))]
    return _t.draw_lines(list(series), x, y, which, *texts, log_x, log_y)


def write_png(image: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes beside the path and renames.

    Example:
        >>> image = tessera.analysis.draw_pattern(tessera.patterns.causal(512), "causal")
        >>> tessera.analysis.write_png(image, "causal.png")
    """
    _t.write_png(check_tensor("image", image), os.fspath(path))


def encode_png(image: Tensor) -> bytes:
    """The bytes of a PNG file.

    Example:
        >>> tessera.analysis.encode_png(torch.zeros(16, 16, 3, dtype=torch.uint8))[1:4]
        b'PNG'
    """
    return _t.encode_png(check_tensor("image", image)).numpy().tobytes()
