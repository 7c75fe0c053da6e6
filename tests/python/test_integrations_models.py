"""What a registered attention promises to all models: who may not take it is told at construction, what a call says is
used or refused, and layers have the patterns that they were given. A sample of model types against sdpa."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tessera
from tessera import patterns

import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
import tessera.integrations.transformers as tessera_hf  # noqa: E402

torch.manual_seed(0)
NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)

# Of every kind: decoders, encoders, both, images, speech, masks of their own, own tables, sliding windows, experts.
SAMPLE = """
afmoe albert arcee bart beit bert bloom canary clip cohere2 convbert data2vec-vision deberta deepseek_vl_hybrid deit
distilbert doge electra falcon gemma2 gemma3_text gemma4_audio git gpt2 gpt_neox gpt_oss granite llama mbart mistral
modernbert olmo2 opt phi3 qwen2 qwen3_vl roberta sam t5 vit whisper
""".split()


@pytest.mark.skipif(not NEWEST, reason="the figures are of the newest transformers that is tested")
def test_a_sample_of_model_types():
    sweep = Path(__file__).with_name("transformers_sweep.py")
    done = subprocess.run([sys.executable, sweep, *SAMPLE], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(SAMPLE) + 1, done.stdout[-4000:] + done.stderr[-2000:]
    count = dict(reversed(part.split(" ", 1)) for part in lines[-1].split(", "))
    assert "wrong" not in count and "refused when called" not in count, done.stdout
    assert int(count["equal"]) >= EQUAL and int(count["refused"]) >= REFUSED, done.stdout
    print(lines[-1])


EQUAL, REFUSED = 30, 8


def llama(name, layers=3, **more):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        attn_implementation=name, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.randint(97, (1, 80))


@pytest.fixture
def name():
    """One that is free, and free again afterwards."""
    yield "tessera-test"
    if "tessera-test" in tessera_hf._names:
        tessera_hf.unregister("tessera-test")


@pytest.mark.parametrize("taken", ["sdpa", "eager", "flash_attention_2", "flex_attention", "paged|sdpa", "me/kernel"])
def test_names_of_others_are_refused(taken):
    before = dict(transformers.AttentionInterface._global_mapping)
    with pytest.raises(ValueError, match=f"name: got '{re.escape(taken)}'"):
        tessera_hf.register(taken)
    assert before == transformers.AttentionInterface._global_mapping


def test_unregister(name):
    with pytest.raises(ValueError, match="name: got 'tessera-test'"):
        tessera_hf.unregister(name)
    tessera_hf.register(name)
    model = llama(name)
    model(TOKENS)
    tessera_hf.unregister(name)
    with pytest.raises((ValueError, KeyError)):
        llama(name)
    with pytest.raises((ValueError, KeyError)):
        model(TOKENS)


def attend(name, module=None, *tensors, **kwargs):
    function = transformers.AttentionInterface._global_mapping[name]
    return function(module if module is not None else torch.nn.Module(), *tensors, **kwargs)[0]


def test_arguments_of_a_call(name):
    tessera_hf.register(name)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(attend(name, None, q, k, v), want, **close)
    torch.testing.assert_close(attend(name, None, q, k, v, attention_mask=None, position_ids=TOKENS), want, **close)
    mask = torch.ones(20, 20).tril().bool()
    for shaped in (mask, mask[None], mask[None, None]):
        torch.testing.assert_close(attend(name, None, q, k, v, attention_mask=shaped), want, **close)
    twisted = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    torch.testing.assert_close(attend(name, None, *twisted), want, **close)
    one = torch.zeros(1, 1, 1, 1)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attend(name, None, q, k, v, one), full, **close)
    for given in ({"block_indices": torch.zeros(1)}, {"indices": torch.zeros(1)}, {"head_mask": torch.ones(2)},
                  {"a_new_one": 3}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(given))}: got .* from Module; allowed: None"):
            attend(name, None, q, k, v, None, **given)
        attend(name, None, q, k, v, None, **dict.fromkeys(given))


@pytest.mark.parametrize("padding", [False, True])
def test_models_that_compute_with_masks_meet_a_tensor(padding):
    mask = torch.ones(2, 30, dtype=torch.long)
    if padding:
        mask[1, :7] = 0
    plan = tessera_hf.make_mask(2, 30, 30, attention_mask=mask, dtype=torch.bfloat16)
    least = torch.finfo(torch.bfloat16).min
    want = torch.zeros(2, 1, 30, 30, dtype=torch.bfloat16)
    want.masked_fill_(~(torch.ones(30, 30).tril().bool() & mask[:, None, None].bool()), least)
    assert plan.shape == want.shape and plan.dtype == want.dtype
    for made in (plan + 0, 0 + plan, plan[:], torch.cat([plan, plan])[:2], plan.clone(), torch.maximum(want, plan)):
        assert type(made) is torch.Tensor and torch.equal(made, want)
    assert torch.equal(plan.repeat(1, 3, 1, 1), want.repeat(1, 3, 1, 1)) and torch.equal(
        plan[:, :, :, :5], want[..., :5]
    )
    assert torch.equal(plan == 0, want == 0) and torch.equal(~(plan != 0), want == 0)
    with pytest.raises(AttributeError):
        _ = plan.no_such_thing


def test_a_window_as_a_tensor():
    from transformers import masking_utils as m

    function = m.and_masks(m.sliding_window_overlay(5), m.causal_mask_function)
    for mask in (function, lambda b, h, q, k: function(b, h, q, k)):  # known, and asked pair by pair
        plan = tessera_hf.make_mask(1, 12, 20, q_offset=8, mask_function=mask)
        q, k = torch.arange(8, 20)[:, None], torch.arange(20)
        assert torch.equal(plan.tensor()[0, 0] == 0, (k <= q) & (k > q - 5))


def test_patterns_by_layer(name):
    asked = []

    def by_layer(seqlen, causal, layer_idx):
        asked.append(layer_idx)
        return patterns.local_window(seqlen, window=16 * (layer_idx + 1), block=16, causal=causal)

    tessera_hf.register(name, by_layer, block=16)
    got = llama(name)(TOKENS).logits
    assert sorted(set(asked)) == [0, 1, 2]
    configs = {
        i: tessera.PatternConfig("local_window", local_window_size=16 * (i + 1), block_size=16) for i in range(3)
    }
    tessera_hf.register(name, layers=configs)
    model = llama(name)
    torch.testing.assert_close(model(TOKENS).logits, got, atol=0, rtol=0)
    tessera_hf.register(name, "local_window", window=16, block=16, layers={2: "dense"})
    model = llama(name)
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("tessera").addHandler(handler)
    try:
        mixed = model(TOKENS).logits
        assert not said
        model(TOKENS), model(TOKENS)
    finally:
        logging.getLogger("tessera").removeHandler(handler)
    assert said == ["tessera-test in llama: sparse: layers 0, 1; dense, as registered: layer 2"]
    tessera_hf.register(name, "local_window", window=16, block=16, dense_layers=[2])
    torch.testing.assert_close(llama(name)(TOKENS).logits, mixed, atol=0, rtol=0)


@pytest.mark.parametrize(
    "error, words, given",
    [
        (TypeError, "layers: got list", {"layers": ["dense"]}),
        (TypeError, "layers: got str", {"layers": {"a": "dense"}}),
        (ValueError, r"layers\[1\]: pattern: got 'densse'", {"layers": {1: "densse"}}),
        (TypeError, r"layers\[1\]: pattern: got int", {"layers": {1: 4}}),
    ],
)
def test_wrong_layers(error, words, given):
    with pytest.raises(error, match=words):
        tessera_hf.register("tessera-test", **given)
    assert "tessera-test" not in tessera_hf._names
