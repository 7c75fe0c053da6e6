"""tessera.MultiheadAttention beside torch's where numbers, transforms and arguments are unusual: large logits, masks of
the lowest number, tracing and export, values that torch takes or refuses."""

from __future__ import annotations

import math

import pytest
import tessera

import torch
from torch import nn


def pair(*args, pattern=None, dtype=None, **options):
    """Ours and torch's with the same parameters."""
    ours = tessera.MultiheadAttention(*args, pattern=pattern, dtype=dtype, **options)
    theirs = nn.MultiheadAttention(*args, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("pattern", [None, "dense", "local_window"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 20), (torch.float16, 20), (torch.float32, 300)])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_weights_of_large_logits_sum_to_one(pattern, dtype, size, extra):
    """Scores of hundreds and more: computed twice in 16 bits, exp(score - lse) would be off by factors."""
    torch.manual_seed(0)
    ours, theirs = pair(64, 1, pattern=pattern, dtype=dtype, batch_first=True, **extra)
    x = (size * torch.randn(2, 64, 64)).to(dtype)
    out, weights = ours(x, x, x, need_weights=True)
    step = torch.finfo(dtype).eps
    assert (weights.float().sum(-1) - 1).abs().max() <= 4 * step + 64 * torch.finfo(torch.float32).eps
    if pattern != "local_window":
        # q and k are rounded: scores that are off by the rounding of one element move the weights that much.
        assert weights.shape == theirs(x, x, x)[1].shape
        assert (weights.argmax(-1) == theirs(x, x, x)[1].argmax(-1)).float().mean() > 0.95
    (grad,) = torch.autograd.grad(weights.float().square().sum(), ours.in_proj_weight)
    assert grad.isfinite().all()


def test_autocast_does_not_round_the_scores_of_weights():
    torch.manual_seed(0)
    ours, _ = pair(64, 1, batch_first=True)
    x = 30 * torch.randn(1, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = ours(x, x, x)[1]
    assert (weights.float().sum(-1) - 1).abs().max() < 0.02


@pytest.mark.parametrize("value", [-1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_of_the_lowest_number_attend_everywhere(value, need_weights):
    """As in torch, where such a mask is a number like others; only -inf takes a key away."""
    torch.manual_seed(0)
    ours, theirs = pair(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    mask = torch.zeros(5, 5)
    mask[1] = value
    padding = torch.zeros(2, 5)
    padding[1] = value
    for options in ({"attn_mask": mask}, {"key_padding_mask": padding}):
        got, want = (m(x, x, x, need_weights=need_weights, **options) for m in (ours, theirs))
        torch.testing.assert_close(got[0], want[0])
        if need_weights:
            torch.testing.assert_close(got[1], want[1])


class SelfAttention(nn.Module):
    def __init__(self, attention, **options):
        super().__init__()
        self.attention, self.options = attention, options

    def forward(self, x):
        return self.attention(x, x, x, **self.options)[0]


@pytest.mark.parametrize("pattern", [None, "dense"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_export_over_lengths_of_one_block_and_more(pattern, need_weights):
    ours, _ = pair(16, 2, batch_first=True, pattern=pattern)
    length = torch.export.Dim("length", min=2, max=640)
    program = torch.export.export(
        SelfAttention(ours, need_weights=need_weights), (torch.randn(2, 40, 16),), dynamic_shapes=({1: length},)
    )
    for n in (3, 128, 129, 600):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(program.module()(x), ours(x, x, x)[0])


class Padded(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding)[0]


@pytest.mark.parametrize("pattern", [None, "dense", "local_window"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(pattern, options, training):
    """A graph for the traced length, not for the traced kind of padding."""
    ours, _ = pair(16, 2, batch_first=True, pattern=pattern, **options)
    ours.train(training)
    none, right, left = (torch.zeros(2, 200, dtype=torch.bool) for _ in range(3))
    right[1, 150:], left[1, :50] = True, True
    with torch.no_grad():
        x = torch.randn(2, 200, 16)
        traced = torch.jit.trace(SelfAttention(ours), (torch.randn(2, 200, 16),))
        torch.testing.assert_close(traced(x), ours(x, x, x)[0])
        for example in (none, right):
            traced = torch.jit.trace(Padded(ours), (torch.randn(2, 200, 16), example))
            for padding in (none, right, left):
                torch.testing.assert_close(traced(x, padding), ours(x, x, x, key_padding_mask=padding)[0])
    assert torch._C._get_tracing_state() is None


def test_meta_weights_of_a_pattern():
    ours = tessera.MultiheadAttention(16, 2, batch_first=True, pattern="local_window", device="meta")
    x = torch.empty(2, 40, 16, device="meta")
    assert [t.shape for t in ours(x, x, x, need_weights=True)] == [(2, 40, 16), (2, 40, 40)]


def test_from_torch_refuses_parametrized_modules():
    theirs = nn.MultiheadAttention(16, 2)
    nn.utils.parametrize.register_parametrization(theirs, "in_proj_weight", nn.Identity())
    with pytest.raises(ValueError, match="^module: got one whose in_proj_weight is parametrized; allowed: "):
        tessera.MultiheadAttention.from_torch(theirs)
    nn.utils.parametrize.remove_parametrizations(theirs, "in_proj_weight")
    x = torch.randn(5, 2, 16)
    torch.testing.assert_close(tessera.MultiheadAttention.from_torch(theirs)(x, x, x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize("weights", [True, False, 0, 1, torch.tensor(True)])
def test_flags_by_their_truth(weights):
    ours, theirs = pair(8, 2)
    x = torch.randn(3, 2, 8)
    options = {"is_causal": None} if weights else {}  # without weights torch hands it on to an operator
    got, want = (m(x, x, x, need_weights=weights, **options) for m in (ours, theirs))
    torch.testing.assert_close(got[0], want[0])
    assert (got[1] is None) == (want[1] is None)


def test_dropout_of_everything():
    ours, theirs = pair(8, 2, dropout=1.0)
    x = torch.randn(3, 2, 8)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0])
    torch.testing.assert_close(ours.eval()(x, x, x)[0], theirs.eval()(x, x, x)[0])


def test_mistakes_are_named():
    x, wide = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    plain = tessera.MultiheadAttention(8, 2)
    table = [
        ("key", lambda: tessera.MultiheadAttention(8, 2, kdim=5, vdim=6)(x, wide, wide)),
        ("value", lambda: tessera.MultiheadAttention(8, 2, kdim=6, vdim=5)(x, wide, wide)),
        ("key", lambda: plain(x, wide, wide)),
        ("query", lambda: plain(x.double(), x, x)),
        ("value", lambda: plain(x, x, x.bfloat16())),
        ("attn_mask", lambda: plain(x, x, x, attn_mask=torch.zeros(3, 3, device="meta"))),
        ("key_padding_mask", lambda: plain(x, x, x, key_padding_mask=torch.zeros(2, 3, device="meta"))),
        ("need_weights", lambda: plain(x, x, x, need_weights="block")),
        ("dropout", lambda: tessera.MultiheadAttention(8, 2, dropout=-0.1)),
        ("dropout", lambda: tessera.MultiheadAttention(8, 2, dropout=math.nan)),
        ("dropout", lambda: tessera.MultiheadAttention(8, 2, dropout=1.1)),
        ("pattern", lambda: tessera.MultiheadAttention(8, 2, pattern="nope")),
        ("pattern", lambda: tessera.MultiheadAttention(8, 2, pattern={"foo": 1})),
    ]
    for name, call in table:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: .*got .*allowed: "):
            call()
