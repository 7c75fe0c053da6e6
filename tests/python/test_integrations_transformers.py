"""Hugging Face transformers with attn_implementation="tessera": the same as "sdpa" with a dense pattern, the pattern's
own mask with a sparse one; random weights, no downloads."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import torch

transformers = pytest.importorskip("transformers")

import tessera  # noqa: E402
from tessera import BlockPattern, patterns  # noqa: E402
from tessera.integrations import transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
WINDOW = 24
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _sizes(**more):
    return {**SIZES, **more}


def _config(kind):
    if kind == "llama":
        return transformers.LlamaConfig(**SIZES)
    if kind == "qwen2":
        return transformers.Qwen2Config(**SIZES)
    if kind == "mistral":  # a window in every layer
        return transformers.MistralConfig(**_sizes(sliding_window=WINDOW))
    if kind == "gemma2":  # layers with and without a window, softcap
        return transformers.Gemma2Config(
            **_sizes(sliding_window=WINDOW, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0)
        )
    if kind == "gpt_oss":  # sinks, windows
        return transformers.GptOssConfig(
            **_sizes(sliding_window=WINDOW, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
        )
    assert kind == "gpt2"
    return transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=512, pad_token_id=0,
                                   bos_token_id=1, eos_token_id=None)  # fmt: skip


CAUSAL = ["llama", "qwen2", "mistral", "gemma2", "gpt_oss", "gpt2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small take several times as long on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def registered():
    integration.register()


def _model(kind, implementation="tessera"):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(_config(kind), attn_implementation=implementation).eval()
    with torch.no_grad():  # logits that differ clearly, so that generation cannot agree by chance or by ties
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
        for name, p in model.named_parameters():
            if "sinks" in name:
                p.normal_()
    return model


def _reference(kind):
    return _model(kind, "eager" if kind in ("gemma2", "gpt_oss") else "sdpa")  # sdpa has no softcap and no sinks


def _ids(batch=2, length=70):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(2))


def _padding(side, batch=2, length=70):
    mask = torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        mask[0, :9] = 0
    if side == "right":
        mask[0, -9:] = 0
    if side == "both":
        mask[0, :9] = mask[1, -20:] = 0
    return mask


def _close(got, want, kept=None):
    if kept is not None:
        got, want = got[kept.bool()], want[kept.bool()]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("side", [None, "left", "right", "both"])
@torch.no_grad()
def test_dense_prefill_equals(kind, side):
    mask = _padding(side)
    got = _model(kind)(_ids(), attention_mask=mask).logits
    _close(got, _reference(kind)(_ids(), attention_mask=mask).logits, mask)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("side", [None, "left"])
def test_generation_equals(kind, side):
    # 70 + 6 tokens: beyond the window, so that sliding caches have dropped keys.
    call = {"attention_mask": _padding(side), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(_model(kind).generate(_ids(), **call), _reference(kind).generate(_ids(), **call))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_generation_with_a_static_cache_equals(kind):
    # Keys past the queries exist in a static cache, and hold anything.
    call = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(_model(kind).generate(_ids(), **call), _reference(kind).generate(_ids(), **call))


def test_beams_equal():
    call = {"attention_mask": _padding("left"), "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(_model("llama").generate(_ids(), **call), _reference("llama").generate(_ids(), **call))


@torch.no_grad()
def test_chunked_prefill_equals_one_pass():
    model, ids = _model("llama"), _ids()
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 30), (30, 31), (31, 70))]
    _close(torch.cat(parts, 1), _reference("llama")(ids).logits)


def test_gradients_equal():
    grads = []
    for model in (_model("llama"), _reference("llama")):
        model.train()
        model(_ids(), attention_mask=_padding("right"), labels=_ids()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-3)


@torch.no_grad()
def test_bidirectional_encoder_equals():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    outs = []
    for implementation in ("tessera", "sdpa"):
        torch.manual_seed(5)
        model = transformers.BertModel._from_config(config, attn_implementation=implementation).eval()
        outs.append(model(_ids(), attention_mask=_padding("both")).last_hidden_state)
    _close(*outs, _padding("both"))


@torch.no_grad()
def test_encoder_and_decoder_equal():
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
    )  # fmt: skip
    outs = []
    for implementation in ("tessera", "sdpa"):
        torch.manual_seed(5)
        model = transformers.BartModel._from_config(config, attn_implementation=implementation).eval()
        call = {"attention_mask": _padding("right"), "decoder_input_ids": _ids(2, 40)}
        outs.append(model(_ids(), **call).last_hidden_state)
    _close(*outs)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    # position_ids that begin anew: a mask that is no formula, kept as bitmaps. 200 tokens: two rows of blocks.
    ids = _ids(1, 200)
    position_ids = torch.cat([torch.arange(150), torch.arange(50)])[None]
    got = _model("llama")(ids, position_ids=position_ids, use_cache=False).logits
    alone = torch.cat([_reference("llama")(part).logits for part in (ids[:, :150], ids[:, 150:])], 1)
    _close(got, alone)


@torch.no_grad()
@pytest.mark.parametrize("block", [16, (32, 96)])
def test_packed_sequences_under_a_sparse_pattern(block):
    # Blocks smaller than those of a mask alone, and ones whose keys are no whole words of bits; two batches.
    integration.register("tessera-sparse", "dilated_sparse", density=0.4, block=block)
    ids = _ids(2, 200)
    position_ids = torch.cat([torch.arange(150), torch.arange(50)])[None].expand(2, -1)
    got = _model("llama", "tessera-sparse")(ids, position_ids=position_ids, use_cache=False).logits
    mask = _sparse_mask(
        patterns.dilated_sparse(200, block=block, density=0.4, causal=True, budget="proportional")
    ).expand(2, 1, -1, -1)
    sequence = torch.arange(200) >= 150
    mask = mask & (sequence[:, None] == sequence)
    want = _reference("llama")(ids, attention_mask=mask, position_ids=position_ids).logits
    _close(got, want)
    alone = _model("llama")(ids, position_ids=position_ids, use_cache=False).logits
    assert (got - alone).abs().max() > 0.1  # it is not dense


def test_a_mask_function_that_looks_up():
    # One number at a time picks from a tensor, as or_mask_function of transformers may; queries 40..74 of 75 keys.
    group = torch.arange(75) // 10
    plan = integration.make_mask(2, 35, 75, 40, mask_function=lambda b, h, q, k: (group[q] == group[k]) | (k == b))
    want = (group[40:, None] == group) | (torch.arange(75) == torch.arange(2)[:, None, None])
    for block in ((16, 16), (32, 64)):
        assert torch.equal(plan.pairs(block).to_token_mask()[:, 0], want)


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_callers(additive):
    allowed = torch.ones(70, 70).tril().bool() & (torch.arange(70) % 3 != 1)
    allowed |= torch.eye(70).bool()
    mask = allowed[None, None].expand(2, 1, -1, -1)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = _model("llama")(_ids(), attention_mask=mask).logits
    _close(got, _reference("llama")(_ids(), attention_mask=mask).logits)


# ---- sparse patterns


def _sparse_mask(pattern):
    tokens = pattern.to_token_mask()[:, 0]
    return (tokens & torch.ones(tokens.shape[-2:]).tril().bool())[:, None]


@torch.no_grad()
def test_sparse_pattern_equals_its_mask():
    integration.register("tessera-sparse", "dilated_sparse", density=0.4, block=16)
    ids = _ids(1, 200)
    mask = _sparse_mask(patterns.dilated_sparse(200, block=16, density=0.4, causal=True, budget="proportional"))
    want = _reference("llama")(ids, attention_mask=mask).logits
    _close(_model("llama", "tessera-sparse")(ids).logits, want)
    assert (want - _reference("llama")(ids).logits).abs().max() > 0.1  # it is not dense


def _banded(seqlen, causal):
    """Bitmaps that differ from row to row of tokens: alignment errors show."""
    q, k = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    return BlockPattern.from_token_mask(((q - k) % 7 < 3) | (k < 5), block=16)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("dilated_sparse", {"density": 0.4}),
        ("dilated_sparse", {"density": 0.4, "seqlen_total": 100}),
        ("random", {"density": 0.4}),
        ("local_window", {"density": 0.3, "seqlen_total": 128}),
        ("global_local", {"density": 0.4, "global_tokens": 16}),
        ("strided", {"stride": 3}),
        ("bigbird", {"density": 0.6, "global_tokens": 16}),
        (_banded, {}),
    ],
    ids=str,
)
def test_sparse_tokens_see_the_same_in_prefill_chunks_and_decoding(pattern, options):
    integration.register("tessera-sparse", pattern, block=16, **options)
    model, ids = _model("llama", "tessera-sparse"), _ids(2, 100)
    want = model(ids).logits
    cache = transformers.DynamicCache(config=model.config)
    cuts = [0, 16, 37, 40, 90, 91, 95, 96, 97, 100]
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(cuts, cuts[1:])]
    _close(torch.cat(parts, 1), want)
    assert (want - _model("llama")(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_dense_layers_and_windows_stay():
    integration.register("tessera-sparse", "dilated_sparse", density=0.3, block=16, dense_layers=[0, 1])
    _close(_model("llama", "tessera-sparse")(_ids()).logits, _reference("llama")(_ids()).logits)
    integration.register("tessera-sparse", "dilated_sparse", density=0.3, block=16)
    _close(_model("mistral", "tessera-sparse")(_ids()).logits, _reference("mistral")(_ids()).logits)


def test_sparse_generation_with_left_padding_runs():
    integration.register("tessera-sparse", "local_window", window=32, block=16)
    out = _model("llama", "tessera-sparse").generate(
        _ids(), attention_mask=_padding("left"), max_new_tokens=5, do_sample=False
    )
    assert out.shape == (2, 75)


@torch.no_grad()
def test_swapping_attention_in_an_existing_model():
    model = _reference("llama")
    want = model(_ids()).logits
    model.set_attn_implementation("tessera")
    _close(model(_ids()).logits, want)
    integration.register("tessera-sparse", "dilated_sparse", density=0.3, block=16)
    model.set_attn_implementation("tessera-sparse")
    assert (model(_ids()).logits - want).abs().max() > 0.1
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(_ids()).logits, want)


def _unreached(kind):
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2}
    if kind == "bloom":
        return transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
    if kind == "openai-gpt":  # neither makes masks through transformers nor looks attention up: would stay dense
        return transformers.OpenAIGPTConfig(**sizes)
    if kind == "xlnet":
        return transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=2, d_inner=32)
    assert kind == "gptj"  # until 5.23
    return transformers.GPTJConfig(**sizes, rotary_dim=8)


UNREACHED = ["bloom", "openai-gpt", "xlnet", *([] if VERSION >= (5, 24) else ["gptj"])]


@pytest.mark.parametrize("kind", UNREACHED)
def test_models_that_would_not_call_it_are_refused(kind):
    integration.register("tessera-sparse", "local_window", window=8, block=16)
    integration.register()  # once more changes nothing
    for name in ("tessera", "tessera-sparse"):
        with pytest.raises(ValueError, match=f"^attn_implementation: got '{name}' for .*; allowed: "):
            transformers.AutoModel.from_config(_unreached(kind), attn_implementation=name)
    transformers.AutoModel.from_config(_unreached(kind), attn_implementation="eager")


@pytest.mark.skipif(VERSION < (5, 24), reason="GPT-J looks attention up since 5.24")
@torch.no_grad()
def test_gptj_equals():
    config = transformers.GPTJConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    outs = []
    for implementation in ("tessera", "eager"):
        torch.manual_seed(5)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        outs.append(model(_ids(), attention_mask=_padding("right")).last_hidden_state)
    _close(*outs, _padding("right"))


@pytest.mark.skipif(VERSION == (5, 0), reason="transformers 5.0 reads the file of every model itself")
def test_attention_of_code_that_cannot_be_read_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "nowhere", types.ModuleType("nowhere"))
    names = {"LlamaModel": transformers.LlamaModel}
    exec("class Mine(LlamaModel): pass", names)
    names["Mine"].__module__ = "nowhere"
    model = names["Mine"]._from_config(_config("llama"), attn_implementation="tessera")
    assert model.config._attn_implementation == "tessera"


def test_cross_attention_takes_no_sparse_pattern():
    integration.register("tessera-sparse", "dilated_sparse", density=0.3, block=16)
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = transformers.BartModel._from_config(config, attn_implementation="tessera-sparse")
    with pytest.raises(ValueError, match="pattern: got queries 0..40 on keys 0..70"):
        model(_ids(), decoder_input_ids=_ids(2, 40))


@torch.no_grad()
def test_swapping_multihead_attention():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x = torch.randn(2, 40, 64)
    want = model(x)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.MultiheadAttention:
                setattr(module, name, tessera.MultiheadAttention.from_torch(child, pattern=None))
    assert sum(type(m) is tessera.MultiheadAttention for m in model.modules()) == 2
    _close(model(x), want)


def test_two_lines():
    code = "import sys, tessera; assert 'transformers' not in sys.modules; tessera.integrations.transformers.register()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_mask_of_tokens_is_made():
    plan = integration.make_mask(1, 1 << 20, 1 << 20, attention_mask=torch.ones(1, 1 << 20, dtype=torch.bool))
    assert plan.causal and plan.key_bias is None and plan.mask_function is None


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: integration.register(pattern="nonsense"), ValueError, "^pattern: got 'nonsense'"),
        (lambda: integration.register(pattern="dilated_sparse"), ValueError, "density"),
        (lambda: integration.register(pattern="dilated_sparse", density=2.0), ValueError, "density"),
        (lambda: integration.register(pattern="dense", density=0.5), ValueError, "density"),
        (lambda: integration.register(pattern=patterns.dense(64)), TypeError, "pattern: got BlockPattern"),
        (lambda: integration.register(block=100), ValueError, "block"),
        (lambda: integration.register(pattern=_banded, density=0.5), TypeError, "density"),
        (lambda: integration.register(dense_layers=["a"]), TypeError, "dense_layers"),
        (lambda: integration.register(dense_layers=1), TypeError, "dense_layers: got int"),
        (lambda: integration.register(5), TypeError, "name: got 5"),
        (lambda: integration.register(None), TypeError, "name: got None"),
        (lambda: integration.register("x", tessera.PatternConfig(), block=64), TypeError, "^block: got it beside"),
        (lambda: integration.register("x", tessera.PatternConfig(), window=64), TypeError, "^window: got it beside"),
        (lambda: integration.register("x", "random", density=0.3, causal=True), TypeError, "^causal: got True"),
        (lambda: integration.register("x", "random", density=0.3, seqlen_k=3), TypeError, "^seqlen_k: got 3"),
        (lambda: _model("llama")(_ids(), output_attentions=True), ValueError, "output_attentions"),
    ],
)
def test_mistakes(call, error, words):
    with pytest.raises((error, ValueError), match=words):
        call()
