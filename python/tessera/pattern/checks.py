"""Checks of arguments: each returns the value as it is used, or raises what names the argument, what came and what is
allowed."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor


def reject(name: str, got: object, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises the error that names the argument, what came, and what is allowed."""
    raise error(f"{name}: got {got!r}; allowed: {allowed}")


def field_kinds(cls: Any) -> dict[str, str]:
    """The fields of a named tuple with their types as they are written."""
    return {name: getattr(kind, "__forward_arg__", kind) for name, kind in cls.__annotations__.items()}


def check_int(name: str, value: Any, minimum: int | None = None) -> int:
    """``value`` as int, also one of a traced graph, or TypeError/ValueError that names the argument."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got bool {value}; allowed: an integer")
    if type(value) is not int and not isinstance(value, torch.SymInt):  # index() would make a number of a symbol
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: got {type(value).__name__} {value!r}; allowed: an integer") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {value}; allowed: integers of 64 bits")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: got {value}; allowed: {minimum} or more")
    return value


def suggestion(value: Any, known: Iterable[str]) -> str:
    """What an error adds where a name is nearly one that is known."""
    near = difflib.get_close_matches(value, list(known), 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def check_bool(name: str, value: Any) -> bool:
    """``value`` as bool, also one of a traced graph, or TypeError that names the argument."""
    if isinstance(value, (bool, torch.SymBool)):
        return cast(bool, value)
    if is_bool_scalar(value):
        return bool(value)
    raise TypeError(f"{name}: got {type(value).__name__}; allowed: a bool")


def is_bool_scalar(value: Any) -> bool:
    """Whether it is a bool of NumPy or a bool tensor without dimensions."""
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and getattr(value, "ndim", None) == 0


def check_index(name: str, value: Any, count: int) -> int:
    """``value`` in 0 .. count - 1."""
    value = check_int(name, value, 0)
    if value >= count:
        raise ValueError(f"{name}: got {value}; allowed: 0..{count - 1}")
    return value


def check_block(block: int | Sequence[int]) -> tuple[int, int]:
    """(block_q, block_k) of an int or a pair."""
    if isinstance(block, (tuple, list)):
        if len(block) != 2:
            raise ValueError(f"block: got {len(block)} numbers; allowed: an integer or (block_q, block_k)")
        return _block_size("block_q", block[0]), _block_size("block_k", block[1])
    size = _block_size("block", block)
    return size, size


def _block_size(name: str, value: Any) -> int:
    value = check_int(name, value)
    if value % 16 or not 16 <= value <= 256:
        raise ValueError(f"{name}: got {value}; allowed: a multiple of 16 in 16..256")
    return value


def check_list(name: str, values: Any, allowed: str) -> list[Any]:
    """What an iterable holds, or TypeError that names the argument."""
    if not isinstance(values, (str, bytes)):
        try:
            return list(values)
        except TypeError:
            pass
    raise TypeError(f"{name}: got {type(values).__name__}; allowed: {allowed}")


def check_tensor(name: str, value: Any) -> Tensor:
    """``value`` if it is a tensor, else TypeError that names the argument."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: torch.Tensor")
    return value


def axes(ax: Any) -> Any:
    """matplotlib's axes: those given, else the current ones."""
    if ax is not None:
        if not hasattr(ax, "imshow"):
            raise TypeError(f"ax: got {type(ax).__name__}; allowed: matplotlib axes or None")
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as e:
        raise ImportError("ax: got None without matplotlib; allowed: pip install matplotlib, or axes of yours") from e
    return pyplot.gca()
