"""Configuration, pattern store, and the figures that the guides' modules report; usages are in test_guides.py."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import tessera
from tessera.guides import (
    BlockSparseRingDilatedAttention,
    BlockSparseRingMultiheadDilatedAttention,
    BlockSparseRingMultiheadDilatedAttentionV2,
    SparsePatternConfig,
    SparsePatternGenerator,
)

import torch


def qkv(batch, seqlen, heads, dim, kv_heads=None):
    torch.manual_seed(1)
    kv_heads = heads if kv_heads is None else kv_heads
    return tuple(torch.randn(batch, seqlen, h, dim) for h in (heads, kv_heads, kv_heads))


# ---- SparsePatternConfig ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("sparsity_ratio", 0, ValueError),
        ("sparsity_ratio", 1.01, ValueError),
        ("sparsity_ratio", float("nan"), ValueError),
        ("sparsity_ratio", "0.1", TypeError),
        ("density", -0.1, ValueError),
        ("sparsity", 1.0, ValueError),
        ("block_size", 100, ValueError),
        ("block_size", 512, ValueError),
        ("block_size", 64.0, TypeError),
        ("pattern_type", "adaptive", ValueError),
        ("local_window_size", 0, ValueError),
        ("global_tokens", -1, ValueError),
        ("dilation_rates", [1, 0], ValueError),
        ("dilation_rates", 4, TypeError),
        ("max_sparsity", 1.5, ValueError),
    ],
)
def test_config_refuses(field, value, error):
    with pytest.raises(error, match=rf"^{field}: got .*; allowed: "):
        SparsePatternConfig(**{field: value})
    config = SparsePatternConfig()
    before = copy.copy(config)
    with pytest.raises(error, match=rf"^{field}: got .*; allowed: "):
        setattr(config, field, value)
    assert config == before


def test_config_refuses_unknown_and_contradicting_fields():
    with pytest.raises(AttributeError, match="no field 'blocksize'"):
        SparsePatternConfig().blocksize = 64
    with pytest.raises(TypeError, match="sparse_config: got 'blocksize'"):
        BlockSparseRingDilatedAttention(sparse_config={"blocksize": 64})
    with pytest.raises(ValueError, match="only one of them"):
        SparsePatternConfig(density=0.1, sparsity=0.9)
    with pytest.raises(ValueError, match="min_sparsity"):
        SparsePatternConfig(density=0.5, min_sparsity=0.8)


def test_density_has_three_names():
    config = SparsePatternConfig(sparsity=0.75)
    assert config.density == config.sparsity_ratio == 0.25
    config.density = 0.5
    assert config.sparsity == config.sparsity_ratio == 0.5
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


SPELLINGS = [{"sparsity_ratio": 0.25}, {"density": 0.25}, {"sparsity": 0.75}]


@pytest.mark.parametrize("given", SPELLINGS)
@pytest.mark.parametrize("base", [{"sparsity_ratio": 0.4}, {"density": 0.4}, {"sparsity": 0.6}, {}])
def test_a_given_density_overrides_that_of_the_base_however_they_are_spelt(base, given):
    for config in (base, SparsePatternConfig(**base)):
        assert BlockSparseRingDilatedAttention(sparse_config=config, **given).sparse_config.density == 0.25
        assert SparsePatternGenerator(config, **given).config.density == 0.25
    for preset in ("dilated", "ultra_sparse"):
        assert tessera.get_block_sparse_preset(preset, **given).sparse_config.density == 0.25


@pytest.mark.parametrize("given", SPELLINGS)
@pytest.mark.parametrize("other", SPELLINGS)
def test_two_densities_in_one_place_stay_an_error(given, other):
    if given is not other:
        with pytest.raises(ValueError, match="^.* and .*: got .*; allowed: only one of them"):
            BlockSparseRingDilatedAttention(sparse_config={"density": 0.5}, **given, **other)
        with pytest.raises(ValueError, match="^.* and .*: got .*; allowed: only one of them"):
            BlockSparseRingDilatedAttention(sparse_config={**given, **other})


def test_overriding_another_field_does_not_warn_of_a_density_above_half():
    tessera.pattern.config._warned_above_half = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SparsePatternConfig.of(SparsePatternConfig(density=0.75), block_size=64).density == 0.75


def test_only_options_of_the_kind_reach_the_pattern():
    fields = {"local_window_size": 256, "global_tokens": 64, "dilation_rates": [1, 3], "stride": 4, "seed": 5}
    for kind in ("dense", "causal", "local_window", "dilated_sparse", "global_local", "strided", "random", "bigbird"):
        assert SparsePatternConfig(kind, 0.25, **fields).pattern(1024).num_blocks > 0


# ---- Pattern store ---------------------------------------------------------------------------------------------------


def test_store_makes_a_pattern_once_and_never_gives_a_stale_one():
    generator = SparsePatternGenerator(pattern_type="random", sparsity_ratio=0.25)
    cache = generator.pattern_cache
    first = generator.create_pattern(2048, 2)
    assert generator.create_pattern(2048, 2) is first and (cache.hits, cache.misses) == (1, 1)
    for change in ({"seed": 1}, {"block_size": 64}, {"density": 0.5}, {"pattern_type": "dilated_sparse"}):
        for name, value in change.items():
            setattr(generator.config, name, value)
        assert generator.create_pattern(2048, 2) == generator.config.pattern(2048, heads=2)
    assert generator.create_pattern(2048, 2, causal=True) != generator.create_pattern(2048, 2)
    assert generator.create_pattern(2048, 2, 1024).seqlen_k == 1024
    generator.config.enable_caching = False
    assert generator.create_pattern(2048) is not generator.create_pattern(2048)


def test_store_drops_the_least_recently_used():
    generator = SparsePatternGenerator()
    cache = generator.pattern_cache
    cache.max_entries = 2
    a, b = generator.create_pattern(1024), generator.create_pattern(2048)
    assert generator.create_pattern(1024) is a
    generator.create_pattern(4096)
    assert len(cache) == 2 and cache.evictions == 1 and cache.nbytes > 0
    assert generator.create_pattern(1024) is a and generator.create_pattern(2048) is not b


def test_store_takes_only_patterns_that_fit():
    cache = SparsePatternGenerator(block_size=64).pattern_cache
    with pytest.raises(TypeError, match="pattern_cache key"):
        cache["1024"] = torch.ones(16, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        cache[1024] = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match="pattern: got"):
        cache[1024] = torch.ones(16, 16)
    with pytest.raises(ValueError, match="pattern_cache"):
        cache[1024] = tessera.patterns.dense(512)
    cache[1000] = torch.ones(16, 16, dtype=torch.bool)  # a ragged end
    assert cache[1000].seqlen_q == 1000 and 1000 not in list(cache) and (1000, 1000) in list(cache)


def test_store_serves_threads():
    generator = SparsePatternGenerator(sparsity_ratio=0.2)
    generator.pattern_cache.max_entries = 3
    wrong = []

    def work():
        for i in range(60):
            n = 512 * (1 + i % 5)
            if generator.create_pattern(n).seqlen_q != n:
                wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and len(generator.pattern_cache) <= 3


# ---- Modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"ring_size": 2}, "ring_size"),
        ({"use_adaptive_sparsity": True}, "use_adaptive_sparsity"),
        ({"segment_lengths": [512]}, "segment_lengths, dilation_rates"),
        ({"dilation_rates": [1]}, "segment_lengths, dilation_rates"),
        ({"segment_lengths": [512], "dilation_rates": [1, 2]}, "dilation_rates"),
        ({"segment_lengths": [], "dilation_rates": []}, "segment_lengths"),
        ({"segment_lengths": [512], "dilation_rates": [0]}, "dilation_rates"),
        ({"segment_lengths": [512], "dilation_rates": [1], "block_size": (64, 32)}, "block_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "x"}, "dropout"),
        ({"dropout": None}, "dropout"),
        ({"sparsity_ratio": 0.0}, "sparsity_ratio"),
        ({"segment_lengths": 32, "dilation_rates": 1}, "segment_lengths"),
        ({"segment_lengths": [32], "dilation_rates": "1"}, "dilation_rates"),
        ({"segment_lengths": [32.0], "dilation_rates": [1]}, "segment_lengths"),
        ({"segment_lengths": [True], "dilation_rates": [1]}, "segment_lengths"),
    ],
)
def test_module_refuses(arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*; allowed: "):
        BlockSparseRingDilatedAttention(**arguments)


def test_lengths_of_numpy_are_welcome():
    attention = BlockSparseRingDilatedAttention([np.int64(32)], (np.int32(1),))
    assert attention.segment_lengths == (32,) and type(attention.segment_lengths[0]) is int


@pytest.mark.parametrize("segments", [(None, None), ([64, 128], [1, 2])])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"query": None}, "query"),
        ({"key": [1]}, "key"),
        ({"value": torch.ones(3)}, "value"),
        ({"query": torch.ones(3)}, "query"),
        ({"is_causal": "no"}, "is_causal"),
        ({"return_attention_weights": "blocks"}, "return_attention_weights"),
        ({"layout": "bhsd"}, "layout"),
        ({"layout": "bshd"}, "layout"),
        ({"dropout_p": 0.3}, "dropout_p"),
        ({"return_lse": True}, "return_lse"),
        ({"causal": True}, "causal"),
        ({"pattern": "dense"}, "pattern"),
        ({"block": 16}, "block"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"scale": "x"}, "scale"),
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_forward_refuses_and_names_the_argument(segments, change, name, measured):
    attention = BlockSparseRingDilatedAttention(*segments, block_size=16)
    if measured:
        attention.performance_monitor.enable(sample_every=1)
    given = dict(zip(("query", "key", "value"), qkv(1, 200, 2, 16))) | change
    if name == "sinks" and segments == (None, None):  # whole sequences take them
        assert torch.isfinite(attention(**given)).all()
        return
    with pytest.raises((ValueError, TypeError), match=f"^{name}: got .*; allowed: "):
        attention(**given)
    assert attention.get_performance_stats()["forwards"] == 0


@pytest.mark.parametrize("segments", [(None, None), ([64, 128], [1, 2])])
def test_options_that_are_not_given_are_welcome(segments):
    attention = BlockSparseRingDilatedAttention(*segments, block_size=16)
    attention.performance_monitor.enable(sample_every=1)
    tensors = qkv(1, 200, 2, 16)
    none = {"block_bias": None, "sinks": None, "attn_bias": None, "window": None, "q_offset": None}
    assert torch.equal(attention(*tensors, **none), attention(*tensors))
    assert attention.get_performance_stats()["quality_score"] > 0


def test_calls_with_a_window_are_judged_by_it():
    attention = BlockSparseRingDilatedAttention(pattern_type="local_window", local_window_size=64, block_size=16)
    attention.performance_monitor.enable(sample_every=1)
    attention(*qkv(1, 200, 2, 16), window=(16, 16))
    assert attention.get_performance_stats()["quality_score"] == pytest.approx(1.0)


def test_compiled_calls_take_the_options_that_segments_do_not():
    attention = BlockSparseRingDilatedAttention(density=0.5, block_size=16)
    tensors, sinks = qkv(1, 200, 2, 16), torch.randn(2)
    compiled = torch.compile(attention, backend="eager")
    torch.testing.assert_close(compiled(*tensors, sinks=sinks), attention(*tensors, sinks=sinks))


@pytest.mark.parametrize("segments", [(None, None), ([64, 128], [1, 2])])
def test_weights_have_no_gradient(segments):
    attention = BlockSparseRingDilatedAttention(*segments, block_size=16)
    q, k, v = (t.requires_grad_() for t in qkv(1, 200, 2, 16))
    bias = {"attn_bias": torch.zeros(1, 1, 200, 200, requires_grad=True)} if segments == (None, None) else {}
    out, weights = attention(q, k, v, return_attention_weights=True, **bias)
    assert out.requires_grad and not weights["block_values"].requires_grad


def test_set_sparsity_ratio_is_honoured_over_a_window_and_leaves_the_shared_config_alone():
    config = SparsePatternConfig("local_window", local_window_size=256, block_size=64)
    one, other = (BlockSparseRingDilatedAttention(sparse_config=config) for _ in range(2))
    assert one.set_sparsity_ratio(0.5) == 0.5
    assert one.density(4096) == pytest.approx(0.5, abs=0.01)
    assert other.sparse_config is config and config.local_window_size == 256
    with pytest.raises(ValueError, match="^sparsity_ratio"):
        one.set_sparsity_ratio(0.0)
    with pytest.raises(ValueError, match="dense keeps every admissible pair"):
        BlockSparseRingDilatedAttention(sparse_config="dense").set_sparsity_ratio(0.5)


def test_modules_are_copied_and_pickled():
    attention = BlockSparseRingDilatedAttention(sparsity_ratio=0.25, block_size=16)
    q, k, v = qkv(1, 256, 2, 16)
    expected = attention(q, k, v)
    for again in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(again(q, k, v), expected)
        again.set_sparsity_ratio(1.0)
        assert attention.sparse_config.density == 0.25 and not torch.equal(again(q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_grouped_heads_and_gradients(causal):
    attention = BlockSparseRingDilatedAttention(sparsity_ratio=0.5, block_size=32)
    q, k, v = qkv(2, 320, 4, 16, kv_heads=2)
    q = q[:, :200].requires_grad_()
    k.requires_grad_(), v.requires_grad_()
    out, weights = attention(q, k, v, is_causal=causal, return_attention_weights=True)
    mask = attention.pattern_generator.create_pattern(200, 4, 320, causal).to_token_mask()[0, 0]
    if causal:
        mask = mask & torch.ones(200, 320, dtype=torch.bool).tril(120)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert weights["shape"] == (2, 4, 200, 320) and not weights["block_values"].requires_grad
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_segments_with_grouped_heads_have_gradients_and_weights():
    attention = BlockSparseRingDilatedAttention([64, 128], [1, 3], sparsity_ratio=0.5, block_size=16)
    q, k, v = (t.requires_grad_() for t in qkv(2, 200, 4, 16, kv_heads=2))
    out, weights = attention(q, k, v, is_causal=True, return_attention_weights=True)
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in (q, k, v))
    # Weights times values are the output; rows that nothing covers are 0 in both.
    total = torch.zeros(2, 4, 208, 16)
    padded = torch.nn.functional.pad(v.detach(), (0, 0, 0, 0, 0, 8))
    for (b, h, i, j), block in zip(weights["block_indices"].tolist(), weights["block_values"], strict=True):
        total[b, h, i * 16 : i * 16 + 16] += block @ padded[b, j * 16 : j * 16 + 16, h // 2]
    torch.testing.assert_close(total[:, :, :200].transpose(1, 2), out.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="return_attention_weights: got 'True with key_lengths'"):
        attention(q, k, v, return_attention_weights=True, key_lengths=torch.tensor([100, 200]))


@pytest.mark.parametrize(
    ("arguments", "fullgraph"),
    [
        ({}, True),
        ({"segment_lengths": [128, 256], "dilation_rates": [1, 2]}, True),
        ({"pattern_type": "random"}, False),  # heads of their own: the pattern is made between two graphs
    ],
)
def test_modules_compile(arguments, fullgraph):
    base = BlockSparseRingDilatedAttention(sparsity_ratio=0.25, block_size=32, **arguments)
    multihead = BlockSparseRingMultiheadDilatedAttention(32, 2, sparsity_ratio=0.25, block_size=32, **arguments)
    q, k, v = qkv(1, 300, 2, 16)
    x = torch.randn(1, 300, 32)
    for module, tensors in ((base, (q, k, v)), (multihead, (x,))):
        expected = module(*tensors)
        torch._dynamo.reset()
        found = torch.compile(module, backend="eager", fullgraph=fullgraph)(*tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_dropout_is_for_training_only():
    attention = BlockSparseRingDilatedAttention(sparsity_ratio=0.5, block_size=16, dropout=0.5)
    q, k, v = qkv(1, 128, 2, 16)
    torch.manual_seed(0)
    first = attention(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v), first) and not torch.equal(attention(q, k, v), first)
    attention.eval()
    assert torch.equal(attention(q, k, v), attention(q, k, v))


MULTIHEAD = {"embed_dim": 32, "num_heads": 4, "sparsity_ratio": 0.5, "block_size": 16}


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 24, "vdim": 40}])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_equals_torch_under_the_corresponding_mask(options, masked):
    ours = BlockSparseRingMultiheadDilatedAttention(**MULTIHEAD, **options)
    torchs = torch.nn.MultiheadAttention(32, 4, batch_first=True, **options)
    torchs.load_state_dict(ours.state_dict())
    query, key = torch.randn(2, 100, 32), torch.randn(2, 130, options.get("kdim", 32))
    value = torch.randn(2, 130, options.get("vdim", 32))
    kept = ours.pattern_generator.create_pattern(100, 4, 130).to_token_mask()[0, 0]
    masks = {}
    if masked:
        masks["key_padding_mask"] = torch.arange(130) >= torch.tensor([[130], [90]])
        kept = kept & (torch.rand(100, 130) < 0.9)
        masks["attn_mask"] = ~kept
    expected, dense = torchs(
        query, key, value, **{**masks, "attn_mask": ~kept}, need_weights=True, average_attn_weights=False
    )
    out, weights = ours(query, key, value, need_weights=True, **masks)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for (b, h, i, j), block in zip(weights["block_indices"].tolist(), weights["block_values"], strict=True):
        part = dense[b, h, i * 16 : i * 16 + 16, j * 16 : min(j * 16 + 16, 130)]
        torch.testing.assert_close(block[: part.shape[0], : part.shape[1]], part, atol=1e-6, rtol=1e-4)


def test_multihead_attends_to_itself_and_agrees_whether_weights_are_asked_for():
    attention = BlockSparseRingMultiheadDilatedAttention(**MULTIHEAD)
    x = torch.randn(2, 100, 32)
    out, none = attention(x)
    assert none is None and torch.equal(out, attention(x, x, x)[0])
    torch.testing.assert_close(attention(x, return_attention_weights=True)[0], out)
    causal = torch.ones(100, 100, dtype=torch.bool).triu(1)
    calls = [
        attention(x, is_causal=True)[0],
        attention(x, attn_mask=causal, is_causal=True)[0],
        attention(x, attn_mask=causal, is_causal=True, need_weights=True)[0],
    ]
    for other in calls[1:]:
        torch.testing.assert_close(other, calls[0], atol=1e-5, rtol=1e-5)
    assert attention(x[0])[0].shape == (100, 32)
    second = BlockSparseRingMultiheadDilatedAttention(**MULTIHEAD, batch_first=False)
    second.load_state_dict(attention.state_dict())
    torch.testing.assert_close(second(x.transpose(0, 1))[0].transpose(0, 1), out)


@pytest.mark.parametrize("segments", [{}, {"segment_lengths": [64, 128], "dilation_rates": [1, 2]}])
def test_multihead_in_an_encoder_layer_is_sparse_in_every_mode(segments):
    attention = BlockSparseRingMultiheadDilatedAttention(**MULTIHEAD, **segments)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    dense = layer.self_attn
    layer.self_attn = attention.from_torch(dense, sparsity_ratio=0.5, block_size=16, **segments)
    x = torch.randn(1, 200, 32)
    trained = layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x), trained, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained, atol=1e-5, rtol=1e-5)
    layer.self_attn = dense.eval()
    assert not torch.allclose(layer(x), trained, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_v2_in_torchs_layers_is_what_v1_is(training):
    """Layers take [0] of (output, weights): of the output alone that is one batch element, broadcast over all."""
    one = BlockSparseRingMultiheadDilatedAttention(**MULTIHEAD)
    two = BlockSparseRingMultiheadDilatedAttentionV2(**MULTIHEAD)
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 100, 32)
    for layer, arguments in (
        (torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), (x,)),
        (torch.nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True), (x, x.flip(0))),
    ):
        layer.train(training)
        found = []
        for attention in (one, two):
            layer.self_attn = attention
            found.append(layer(*arguments))
        assert torch.equal(*found) and not torch.allclose(found[1][0], found[1][1], atol=1e-3)


def test_v2_returns_a_pair_where_need_weights_is_given():
    attention = BlockSparseRingMultiheadDilatedAttentionV2(**MULTIHEAD)
    x = torch.randn(2, 100, 32)
    out = attention(x)
    assert torch.equal(attention(x, return_attention_weights=False), out)
    for pair in (attention(x, need_weights=False), attention(x, x, x, None, False)):
        assert torch.equal(pair[0], out) and pair[1] is None
    for pair in (attention(x, need_weights=True), attention(x, return_attention_weights=True),
                 attention(x, need_weights=False, return_attention_weights=True)):  # fmt: skip
        torch.testing.assert_close(pair[0], out)
        assert pair[1]["shape"] == (2, 4, 100, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_with_a_norm_leaves_nothing_on_the_meta_device(dtype):
    dense = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=dtype)
    attention = BlockSparseRingMultiheadDilatedAttention.from_torch(
        dense, use_layer_norm=True, sparsity_ratio=0.5, block_size=16
    )
    shared = dict(dense.named_parameters())
    for name, parameter in attention.named_parameters():
        assert parameter.device.type == "cpu" and parameter.dtype == dtype, name
        assert name.startswith("norm.") or parameter is shared[name]
    out, _ = attention(torch.randn(2, 100, 32, dtype=dtype))
    out.sum().backward()
    assert torch.isfinite(out).all() and attention.norm.weight.grad.abs().sum() > 0


def test_multihead_with_segments_and_norm():
    attention = BlockSparseRingMultiheadDilatedAttention(
        **MULTIHEAD, segment_lengths=[64], dilation_rates=[1], use_layer_norm=True
    )
    x = torch.randn(1, 128, 32, requires_grad=True)
    out, weights = attention(x, need_weights=True)
    assert weights["block_values"].shape[1:] == (16, 16) and weights["shape"] == (1, 4, 128, 128)
    changed = x.detach().clone()
    changed[:, 64:] += 1
    assert torch.equal(attention(changed)[0][:, :64], out[:, :64])  # the other segment
    out.sum().backward()
    assert attention.norm.weight.grad.abs().sum() > 0
    copy.deepcopy(attention)(x)
    pickle.loads(pickle.dumps(attention))(x)
    attention.to(torch.float64)
    assert attention(x.double())[0].dtype == torch.float64


# ---- Figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(256, 256), (200, 200), (100, 333), (333, 100), (1, 1)])
def test_token_pairs(seqlen_q, seqlen_k, causal):
    pattern = tessera.patterns.random(seqlen_q, seqlen_k, block=(32, 16), density=0.4, causal=causal)
    mask = pattern.to_token_mask()
    if causal:
        mask = mask & torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    assert torch.ops.tessera.admitted_pairs(1, 1, *pattern.op_args, causal=causal) == int(mask.sum())


SEGMENTS = [
    ([64, 150], [1, 3]), ([32, 64, 96], [2, 1, 4]), ([64, 128], [1, 1]), ([48], [1]), ([512], [4]), ([40, 40], [1, 48])
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", [200, 384])  # a ragged end; two periods of the second
@pytest.mark.parametrize("segments", SEGMENTS)
def test_density_of_segments_counts_each_pair_once(segments, seqlen, causal):
    attention = BlockSparseRingDilatedAttention(*segments, sparsity_ratio=0.5, block_size=16)
    heads = 5
    dilation = attention._dilation()
    admitted = sum(
        int(torch.ops.tessera.dilated_keys(seqlen, head, row, causal, *segments, **dilation.inner).sum())
        for row in range(seqlen)
        for head in range(heads)
    )
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen**2)
    assert attention.density(seqlen, num_heads=heads, causal=causal) == pytest.approx(admitted / dense, rel=1e-12)


def test_shares_of_segments_that_overlap_lie_between_0_and_1():
    attention = BlockSparseRingDilatedAttention([64, 128], [1, 1], pattern_type="dense", block_size=16)
    attention.performance_monitor.enable()
    attention(*qkv(1, 128, 2, 16))
    stats, info = attention.get_performance_stats(), attention.get_memory_info()
    assert stats["density"] == info["density"] == attention.density(128) == 1.0
    assert stats["avg_sparsity"] == info["memory_reduction"] == 0.0
    attention.sparse_config.pattern_type = "local_window"
    attention.sparse_config.local_window_size = 16
    assert attention.density(128) < 0.5  # a changed configuration is counted anew


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [(None, None), *SEGMENTS])
def test_savings_are_those_of_the_weights(segments, causal):
    attention = BlockSparseRingDilatedAttention(*segments, sparsity_ratio=0.5, block_size=32)
    _, weights = attention(*qkv(2, 200, 5, 16), is_causal=causal, return_attention_weights=True)
    found = attention.estimate_memory_savings(200, num_heads=5, batch_size=2, causal=causal)
    assert found["sparse_mb"] == weights["block_values"].numel() * 4 / 2**20
    assert found["dense_mb"] == 2 * 5 * 200 * 200 * 4 / 2**20
    assert found["savings"] == 1 - found["sparse_mb"] / found["dense_mb"]
    assert found["density"] == attention.density(200, num_heads=5, causal=causal)
    half = attention.estimate_memory_savings(200, 5, 2, causal, torch.bfloat16)
    assert half["sparse_mb"] == found["sparse_mb"] / 2
    if segments == (None, None):
        assert tessera.estimate_memory_savings(200, attention.sparse_config, 5, 2, causal) == found


@pytest.mark.parametrize(
    ("arguments", "name", "error"),
    [
        ({"seq_len": 0}, "seq_len", ValueError),
        ({"seq_len": 1.5}, "seq_len", TypeError),
        ({"num_heads": 0}, "num_heads", ValueError),
        ({"batch_size": "x"}, "batch_size", TypeError),
        ({"dtype": "fp32"}, "dtype", TypeError),
    ],
)
def test_savings_refuse(arguments, name, error):
    for estimate in (BlockSparseRingDilatedAttention().estimate_memory_savings, tessera.estimate_memory_savings):
        with pytest.raises(error, match=f"^{name}: got .*; allowed: "):
            estimate(**{"seq_len": 100, **arguments})


def test_quality_of_a_pattern_given_queries_or_weights():
    from tessera.guides import PatternQualityAnalyzer

    q, k, v = qkv(1, 300, 2, 16, kv_heads=1)
    pattern = tessera.patterns.random(300, block=32, density=0.3)
    weights = torch.softmax(torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 4, -1)
    analyzer = PatternQualityAnalyzer()
    given_qkv = analyzer.analyze_pattern_quality(pattern, query=q, key=k, value=v)
    given_weights = analyzer.analyze_pattern_quality(pattern.to_mask()[0, 0], weights[0], block_size=32)
    for name in ("coverage_ratio", "locality_score", "efficiency_score", "density", "oracle_coverage"):
        assert getattr(given_qkv, name) == pytest.approx(getattr(given_weights, name), rel=1e-3), name
    biased = analyzer.analyze_pattern_quality(pattern, query=q, key=k, attn_bias=10 * torch.eye(300)[None, None])
    assert biased.coverage_ratio > given_qkv.coverage_ratio + 0.1  # the diagonal is always kept
    with pytest.raises(ValueError, match="^softcap: got 'it beside reference_attention'"):
        analyzer.analyze_pattern_quality(pattern, weights, softcap=1.0)
    with pytest.raises(TypeError, match="^reference_attention: got list; allowed: torch.Tensor"):
        analyzer.analyze_pattern_quality(pattern, [[1]])
    with pytest.raises(ValueError, match="^reference_attention: got None"):
        analyzer.analyze_pattern_quality(pattern)
    with pytest.raises(ValueError, match="^reference_attention: got 'both'"):
        analyzer.analyze_pattern_quality(pattern, weights, query=q, key=k)


def test_error_of_weights_with_bitmaps_and_causality():
    from tessera.guides import PatternQualityAnalyzer

    weights = torch.rand(1, 2, 64, 64).softmax(-1)
    kept = (torch.arange(64)[:, None] - torch.arange(64)).abs() < 20
    pattern = tessera.BlockPattern.from_token_mask(kept, block=16)
    found = PatternQualityAnalyzer().analyze_pattern_quality(pattern, weights, causal=True)
    true = torch.nn.functional.normalize(weights.double().tril(), p=1, dim=-1)
    sparse = torch.nn.functional.normalize(true * kept, p=1, dim=-1)
    assert found.approximation_error == pytest.approx(((sparse - true).norm() / true.norm()).item(), rel=1e-6)
    assert found.coverage_ratio == pytest.approx((true * kept).sum(-1).mean().item(), rel=1e-5)


def test_optimizer_finds_a_configuration_that_reaches_the_target():
    from tessera.guides import PatternOptimizer

    q, k, v = qkv(1, 512, 2, 16)
    k[:, :32] += 2 * q.mean(1, keepdim=True)
    config, found = PatternOptimizer(target_coverage=0.5, block_size=32).optimize(q, k)
    assert found.reached and isinstance(config, SparsePatternConfig)
    pattern = config.pattern(512)
    assert pattern.density == pytest.approx(found.density)
    assert tessera.analysis.quality(q, k, v, pattern).coverage >= 0.5


def test_statistics_and_pictures_of_bool_tensors():
    from tessera.guides import PatternVisualizer, pattern_statistics

    mask = torch.eye(4, dtype=torch.bool)
    stats = pattern_statistics(mask, block_size=16)
    assert stats["density"] == stats["avg_row_density"] == 0.25 and stats["diagonal_density"] == 1.0
    assert PatternVisualizer().visualize_pattern(mask, block_size=16).split() == ["#...", ".#..", "..#.", "...#"]
    for path in (None, "unwritten.png"):
        with pytest.raises(TypeError, match="^title: got None; allowed: a str"):
            PatternVisualizer().visualize_pattern(mask, title=None, save_path=path)


def test_every_name_is_in_the_package_and_in_the_table():
    from pathlib import Path

    table = (Path(__file__).parents[2] / "docs" / "guide-names.md").read_text()
    for name in tessera.guides.__all__:
        assert getattr(tessera, name) is getattr(tessera.guides, name)
        assert name in table or name.endswith("V2"), name


@pytest.mark.parametrize("preset", ["local", "global_local", "dilated", "ultra_sparse"])
@pytest.mark.parametrize("named", ["sparsity_ratio", "density"])
def test_a_density_beside_a_preset_decides(preset, named):
    """Also where the preset has a window."""
    module = tessera.get_block_sparse_preset(preset, **{named: 0.3})
    assert module.sparse_config.density_decides
    assert module.sparse_config.sparsity_ratio == 0.3
    if not module.segment_lengths:
        assert abs(module.density(8192) - 0.3) < 0.02
    both = tessera.get_block_sparse_preset("local", density=0.3, local_window_size=512)
    assert both.sparse_config.local_window_size == 512 and not both.sparse_config.density_decides


def test_figures_of_a_causal_pattern_take_its_causality(tmp_path):
    """Said once: what these functions leave open is the pattern's."""
    p = tessera.patterns.local_window(256, block=32, density=0.4, causal=True)
    plain = tessera.BlockPattern.from_mask(p.to_mask()[0, 0], block=32, seqlen_q=256, seqlen_k=256)
    assert tessera.pattern_statistics(p) == tessera.pattern_statistics(plain, causal=True)
    assert tessera.pattern_statistics(plain)["density"] < tessera.pattern_statistics(p)["density"]
    tessera.PatternVisualizer().visualize_pattern(p, save_path=str(tmp_path / "p.png"))
    q, k, v = torch.randn(3, 1, 256, 1, 16)
    analyzer = tessera.PatternQualityAnalyzer()
    said = analyzer.analyze_pattern_quality(plain, query=q, key=k, value=v, causal=True)
    assert analyzer.analyze_pattern_quality(p, query=q, key=k, value=v) == said
    weights = torch.softmax(torch.randn(1, 1, 256, 256).masked_fill(torch.ones(256, 256).triu(1) > 0, -1e9), -1)
    said = analyzer.analyze_pattern_quality(plain, weights, causal=True)
    assert analyzer.analyze_pattern_quality(p, weights) == said
    assert tessera.estimate_memory_savings(256, "local_window", causal=True)["density"] > 0
