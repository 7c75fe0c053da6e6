"""What the tests of MultiheadAttention share: a sparse pattern, our module and torch's with the same parameters, the
mask of torch that a pattern means, and the comparison of results and gradients, in fp64."""

from __future__ import annotations

import tessera
from tessera.nn import MultiheadAttention

import torch
from torch import nn

L, N, E, H, BLOCK = 100, 2, 24, 4, 32  # the last block is ragged
DOUBLE = {"dtype": torch.float64}


def sparse(seqlen_q: int = L, seqlen_k: int = L, heads: int = 1) -> tessera.BlockPattern:
    return tessera.patterns.random(seqlen_q, seqlen_k, block=BLOCK, density=0.4, seed=3, heads=heads)


def pair(pattern, **options):
    """Our module and torch's with the same parameters, biases not zero."""
    ours = MultiheadAttention(E, H, pattern=pattern, **DOUBLE, **options)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.MultiheadAttention(E, H, **DOUBLE, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def torch_mask(pattern: tessera.BlockPattern, batch: int = N) -> torch.Tensor:
    """True: may not attend; [L, S], or [N * H, L, S] for a pattern a head."""
    mask = ~pattern.to_token_mask()
    if pattern.heads == 1:
        return mask[0, 0]
    return mask.expand(batch, -1, -1, -1).flatten(0, 1)


def same(ours, theirs, inputs_a, inputs_b, kwargs_a, kwargs_b, weights=True):
    out, w = ours(*inputs_a, **kwargs_a)
    expected, expected_w = theirs(*inputs_b, **kwargs_b)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    loss, expected_loss = (out * grad).sum(), (expected * grad).sum()
    if weights:
        torch.testing.assert_close(w, expected_w)
        grad_w = torch.randn_like(w)
        loss, expected_loss = loss + (w * grad_w).sum(), expected_loss + (expected_w * grad_w).sum()
    else:
        assert w is None and expected_w is None
    names = [n for n, _ in ours.named_parameters()]
    got = torch.autograd.grad(loss, [*ours.parameters(), *inputs_a])
    wanted = torch.autograd.grad(expected_loss, [*theirs.parameters(), *inputs_b])
    for name, a, b in zip([*names, "query", "key", "value"], got, wanted):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def draw(batch_first=False, seqlen_k=L, kdim=E, vdim=E):
    def one(length, dim):
        shape = (N, length, dim) if batch_first else (length, N, dim)
        return torch.randn(shape, **DOUBLE, requires_grad=True)

    return one(L, E), one(seqlen_k, kdim), one(seqlen_k, vdim)


def layer(pattern, **options):
    torch.manual_seed(1)
    new = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)
    new.self_attn = MultiheadAttention.from_torch(new.self_attn, pattern=pattern)
    return new
