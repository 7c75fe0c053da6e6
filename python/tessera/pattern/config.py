"""PatternConfig: the one value that says which pattern a module makes for the lengths it meets.

Numbers follow one rule everywhere: ``density`` is the KEPT share of the admissible block pairs, ``sparsity`` its
complement. ``sparsity_ratio`` is an older name of ``density``; as it has also been used for the dropped share, values
above 0.5 warn once a process.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .block_pattern import BlockPattern
from .checks import check_int, reject, suggestion
from .spec import Request, Spec, cache, filled, of_spec

# What each kind of pattern takes beside lengths, block size, heads and causality (include/tessera/patterns.h).
_OPTIONS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "causal": (),
    "local_window": ("density", "window"),
    "dilated_sparse": ("density", "dilation_rates"),
    "global_local": ("density", "window", "global_tokens"),
    "strided": ("density", "stride"),
    "random": ("density", "seed"),
    "bigbird": ("density", "window", "global_tokens", "seed"),
}
# Kinds whose heads draw patterns of their own.
_HEADS_DIFFER = ("random", "bigbird")

DEFAULT_DENSITY = 0.1
# Three ways to say one thing.
_DENSITY_NAMES = {"sparsity_ratio", "density", "sparsity"}

# The field that decides in place of density where it is given.
_DECIDES = {"local_window": "local_window_size", "global_local": "local_window_size", "strided": "stride"}

_warned_above_half = False


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    allowed = f"an int >= {low}" if high is None else f"an int in {low}..{high}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        reject(name, value, allowed, TypeError)
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        reject(name, value, allowed)
    return number


def _fraction(name: str, value: object, allowed: str, closed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        reject(name, value, allowed, TypeError)
    number = float(value)
    if not (math.isfinite(number) and (0 <= number if closed else 0 < number) and number <= 1):
        reject(name, value, allowed)
    return number


def check_integers(name: str, value: object, low: int) -> tuple[int, ...]:
    """A sequence of one or more ints >= low as a tuple; ValueError or TypeError naming it otherwise."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        error = ValueError if isinstance(value, (list, tuple)) else TypeError
        reject(name, value, f"a sequence of one or more ints >= {low}", error)
    return tuple(_integer(name, item, low) for item in value)


def _block(value: object) -> int | tuple[int, int]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            reject("block_size", value, "an int, or (block_q, block_k)")
        return (_block(value[0]), _block(value[1]))  # type: ignore[return-value]
    size = _integer("block_size", value, 16, 256)
    if size % 16:
        reject("block_size", value, "a multiple of 16 in 16..256")
    return size


def check_density(value: object, name: str = "density") -> float:
    """The value as a float in (0, 1]; ValueError or TypeError naming it otherwise."""
    return _fraction(name, value, "a kept share in (0, 1]")


def _warn_above_half(ratio: float) -> None:
    global _warned_above_half
    if ratio > 0.5 and not _warned_above_half:
        _warned_above_half = True
        warnings.warn(
            f"sparsity_ratio={ratio:g} is the KEPT share of block pairs: {ratio:.1%} are computed. "
            f"For {ratio:.1%} sparse write sparsity={ratio:g}, or density={1 - ratio:g}. (Shown once.)",
            UserWarning,
            stacklevel=4,
        )


@dataclasses.dataclass(init=False, eq=True)
class PatternConfig:
    """Which pattern to make, for any length.

    Args:
        pattern_type: dense, causal, local_window, dilated_sparse, global_local, strided, random or bigbird.
        sparsity_ratio: kept share of the admissible block pairs, in (0, 1]; the same as ``density``. Default 0.1.
        block_size: tokens of a block, a multiple of 16 in 16..256; or (block_q, block_k).
        local_window_size: window of local_window, global_local and bigbird, in tokens: half on either side, or whole
            towards the past in causal calls. Explicit geometry wins over density.
        global_tokens: of global_local and bigbird: tokens that attend and are attended to everywhere.
        dilation_rates: of dilated_sparse: distances, in blocks. Default 1, 2, 4, 8, 16.
        stride: of strided, in blocks; wins over density.
        seed: of random and bigbird.
        budget: how a density is shared out among rows: "even" or "proportional" (:mod:`tessera.patterns`).
        min_sparsity, max_sparsity: bounds that ``sparsity`` (= 1 - density) must keep.
        enable_caching: keep patterns that were made, for the next call with the same lengths.
        density, sparsity: other ways to say ``sparsity_ratio``; only one of the three may be given.

    Fields may be assigned later; each assignment is checked, and takes effect at the next call. ValueError or TypeError
    names the field, what came, and what is allowed.

    Example:
        >>> config = tessera.PatternConfig("local_window", sparsity_ratio=0.25, block_size=64)
        >>> tessera.MultiheadAttention(64, 4, pattern=config).pattern == config
        True
    """

    pattern_type: str
    sparsity_ratio: float
    block_size: int | tuple[int, int]
    local_window_size: int | None
    global_tokens: int | None
    dilation_rates: tuple[int, ...] | None
    stride: int | None
    seed: int
    min_sparsity: float
    max_sparsity: float
    enable_caching: bool
    budget: str

    def __init__(
        self,
        pattern_type: str = "dilated_sparse",
        sparsity_ratio: float | None = None,
        block_size: int | tuple[int, int] = 128,
        local_window_size: int | None = None,
        global_tokens: int | None = None,
        dilation_rates: Sequence[int] | None = None,
        stride: int | None = None,
        seed: int = 0,
        min_sparsity: float = 0.0,
        max_sparsity: float = 1.0,
        enable_caching: bool = True,
        budget: str = "even",
        *,
        density: float | None = None,
        sparsity: float | None = None,
    ) -> None:
        given = {
            name: value
            for name, value in (("sparsity_ratio", sparsity_ratio), ("density", density), ("sparsity", sparsity))
            if value is not None
        }
        if len(given) > 1:
            reject(" and ".join(given), tuple(given.values()), "only one of them")
        self.pattern_type = pattern_type
        self.block_size = block_size
        self.local_window_size = local_window_size
        self.global_tokens = global_tokens
        self.dilation_rates = dilation_rates  # type: ignore[assignment]
        self.stride = stride
        self.seed = seed
        self.enable_caching = enable_caching
        self.budget = budget
        self.min_sparsity = min_sparsity
        self.max_sparsity = max_sparsity
        name, value = next(iter(given.items()), ("density", self.bounded(DEFAULT_DENSITY)))
        setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "pattern_type":
            if value not in _OPTIONS:
                reject(name, value, ", ".join(_OPTIONS) + suggestion(value, _OPTIONS))
        elif name == "sparsity_ratio":
            value = check_density(value, name)
            _warn_above_half(value)
        elif name == "block_size":
            value = _block(value)
        elif name in ("local_window_size", "stride"):
            value = None if value is None else _integer(name, value, 1)
        elif name == "global_tokens":
            value = None if value is None else _integer(name, value, 0)
        elif name == "dilation_rates":
            value = None if value is None else check_integers(name, value, 1)
        elif name == "seed":
            value = _integer(name, value, 0)
        elif name in ("min_sparsity", "max_sparsity"):
            value = _fraction(name, value, "a share in [0, 1]", closed=True)
        elif name == "budget":
            if value not in ("even", "proportional"):
                reject(name, value, '"even" or "proportional"')
        elif name == "enable_caching":
            value = bool(value)
        elif name not in ("density", "sparsity"):
            raise AttributeError(
                f"PatternConfig has no field {name!r}; it has {', '.join(self.field_names())}"
                + suggestion(name, self.field_names())
            )
        before = dict(self.__dict__)
        object.__setattr__(self, name, value)
        if "max_sparsity" in self.__dict__ and "sparsity_ratio" in self.__dict__:
            try:
                self._check_bounds()
            except ValueError:
                self.__dict__.clear()
                self.__dict__.update(before)
                raise
            self.__dict__["_template"] = self._make_template()

    def _check_bounds(self) -> None:
        if self.min_sparsity > self.max_sparsity:
            reject("min_sparsity", self.min_sparsity, f"at most max_sparsity = {self.max_sparsity}")
        # Half an ulp of slack: 1 - 0.05 must count as 0.95.
        if not self.min_sparsity - 1e-12 <= self.sparsity <= self.max_sparsity + 1e-12:
            reject("sparsity", self.sparsity, f"min_sparsity..max_sparsity = {self.min_sparsity}..{self.max_sparsity}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))

    @property
    def density(self) -> float:
        """Kept share of the admissible block pairs, in (0, 1]."""
        return self.sparsity_ratio

    @density.setter
    def density(self, value: float) -> None:
        # Says what it is: no warning.
        _silently_set_ratio(self, check_density(value))

    @property
    def sparsity(self) -> float:
        """Dropped share of the admissible block pairs, in [0, 1)."""
        return 1.0 - self.sparsity_ratio

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        number = _fraction("sparsity", value, "a dropped share in [0, 1)", closed=True)
        if number == 1:
            reject("sparsity", value, "a dropped share in [0, 1)")
        _silently_set_ratio(self, 1.0 - number)

    @property
    def density_decides(self) -> bool:
        """Whether density has an effect: not where explicit geometry (window, stride) or a dense kind decides."""
        if self.pattern_type in _DECIDES:
            return getattr(self, _DECIDES[self.pattern_type]) is None
        return "density" in _OPTIONS[self.pattern_type]

    def bounded(self, density: float) -> float:
        """The density nearest to this one that keeps min_sparsity and max_sparsity."""
        return min(max(density, 1.0 - self.max_sparsity), 1.0 - self.min_sparsity)

    def with_density(self, density: float) -> PatternConfig:
        """A copy in which this density decides: an explicit window or stride is dropped. ValueError for kinds that
        have no density."""
        if "density" not in _OPTIONS[self.pattern_type]:
            reject("sparsity_ratio", density, f"none: {self.pattern_type} keeps every admissible pair")
        copy = self.copy()
        if not copy.density_decides:
            copy.local_window_size = copy.stride = None
        copy.density = density
        return copy

    def copy(self) -> PatternConfig:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def _make_template(self) -> Spec:
        kind, block, options = self.spec()
        rates = tuple(options.pop("dilation_rates", ()))
        sizes = block if isinstance(block, tuple) else (block, block)
        return Spec(kind, 0, 0, *sizes, dilation_rates=rates, **options)

    def spec(self) -> tuple[str, int | tuple[int, int], dict[str, Any]]:
        """(kind, block, options): the options that the kind takes, and no others."""
        values: dict[str, Any] = {
            "density": self.sparsity_ratio if self.density_decides else None,
            "window": self.local_window_size,
            "global_tokens": self.global_tokens,
            "dilation_rates": None if self.dilation_rates is None else list(self.dilation_rates),
            "stride": self.stride,
            "seed": self.seed,
        }
        taken = _OPTIONS[self.pattern_type]
        options: dict[str, Any] = {n: values[n] for n in taken if values[n] is not None}
        if "density" in options:
            options["budget"] = self.budget
        return self.pattern_type, self.block_size, options

    def definition(self, request: Request) -> Spec:
        """What defines the pattern that it makes of a request."""
        return filled(self.__dict__["_template"], request, request.heads if self.heads_differ else 1)

    def pattern_for(self, request: Request) -> BlockPattern:
        """The pattern of a request, from the process's cache where enable_caching is set."""
        return (cache.find if self.enable_caching else of_spec)(self.definition(request))

    def pattern(
        self, seqlen_q: int, seqlen_k: int | None = None, *, causal: bool = False, heads: int = 1
    ) -> BlockPattern:
        """The pattern for these lengths. ``heads``: of the attention; only kinds whose heads differ make that many."""
        lengths = check_int("seqlen_q", seqlen_q), check_int("seqlen_k", seqlen_q if seqlen_k is None else seqlen_k)
        return of_spec(self.definition(Request(*lengths, causal, heads)))

    @property
    def heads_differ(self) -> bool:
        """Whether every head has a pattern of its own."""
        return self.pattern_type in _HEADS_DIFFER

    @classmethod
    def of(cls, value: Any = None, **fields: Any) -> PatternConfig:
        """A config from any of its forms: a PatternConfig (kept as it is, so that later assignments to it count), a
        dict of fields, a pattern name, or None; ``fields`` that are not None override (then it is a copy): a density
        among them that of the base, whatever the two are called, and a window or stride of the base that would decide
        in its place."""
        fields = {name: item for name, item in fields.items() if item is not None}
        if isinstance(value, cls):
            if not fields:
                return value
            value = {name: getattr(value, name) for name in cls.field_names()}
            value["density"] = value.pop("sparsity_ratio")  # under the name that does not warn again
        elif isinstance(value, str):
            value = {"pattern_type": value}
        elif value is None:
            value = {}
        elif not isinstance(value, Mapping):
            reject("sparse_config", value, "a PatternConfig, a dict of its fields, or the name of a pattern", TypeError)
        if fields.keys() & _DENSITY_NAMES:
            kind = fields.get("pattern_type", value.get("pattern_type"))
            dropped = _DENSITY_NAMES | {_DECIDES[kind] for name in _DECIDES if name == kind}
            value = {name: item for name, item in value.items() if name not in dropped}
        merged = {**value, **fields}
        known = {*cls.field_names(), "density", "sparsity"}
        for name in merged:
            if name not in known:
                reject(
                    "sparse_config", name, f"the fields {', '.join(sorted(known))}{suggestion(name, known)}", TypeError
                )
        return cls(**merged)


# density and sparsity are properties: __setattr__ above hands them on to object.__setattr__, which calls the setters.
def _silently_set_ratio(config: PatternConfig, ratio: float) -> None:
    object.__setattr__(config, "sparsity_ratio", ratio)


# What torch.load(weights_only=True) may make.
torch.serialization.add_safe_globals([PatternConfig])
