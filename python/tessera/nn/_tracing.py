"""Whether Python may look at the values of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def may_look(mask: Tensor) -> bool:
    """Whether values may decide what is done: not while somebody traces or batches this code."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and type(mask) in (Tensor, torch.nn.Parameter)
        and not mask.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(mask)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def measurable(*arguments: Any) -> bool:
    """Whether a call with these tensors and others may be measured: nobody compiles, traces or batches it."""
    return all(may_look(t) for t in arguments if isinstance(t, Tensor))
