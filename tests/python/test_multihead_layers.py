"""MultiheadAttention inside torch's transformer layers, where those would compute dense attention by themselves, and
with nested tensors."""

from __future__ import annotations

import copy
import warnings

import pytest
from multihead_cases import DOUBLE, E, H, L, N, draw, layer, pair, sparse, torch_mask
from tessera import patterns
from tessera.nn import MultiheadAttention

import torch
from torch import nn

# ---- inside torch's layers


MODES = {
    "eval": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
}
# As users give them; what they keep of L x L tokens.
PATTERNS = {
    "pattern": (sparse(), sparse()),
    "callable": (lambda q, k: sparse(q, k), sparse()),
    "name": ("strided", patterns.strided(L, density=0.1)),
    "config": (
        {"pattern_type": "local_window", "local_window_size": 40, "block_size": 16},
        patterns.local_window(L, window=40, block=16),
    ),
}


@pytest.fixture
def detours(monkeypatch):
    """What torch's layers call to compute attention by themselves: never, here. Nested tensors that encoders make."""
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: pytest.fail("the layer went around"))
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *a, **k: pytest.fail("torch's operator"))
    nested = []
    make = torch._nested_tensor_from_mask
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *a, **k: nested.append(1) or make(*a, **k))
    return nested


@pytest.mark.parametrize("masks", ["none", "padding", "holes", "causal"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["pattern", "name", "config"])
def test_encoder_layer_in_all_modes_with_masks(kind, norm_first, masks, detours):
    pattern, kept = PATTERNS[kind]
    ours = layer(pattern, norm_first=norm_first)
    theirs = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    theirs.load_state_dict(ours.state_dict())
    x, mask, options = torch.randn(N, L, E), torch_mask(kept), {}
    if masks in ("padding", "holes"):
        padding = torch.zeros(N, L, dtype=torch.bool)
        padding[1, 90:] = True
        if masks == "holes":
            padding[0, 3] = padding[1, 50] = True
        options["src_key_padding_mask"] = padding
    ours_options = dict(options)
    if masks == "causal":
        causal = torch.ones(L, L, dtype=torch.bool).triu(1)
        mask = mask | causal
        ours_options["src_mask"] = causal
    expected = theirs.train()(x, src_mask=mask, **options).detach()
    torch.testing.assert_close(ours.train()(x, **ours_options), expected)
    ours.eval()
    for mode in MODES.values():
        with mode():
            torch.testing.assert_close(ours(x, **ours_options), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["callable", "name", "config"])
@pytest.mark.parametrize("swap", ["before", "after"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:query. got a nested tensor")
def test_encoder_in_all_modes_with_padding(swap, kind, norm_first, detours):
    """Also where the encoder was built around torch's attention, and so decided to make nested tensors of padding."""
    torch.manual_seed(1)
    pattern, kept = PATTERNS[kind]
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **options), 2)
    if swap == "before":
        encoder = nn.TransformerEncoder(layer(pattern, norm_first=norm_first), 2)
    else:
        encoder = copy.deepcopy(theirs)
        for x in encoder.layers:
            x.self_attn = MultiheadAttention.from_torch(x.self_attn, pattern=pattern)
    encoder.load_state_dict(theirs.state_dict())
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 90:] = True
    keep = ~padding[..., None]
    expected = theirs.train()(x, mask=torch_mask(kept), src_key_padding_mask=padding).detach() * keep
    torch.testing.assert_close(encoder.train()(x, src_key_padding_mask=padding) * keep, expected)
    encoder.eval()
    for mode in MODES.values():
        with mode():
            torch.testing.assert_close(encoder(x, src_key_padding_mask=padding) * keep, expected)
    # Nested tensors without gradients: with them the encoder makes none.
    assert len(detours) == (2 if encoder.use_nested_tensor else 0)
    assert encoder.use_nested_tensor == (swap == "after" and not norm_first)


@pytest.mark.parametrize("kind", ["pattern", "config", "name"])
def test_nested_tensors_shorter_than_the_padding(kind, detours):
    """The encoder's nested tensors forget how long the padded sequences were: a fixed pattern knows, explicit geometry
    does not care, and else a warning says so."""
    torch.manual_seed(1)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), 2)
    for x in encoder.layers:
        x.self_attn = MultiheadAttention.from_torch(x.self_attn, pattern=PATTERNS[kind][0])
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, 70:] = padding[1, 50:] = True
    keep = ~padding[..., None]
    expected = encoder.train()(x, src_key_padding_mask=padding).detach() * keep
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = encoder.eval()(x, src_key_padding_mask=padding)
    said = [w for w in caught if "longest sequence has 70 tokens" in str(w.message)]
    assert detours and bool(said) == (kind == "name")
    if kind != "name":
        torch.testing.assert_close(out * keep, expected)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_with_a_longer_pattern_and_weights(layout):
    ours, _ = pair(sparse(), batch_first=True, add_zero_attn=True)
    rows = [torch.randn(n, E, **DOUBLE) for n in (40, 70)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    out, weights = ours(nested, nested, nested, need_weights=True)
    padded = nn.functional.pad(nn.utils.rnn.pad_sequence(rows, batch_first=True), (0, 0, 0, L - 70))
    padding = torch.arange(L) >= torch.tensor([[40], [70]])
    expected, expected_weights = ours(padded, padded, padded, padding, need_weights=True)
    for i, n in enumerate((40, 70)):
        torch.testing.assert_close(out.unbind()[i], expected[i, :n])
    assert weights.shape == (N, 70, 71)
    torch.testing.assert_close(weights[..., :70], expected_weights[:, :70, :70])
    torch.testing.assert_close(weights[..., 70], expected_weights[:, :70, L])


@pytest.mark.parametrize("kind", ["callable", "config"])
def test_encoder_compiles_in_all_modes(kind):
    torch.manual_seed(1)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True), 1)
    pattern, kept = PATTERNS[kind]
    # A pattern is a value in a compiled graph: what a callable returns must be one that is made before.
    pattern = (lambda q, k: kept) if kind == "callable" else pattern
    for x in encoder.layers:
        x.self_attn = MultiheadAttention.from_torch(x.self_attn, pattern=pattern)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 90:] = True
    keep = ~padding[..., None]
    expected = encoder.train()(x, src_key_padding_mask=padding).detach() * keep
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=padding) * keep, expected)
    encoder.eval()
    for mode in MODES.values():
        with mode():
            torch.testing.assert_close(compiled(x, src_key_padding_mask=padding) * keep, expected)
    torch._dynamo.reset()


def test_merge_masks_refuses():
    with pytest.raises(RuntimeError, match="pattern"):
        MultiheadAttention(E, H, pattern="causal").merge_masks(None, None, torch.zeros(N, L, E))


def test_decoder_layer():
    torch.manual_seed(1)
    ours = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, **DOUBLE)
    theirs = copy.deepcopy(ours)
    ours.self_attn = MultiheadAttention.from_torch(ours.self_attn, pattern=sparse())
    ours.multihead_attn = MultiheadAttention.from_torch(ours.multihead_attn, pattern=sparse(L, 70))
    tgt, memory, _ = draw(seqlen_k=70)
    causal = nn.Transformer.generate_square_subsequent_mask(L, **DOUBLE)
    both = causal.masked_fill(torch_mask(sparse()), float("-inf"))
    memory_mask = torch_mask(sparse(L, 70))
    expected = theirs(tgt, memory, tgt_mask=both, memory_mask=memory_mask)
    torch.testing.assert_close(ours(tgt, memory, tgt_mask=causal, tgt_is_causal=True), expected)
    torch.testing.assert_close(ours.eval()(tgt, memory, tgt_mask=causal), expected)


# ---- nested tensors


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested(layout):
    ours, _ = pair(lambda q, k: sparse(q, k), batch_first=True)
    rows = [torch.randn(n, E, **DOUBLE, requires_grad=True) for n in (40, L)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    out, _ = ours(nested, nested, nested, need_weights=False)
    assert out.is_nested and out.layout == layout
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padding = torch.arange(L) >= torch.tensor([[40], [L]])
    expected, _ = ours(padded, padded, padded, key_padding_mask=padding, need_weights=False)
    got = out.unbind()
    torch.testing.assert_close(got[0], expected[0, :40])
    torch.testing.assert_close(got[1], expected[1])
    a = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), rows)
    b = torch.autograd.grad(expected.square().masked_fill(padding[..., None], 0).sum(), rows)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)
