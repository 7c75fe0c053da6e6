"""Patterns from and for other libraries: FlexAttention block masks, torch.sparse, DeepSpeed layouts, SciPy.

Nothing here loads the other library before it is needed; DeepSpeed is not needed at all.
"""

from __future__ import annotations

from .deepspeed import from_layout, from_sparsity_config, to_layout
from .flex import from_block_mask, to_block_mask
from .scipy import from_scipy, to_scipy
from .torch_sparse import from_torch, to_torch

__all__ = [
    "from_block_mask",
    "from_layout",
    "from_scipy",
    "from_sparsity_config",
    "from_torch",
    "to_block_mask",
    "to_layout",
    "to_scipy",
    "to_torch",
]
