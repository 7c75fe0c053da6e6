"""Sources of patterns: all that a ``pattern=`` argument may be, and the one way in which calls ask it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from .block_pattern import BlockPattern
from .config import PatternConfig
from .spec import Request, Spec, cache


class Source(Protocol):
    """What makes the pattern of a call: a config, a generator, a selection."""

    def pattern_for(self, request: Request) -> BlockPattern:
        """The pattern of these lengths, heads 1 or as many as are asked for."""


PatternSource = BlockPattern | Source | Callable[[int, int], BlockPattern] | Mapping[str, Any] | str | None

_DENSE_BLOCK = 128


class ArgumentError(ValueError, RuntimeError):
    """A caller's mistake; a RuntimeError as well, as torch's own module raises for it."""


def pattern_source(pattern: Any) -> Any:
    """A ``pattern=`` argument as :func:`pattern_for` takes it: names and dicts become configs. TypeError for others."""
    if isinstance(pattern, (str, Mapping)):
        try:
            return PatternConfig.of(pattern)
        except (TypeError, ValueError) as e:
            raise type(e)(f"pattern: {e}") from None
    if pattern is None or isinstance(pattern, BlockPattern) or hasattr(pattern, "pattern_for") or callable(pattern):
        return pattern
    raise TypeError(
        f"pattern: got {type(pattern).__name__}; allowed: None (dense), a BlockPattern, a callable "
        "(seqlen_q, seqlen_k) -> BlockPattern, a PatternConfig, a dict of its fields, or the name of a pattern"
    )


def is_dense(source: Any) -> bool:
    """Whether a source says that it is dense; a callable or a pattern that happens to be full does not."""
    return source is None or (isinstance(source, PatternConfig) and source.pattern_type == "dense")


def pattern_for(
    source: Any, seqlen_q: int, seqlen_k: int, causal: bool = False, heads: int = 1, **more: Any
) -> BlockPattern:
    """The pattern of a call: what ``source`` answers to a :class:`~tessera.patterns.Request`. ``more``: its other
    fields."""
    tracing = torch._C._get_tracing_state()
    if tracing is not None:
        # A graph of torch.jit.trace cannot make patterns: that of the traced lengths becomes a constant of it.
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return pattern_for(source, int(seqlen_q), int(seqlen_k), causal, heads, **more)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
    if source is None:
        return cache.find(Spec("dense", seqlen_q, seqlen_k, _DENSE_BLOCK, _DENSE_BLOCK))
    if isinstance(source, BlockPattern):
        pattern = source
    elif (ask := getattr(source, "pattern_for", None)) is not None:
        pattern = ask(Request(seqlen_q, seqlen_k, causal, heads, **more))
    else:
        pattern = source(seqlen_q, seqlen_k)
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern: got {type(pattern).__name__} from the callable; allowed: tessera.BlockPattern")
    if (pattern.seqlen_q, pattern.seqlen_k) != (seqlen_q, seqlen_k):
        raise ArgumentError(
            f"pattern: got one of {pattern.seqlen_q} x {pattern.seqlen_k} tokens; allowed: {seqlen_q} x {seqlen_k}, "
            "the lengths of query and key"
        )
    return pattern
