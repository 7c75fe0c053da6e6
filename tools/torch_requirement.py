"""The wheel's requirement of torch (pyproject.toml): the operators fit the one that they were built against."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

_state = ""


def build_state(state: str) -> None:
    global _state
    _state = state


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    try:
        version = importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        if _state == "sdist":
            return {"dependencies": ["torch"]}
        raise SystemExit(
            "tessera: torch is not installed here; install it, then pip install --no-build-isolation ."
        ) from None
    return {"dependencies": [f"torch=={version}"]}


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    return {"dependencies": True}
