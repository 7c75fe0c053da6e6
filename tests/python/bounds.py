"""How far a result may be from the exact one: bounds from the precision of the arithmetic and the lengths of the sums,
so that they hold on every machine. Two results in one precision are not compared with each other at its epsilon: each
may be off in its own way; each is compared with fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
UNIT = EPS[torch.float32] / 2  # what one rounding in fp32 is off by, at most, of its result


class Exact(NamedTuple):
    """Attention in fp64, and how far the same in fp32 arithmetic may be from each element of it."""

    out: Tensor  # [B, H, Sq, Dv]
    lse: Tensor  # [B, H, Sq]
    weights: Tensor  # [B, H, Sq, Sk]
    out_bound: Tensor
    lse_bound: Tensor
    weights_bound: Tensor


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, bias: Tensor | float = 0.0,
    softcap: float = 0.0,
) -> Exact:  # fmt: skip
    """``[B, H, S, D]``, k and v may have fewer heads; mask: bool, and bias, broadcast over ``[B, H, Sq, Sk]``; rows
    without keys give 0.

    A score is a sum of head_dim products, two factors and a bias, so it is off by at most head_dim + 3 units of its sum
    of magnitudes, and so is what softcap makes of it, and 4 units of itself by tanh. An exponential is off by that, by
    the rounding of its argument, and by 4 units of its own; sums over the keys of a row add a unit for each of them,
    above and below the fraction."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores, sums = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    bias = torch.as_tensor(bias, dtype=torch.float64)
    scores = (scores + bias).masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    magnitude = (sums + bias.abs()).masked_fill(scores == -torch.inf, 0.0).amax(-1, keepdim=True)
    keys = mask.expand(scores.shape).sum(-1, keepdim=True)
    of_score = (q.shape[-1] + 3 + (4 if softcap else 0)) * magnitude
    of_exponential = of_score + 2 * magnitude + 4
    of_weight = UNIT * (2 * of_exponential + keys + 1)
    return Exact(
        weights @ v, lse, weights, (of_weight + UNIT * keys) * (weights @ v.abs()),
        UNIT * ((of_exponential + keys + 4).squeeze(-1) + lse.abs()), of_weight * weights,
    )  # fmt: skip


def assert_rounded(got: Tensor, exact: Tensor, *lengths: int) -> None:
    """What comes from sums of these lengths, one after the other, in fp32, is off from the exact result by at most a
    unit of the largest magnitude for each number that they add. (Roundings of random signs grow as the root of that:
    the rest leaves room for sums of magnitudes beyond the result's.)"""
    error = (got - exact).abs().max() / exact.abs().max()
    assert error <= UNIT * sum(lengths), f"off by {error:.3g} of the largest; allowed: {UNIT * sum(lengths):.3g}"
