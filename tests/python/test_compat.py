"""Configuration, pattern store, and the figures that the guides' modules report; usages are in test_guides.py."""

import copy
import pickle
import threading

import pytest
import tessera
import torch
from tessera import _dilated
from tessera.compat import BlockSparseRingDilatedAttention, SparsePatternConfig, SparsePatternGenerator


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
    with pytest.raises(error, match=rf"^{field}: got .*allowed: "):
        SparsePatternConfig(**{field: value})
    config = SparsePatternConfig()
    before = copy.copy(config)
    with pytest.raises(error, match=rf"^{field}: got .*allowed: "):
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
        ({"segment_lengths": [512], "dilation_rates": [1, 2]}, "dilation_rates"),
        ({"segment_lengths": [], "dilation_rates": []}, "segment_lengths"),
        ({"segment_lengths": [512], "dilation_rates": [0]}, "dilation_rates"),
        ({"segment_lengths": [512], "dilation_rates": [1], "block_size": (64, 32)}, "block_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"sparsity_ratio": 0.0}, "sparsity_ratio"),
    ],
)
def test_module_refuses(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        BlockSparseRingDilatedAttention(**arguments)


def test_set_sparsity_ratio_is_honoured_over_a_window_and_leaves_the_shared_config_alone():
    config = SparsePatternConfig("local_window", local_window_size=256, block_size=64)
    one, other = BlockSparseRingDilatedAttention(sparse_config=config), BlockSparseRingDilatedAttention(sparse_config=config)
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


def test_dropout_is_for_training_only():
    attention = BlockSparseRingDilatedAttention(sparsity_ratio=0.5, block_size=16, dropout=0.5)
    q, k, v = qkv(1, 128, 2, 16)
    torch.manual_seed(0)
    first = attention(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v), first) and not torch.equal(attention(q, k, v), first)
    attention.eval()
    assert torch.equal(attention(q, k, v), attention(q, k, v))


# ---- Figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(256, 256), (200, 200), (100, 333), (333, 100), (1, 1)])
def test_token_pairs(seqlen_q, seqlen_k, causal):
    pattern = tessera.patterns.random(seqlen_q, seqlen_k, block=(32, 16), density=0.4, causal=causal)
    mask = pattern.to_token_mask()
    if causal:
        mask = mask & torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    assert _dilated.token_pairs(pattern, causal) == int(mask.sum())


@pytest.mark.parametrize("causal", [False, True])
def test_density_of_segments_counts_their_pairs(causal):
    attention = BlockSparseRingDilatedAttention([64, 150], [1, 3], sparsity_ratio=0.5, block_size=16)
    heads, seqlen = 4, 200
    inner = attention._inner(causal)
    admitted = sum(
        int(_dilated.admitted_keys(row, head, seqlen, [w], [r], causal, inner).sum())
        for w, r in ((64, 1), (150, 3))
        for row in range(seqlen)
        for head in range(heads)
    )
    dense = heads * (seqlen * (seqlen + 1) // 2 if causal else seqlen**2)
    assert attention.density(seqlen, num_heads=heads, causal=causal) == pytest.approx(admitted / dense)
