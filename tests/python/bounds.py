"""How far a result may be from the exact one: bounds from the precision of the arithmetic and the lengths of the sums,
so that they hold on every machine. Two results in one precision are never compared with each other at its epsilon: each
may be off in its own way; each is compared with fp64."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention in fp64, and how far arithmetic in fp32 on the same inputs may be from it, element by element.
    ``[B, H, S, D]``, as many heads in k and v as in q; mask: bool, broadcast over ``[B, H, Sq, Sk]``; rows without keys
    give 0.

    A score is a sum of head_dim products and two factors, so it is off by at most (head_dim + 2) u of its sum of
    absolute values; an exponential by that, by the rounding of its argument, and by a few u of its own; sums over the
    keys of a row add as many u as there are keys, above and below the fraction."""
    unit = EPS[torch.float32] / 2
    q, k, v = (t.detach().double() for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    magnitude = (q.abs() @ k.abs().mT * abs(scale)).masked_fill(~mask, 0.0).amax(-1, keepdim=True)
    keys = mask.expand(scores.shape).sum(-1, keepdim=True)
    exponential = (q.shape[-1] + 2) * magnitude + 2 * magnitude + 4
    return weights @ v, unit * (2 * exponential + 2 * keys + 1) * (weights @ v.abs())
