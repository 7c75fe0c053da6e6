"""Loads libtessera_torch and says what torch must know about its operators: shapes without data (fake tensors), vmap and
FLOP counts. Autograd and autocast are in the library itself, so that C++ callers have them too."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LIBRARY = "libtessera_torch.so"


def _load() -> str:
    # The one place that reads the environment: developers point it to a library in a build folder.
    path = os.environ.get("TESSERA_TORCH_LIBRARY") or str(Path(__file__).with_name(_LIBRARY))
    if not os.path.isfile(path):
        raise ImportError(
            f"tessera: got no operator library at {path}; allowed: {_LIBRARY} beside the package (pip install), or its "
            "path in the environment variable TESSERA_TORCH_LIBRARY"
        )
    torch.ops.load_library(path)
    return path


LIBRARY_PATH = _load()

_t = torch.ops.tessera
forward = _t.forward.default
backward = _t.backward.default
decode = _t.decode.default
weights = _t.weights.default
merge = _t.merge.default
varlen_forward = _t.varlen_forward.default
varlen_backward = _t.varlen_backward.default
dilated_forward = _t.dilated_forward.default
dilated_backward = _t.dilated_backward.default
