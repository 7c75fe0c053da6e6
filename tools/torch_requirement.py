"""The wheel's requirement of torch (pyproject.toml): the operators fit the one that they were built against. It is
asked for first, so what else a build needs is looked for here as well: what is missing is then said in one line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Mapping
from typing import Any

_state = ""


def build_state(state: str) -> None:
    global _state
    _state = state


def _missing() -> str | None:
    def has(name: str) -> bool:  # a program, or the package of PyPI that brings it
        return shutil.which(name) is not None or importlib.util.find_spec(name) is not None

    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here; install it, then pip install --no-build-isolation ."
    if not has("cmake"):
        return "cmake is not installed here; pip install cmake, or apt-get install cmake"
    if not has("ninja") and not has("make"):
        return "ninja is not installed here; pip install ninja, or apt-get install ninja-build"
    return None


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    missing = _missing()
    if missing is None:
        return {"dependencies": [f"torch=={importlib.metadata.version('torch').split('+')[0]}"]}
    if _state == "sdist":
        return {"dependencies": ["torch"]}
    raise SystemExit(f"tessera: {missing}")


def dynamic_wheel(settings: Mapping[str, Any]) -> dict[str, bool]:
    return {"dependencies": True}
