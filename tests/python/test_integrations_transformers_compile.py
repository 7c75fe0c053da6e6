"""attn_implementation="tessera" inside torch.compile: what the model around it computes stays what it is, and other
lengths compile nothing anew. The backend changes nothing about that: "eager" is the quick one."""

from __future__ import annotations

import pytest
from bounds import UNIT

import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from tessera.integrations import transformers as integration  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402


@pytest.fixture(autouse=True)
def fresh():
    """Models this small take several times as long on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    integration.register()
    yield
    torch.set_num_threads(threads)


def _model(kind, implementation):
    torch.manual_seed(5)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "pad_token_id": 0,
             "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes)
    else:
        config = transformers.MistralConfig(**sizes, sliding_window=24)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


def _batch(length, side):
    ids = torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :9] = 0
    if side == "right":
        mask[0, -9:] = 0
    return ids, None if side is None else mask


def _graphs():
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_prefill():
    compiled, reference = torch.compile(_model("mistral", "tessera"), backend="eager"), _model("mistral", "sdpa")
    for side in (None, "left", "right"):
        for length in (70, 75, 90, 140):
            ids, mask = _batch(length, side)
            before = _graphs()
            got = compiled(ids, attention_mask=mask, use_cache=False).logits
            want = reference(ids, attention_mask=mask).logits
            kept = torch.ones_like(ids).bool() if mask is None else mask.bool()
            torch.testing.assert_close(got[kept], want[kept], atol=2e-4, rtol=2e-4)
            assert _graphs() == before or length in (70, 75)  # 75: lengths are made dynamic, once


def test_generation_with_a_static_cache():
    model, reference = _model("llama", "tessera"), _model("llama", "sdpa")
    model.forward = torch.compile(model.forward, backend="eager")
    for length in (70, 75, 90):
        ids, mask = _batch(length, "left")
        call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "disable_compile": True,
                "cache_implementation": "static"}  # fmt: skip
        before = _graphs()
        got = model.generate(ids, **call)
        assert torch.equal(got, reference.generate(ids, **call))
        assert _graphs() == before or length != 90


@torch.no_grad()
def test_packed_sequences_and_sparse_patterns():
    integration.register("tessera-sparse", "dilated_sparse", density=0.4, block=16)
    ids, _ = _batch(200, None)
    packed = torch.cat([torch.arange(150), torch.arange(50)])[None].expand(2, -1)
    plain = torch.arange(200)[None].expand(2, -1)
    for implementation, position_ids in (("tessera", packed), ("tessera-sparse", plain), ("tessera-sparse", packed)):
        model = _model("llama", implementation)
        want = model(ids, position_ids=position_ids, use_cache=False).logits
        got = torch.compile(model, backend="eager")(ids, position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        dense = _model("llama", "sdpa")(ids).logits
        assert (want - dense).abs().max() > 0.1  # neither is dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_gradient_checkpointing(dtype):
    grads = []
    for implementation, precision in (("tessera", dtype), ("sdpa", dtype), ("sdpa", torch.float64)):
        model = _model("llama", implementation).to(precision).train()
        model.gradient_checkpointing_enable()
        step = torch.compile(model, backend="eager") if implementation == "tessera" else model
        ids, mask = _batch(70, "right")
        step(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    ours, theirs, exact = grads
    # FlashAttention's rule; and in fp32, where the other's error may happen to be small, a unit for every number that
    # the longest chain of sums adds: of the hidden sizes, a head, the keys and the vocabulary.
    allowed = 2 * (theirs - exact).norm()
    if dtype == torch.float32:
        allowed += UNIT * (64 + 16 + 70 + 96 + 97) * exact.norm()
    assert (ours - exact).norm() <= allowed
