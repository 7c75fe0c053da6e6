"""Dense MultiheadAttention in the place of torch's: what users of torch.nn.MultiheadAttention rely on. With None and
"dense" torch's inference operators are taken where torch does; a callable is attention by our kernels alone."""

from __future__ import annotations

import inspect
from unittest import mock

import pytest
import tessera
from bounds import assert_rounded
from tessera.nn import MultiheadAttention

import torch
from torch import nn

PATTERNS = pytest.mark.parametrize("pattern", [None, tessera.patterns.dense], ids=["None", "ours"])


def both(pattern, *args, **kwargs):
    ours = MultiheadAttention(*args, pattern=pattern, **kwargs)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.MultiheadAttention(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_signatures_begin_with_torchs():
    for name in ("__init__", "forward"):
        ours = list(inspect.signature(getattr(MultiheadAttention, name)).parameters.values())
        theirs = list(inspect.signature(getattr(nn.MultiheadAttention, name)).parameters.values())
        # Weights are what torch gives where they are not spoken of, unless a pattern is there.
        theirs = [p.replace(default=None) if p.name == "need_weights" else p for p in theirs]
        assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert all(p.kind == p.KEYWORD_ONLY and p.default is None for p in ours[len(theirs) :])


@PATTERNS
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_modes(pattern, mode, need_weights):
    """Odd head dims, few tokens, both kinds of masks, in every mode; torch's module in fp64."""
    for heads, dim, tokens in ((1, 3, 1), (2, 5, 2), (4, 9, 7), (7, 2, 5)):
        ours, theirs = both(pattern, heads * dim, heads, batch_first=True)
        ours.train(mode == "train"), theirs.train(mode == "train")
        x = torch.randn(3, tokens, heads * dim)
        theirs, exact = theirs.double(), x.double()
        mask = torch.rand(tokens, tokens) < 0.4
        mask.fill_diagonal_(False)
        padding = torch.zeros(3, tokens, dtype=torch.bool)
        padding[0, 1:] = True
        mask[:, 0] = False
        with torch.set_grad_enabled(mode != "no_grad"):
            for options in (
                {},
                {"attn_mask": mask},
                {"key_padding_mask": padding},
                {"attn_mask": mask, "key_padding_mask": padding},
            ):
                for average in (True, False):
                    options = {**options, "need_weights": need_weights, "average_attn_weights": average}
                    got, expected = ours(x, x, x, **options), theirs(exact, exact, exact, **options)
                    assert_rounded(got[0], expected[0], heads * dim, dim, tokens, heads * dim)
                    assert (got[1] is None) == (expected[1] is None)
                    if need_weights:
                        assert_rounded(got[1], expected[1], heads * dim, dim, tokens, heads)


@PATTERNS
def test_mask_of_each_head_is_the_masks_one_by_one(pattern):
    module = MultiheadAttention(8, 4, pattern=pattern)
    query, key = torch.rand(2, 6, 8), torch.rand(3, 6, 8)
    masks = torch.zeros(6, 2, 3).masked_fill(torch.rand(6, 2, 3) < 0.3, float("-inf"))
    out = module(query, key, key, attn_mask=masks.repeat_interleave(4, dim=0))[0]
    for i in range(6):
        one = [t[:, i : i + 1] for t in (query, key)]
        torch.testing.assert_close(out[:, i : i + 1], module(one[0], one[1], one[1], attn_mask=masks[i])[0])


@PATTERNS
@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ([(4, 4, 4), (4, 4), (4, 4, 4)], {}, "expected `key` and `value` to be 3-D but found 2-D and 3-D"),
        ([(4, 4), (4, 4), (4, 4, 4)], {}, "expected `key` and `value` to be 2-D but found 2-D and 3-D"),
        ([(4, 4, 4)] * 3, {"key_padding_mask": (4,)}, "expected `key_padding_mask` to be `None` or 2-D but found 1-D"),
        ([(4, 4)] * 3, {"key_padding_mask": (1, 4)}, "expected `key_padding_mask` to be `None` or 1-D but found 2-D"),
        ([(4, 4, 4)] * 3, {"attn_mask": (4,)}, "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D"),
        ([(4, 4)] * 3, {"attn_mask": (5, 4, 4)}, r"Expected `attn_mask` shape to be \(4, 4, 4\)"),
        ([(4, 4, 4)] * 3, {"attn_mask": (4, 5)}, "attn_mask.*shape.*4, 5"),
        ([(4, 4, 4)] * 3, {"attn_mask": (4, 4, 4)}, r"attn_mask.*\(16, 4, 4\)"),
        ([(4, 4, 4)] * 3, {"key_padding_mask": (4, 3)}, r"key_padding_mask.*\(4, 3\)"),
        ([(4, 4, 4), (4, 3, 4), (4, 3, 4)], {}, "key.*batch"),
        ([(4, 4, 4), (4, 4, 4), (3, 4, 4)], {}, "value"),
        ([(4, 4, 5)] * 3, {}, "query.*5"),
        ([(4,)] * 3, {}, "query should be unbatched 2D or batched 3D tensor but received 1-D"),
    ],
)
def test_shapes(pattern, eval_mode, shapes, options, words):
    ours, theirs = (m.train(not eval_mode) for m in both(pattern, 4, 4))
    inputs = [torch.randn(s) for s in shapes]
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in options.items()}
    with torch.set_grad_enabled(not eval_mode):
        with pytest.raises(Exception) as expected:
            theirs(*inputs, **masks)
        with pytest.raises(ValueError, match=words) as got:
            ours(*inputs, **masks)
    # Who catches torch's error catches ours, and no other one of torch's.
    for error in (AssertionError, RuntimeError):
        assert isinstance(got.value, error) == isinstance(expected.value, error)


def test_mask_dtypes():
    x = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="attn_mask.*bool and floating"):
        MultiheadAttention(8, 2)(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match="key_padding_mask"):
        MultiheadAttention(8, 2)(x, x, x, key_padding_mask=[False] * 4)


def test_constructor():
    with pytest.raises(ValueError, match="embed_dim"):
        MultiheadAttention(0, 1)
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="num_heads.*divisible"):
            MultiheadAttention(10, 3)
    plain = MultiheadAttention(8, 4, bias=False)
    assert plain.in_proj_bias is None and plain.out_proj.bias is None


@pytest.mark.parametrize(
    ("pattern", "taken"), [(None, True), ("dense", True), (tessera.patterns.dense, False), ("causal", False)]
)
def test_torchs_inference_operator(pattern, taken):
    """Dense weights of dense attention in inference: torch's operator, but never for a pattern."""
    module = MultiheadAttention(16, 8, batch_first=True, pattern=pattern).eval()
    x = torch.randn(2, 5, 16)
    result = (torch.zeros(2, 5, 16), torch.zeros(2, 5, 5))
    with torch.no_grad(), mock.patch("torch._native_multi_head_attention", return_value=result) as operator:
        module(x, x, x)
        assert operator.called == taken
        operator.reset_mock()
        module(x, x, x, need_weights=False)
        assert not operator.called


@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_switch_of_its_inference_operators(enabled):
    module = MultiheadAttention(16, 2, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(2, 5, 16)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with (
            torch.no_grad(),
            mock.patch("torch._native_multi_head_attention", return_value=(x, x)) as in_module,
            mock.patch("torch._transformer_encoder_layer_fwd", return_value=x) as in_layer,
        ):
            module(x, x, x)
            layer(x)
        assert in_module.called == in_layer.called == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_config_that_stops_being_dense():
    """It may be changed after it was given: what torch's layers ask must follow."""
    config = tessera.PatternConfig("dense", block_size=16)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, pattern=config)
    x = torch.randn(1, 64, 16)
    with mock.patch("torch._transformer_encoder_layer_fwd", return_value=x) as operator:
        with torch.no_grad():
            layer(x)
            assert operator.called
            operator.reset_mock()
            config.pattern_type, config.density = "local_window", 0.25
            inference = layer(x)
        assert not operator.called
    torch.testing.assert_close(layer(x).detach(), inference)


@pytest.mark.parametrize("pattern", [None, "dense", "causal"])
@pytest.mark.parametrize("dims", [{}, {"kdim": 4, "vdim": 4}])
def test_parameters_are_drawn_again_as_torchs(pattern, dims):
    ours, theirs = both(pattern, 8, 2, **dims)
    for module in (ours, theirs):
        torch.manual_seed(3)
        module._reset_parameters()
    for name, p in theirs.named_parameters():
        assert torch.equal(p, ours.get_parameter(name)), name
    assert ours._qkv_same_embed_dim == (theirs._qkv_same_embed_dim and pattern != "causal")


def test_torchscript():
    """Dense attention becomes torch's module; a pattern is refused in words."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(2, 5, 8)
    expected = layer(x)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), expected)
    assert scripted.self_attn.original_name == "MultiheadAttention"
    with pytest.raises(RuntimeError, match="torch.jit.script: got attention with the pattern.*torch.compile"):
        torch.jit.script(MultiheadAttention(8, 2, pattern="causal"))


@pytest.mark.parametrize("pattern", [None, "dense", tessera.patterns.dense], ids=["None", "dense", "ours"])
def test_rows_without_keys_are_the_same_in_all_modes(pattern):
    """0, also where torch's inference operator has NaN."""
    module = MultiheadAttention(16, 4, batch_first=True, pattern=pattern).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[3] = True
    padding = torch.tensor([[False] * 5, [True] * 5])
    both_masks = {"attn_mask": mask, "key_padding_mask": padding}
    for options in ({"attn_mask": mask}, {"key_padding_mask": padding}, both_masks):
        expected, expected_weights = module(x, x, x, need_weights=True, **options)
        assert not expected.isnan().any() and not expected_weights[1 if "key_padding_mask" in options else 0, 3].any()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                out, weights = module(x, x, x, need_weights=True, **options)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(weights, expected_weights)


@PATTERNS
def test_bias_of_another_dtype(pattern):
    module = MultiheadAttention(4, 4, batch_first=True, dtype=torch.float64, pattern=pattern).eval()
    module.in_proj_bias = nn.Parameter(module.in_proj_bias.half())
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert module(x, x, x)[0].dtype == torch.float64


def test_nested_without_pattern():
    """Strided nested tensors as torch takes them: in inference only. Jagged ones anywhere, of different lengths too."""
    module = MultiheadAttention(10, 2, batch_first=True).eval()
    rows = [torch.randn(n, 10) for n in (4, 6)]
    nested = torch.nested.nested_tensor(rows)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        module(nested, nested, nested)
    with torch.no_grad():
        out = module(nested, nested, nested, need_weights=False)[0].unbind()
    for x, y in zip(rows, out):
        torch.testing.assert_close(y, module(x, x, x)[0].detach())
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    other = torch.nested.nested_tensor([torch.randn(n, 10) for n in (7, 16)], layout=torch.jagged)
    for options in ({}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        module = MultiheadAttention(10, 2, batch_first=True, **options)
        out, weights = module(jagged, other, other)
        assert weights.shape == (2, 6, 16 + bool(options))
        for x, z, y in zip(rows, other.unbind(), out.unbind()):
            torch.testing.assert_close(y, module(x, z, z)[0])
    with pytest.raises(ValueError, match="query should be unbatched 2D or batched 3D"):
        module(*[torch.nested.nested_tensor([])] * 3)
    with pytest.raises(ValueError, match="batch_first"):
        MultiheadAttention(10, 2)(jagged, jagged, jagged)
    with pytest.raises(ValueError, match="all of one kind"):
        module(jagged, torch.randn(2, 7, 10), torch.randn(2, 7, 10))


@PATTERNS
def test_empty(pattern):
    """No batch, no queries, no keys."""
    module = MultiheadAttention(8, 2, batch_first=True, pattern=pattern)
    for n, seqlen_q, seqlen_k in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q, k = torch.randn(n, seqlen_q, 8, requires_grad=True), torch.randn(n, seqlen_k, 8)
        out, weights = module(q, k, k, torch.zeros(n, seqlen_k, dtype=torch.bool), need_weights=True)
        assert out.shape == (n, seqlen_q, 8) and weights.shape == (n, seqlen_q, seqlen_k)
        out.sum().backward()


def test_output_is_contiguous_as_torchs():
    x = torch.randn(5, 2, 8)
    assert MultiheadAttention(8, 2, pattern="dense")(x, x, x)[0].is_contiguous()
    assert MultiheadAttention(8, 2, pattern="dense", batch_first=True)(x, x, x)[0].is_contiguous()
