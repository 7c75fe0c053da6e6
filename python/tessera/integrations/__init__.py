"""Tessera inside other frameworks: ``tessera.integrations.transformers``, ``tessera.integrations.lightning``. Each
module loads its framework when it is used, not before."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("lightning", "transformers"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
