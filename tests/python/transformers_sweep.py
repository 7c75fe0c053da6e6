"""Every model type of the installed transformers with a tiny configuration: with Tessera it computes what it computes
with sdpa (or eager, where it has no sdpa), or its construction is refused by name.

    python tests/python/transformers_sweep.py [TYPE ...]     # default: all; prints a line for each, then the count

Forward without padding, with padding on the left and on the right, gradients, and a few generated tokens where there is
generation. "not comparable": the tiny configuration cannot be made or run, or is not the same twice with sdpa.
"""

from __future__ import annotations

import collections
import inspect
import logging
import multiprocessing
import sys
import warnings

import torch

# Field names of sizes and what they become, for all configurations and those inside of them.
_SIZES = {
    64: "hidden_size d_model embed_dim n_embd dim decoder_hidden_size encoder_hidden_size projection_dim "
    "text_embed_dim embedding_size hidden_dim out_hidden_size output_hidden_size audio_hidden_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "encoder_num_attention_heads decoder_num_attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads attention_heads",
    2: "num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "encoder_num_hidden_layers decoder_num_hidden_layers num_encoder_layers num_decoder_layers depth "
    "num_hidden_groups encoder_n_layers num_experts_per_tok n_group topk_group moe_topk",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner moe_intermediate_size "
    "shared_expert_intermediate_size encoder_intermediate_size mlp_dim ff_dim dim_feedforward",
    99: "vocab_size decoder_vocab_size",
    16: "head_dim d_kv attention_head_dim qk_nope_head_dim v_head_dim kv_channels d_head",
    8: "patch_size qk_rope_head_dim index_n_heads index_head_dim num_experts num_local_experts n_routed_experts",
    32: "image_size img_size q_lora_rank kv_lora_rank",
    128: "max_position_embeddings n_positions",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
# What a configuration may shrink by, tried in this order until the model runs with sdpa.
_DEPTH = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers vocab_size depth num_experts".split()
)
_WAYS = [_SIZE_OF, {n: x for n, x in _SIZE_OF.items() if x not in (8, 16, 32)}, {n: _SIZE_OF[n] for n in _DEPTH}]
_LONG = 33  # tokens
_LIMIT = 60_000_000  # parameters of what is still tiny


def _shrink(config, sizes):
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value, sizes)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and name in sizes and value > sizes[name]:
            setattr(config, name, sizes[name])
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types") and len(value) > 2:
            kinds = list(dict.fromkeys(value))[:2]
            setattr(config, name, (kinds * 2)[:2])
        elif name.endswith("token_id") and isinstance(value, int) and value > 90:
            setattr(config, name, 90 + value % 8)
        elif isinstance(value, dict) and "mrope_section" in value and sizes is _SIZE_OF:
            value["mrope_section"] = [2, 3, 3]
        elif "dropout" in name or "drop_rate" in name or name.endswith("pdrop") or "layerdrop" in name:
            setattr(config, name, 0.0)

    if getattr(config, "qk_rope_head_dim", None) and hasattr(config, "head_dim"):
        config.head_dim = config.qk_rope_head_dim


def _config(kind, way):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    _shrink(config, _WAYS[way])
    return config


def _make(config, attention):
    from transformers.models.auto import modeling_auto

    torch.manual_seed(0)
    mappings = [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING]
    mappings += [m for name, m in vars(modeling_auto).items() if name.startswith("MODEL_FOR_") and hasattr(m, "keys")]
    for mapping in mappings:
        if type(config) in mapping:
            auto = mapping[type(config)]
            model = auto[0] if isinstance(auto, tuple) else auto
            with torch.device("meta"):
                size = sum(p.numel() for p in model._from_config(config).parameters())
            if size > _LIMIT:
                raise RuntimeError(f"{size} parameters")
            torch.manual_seed(0)
            return model._from_config(config, attn_implementation=attention).eval()
    raise RuntimeError("no model of its own")


def _inputs(model, config):
    g = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        inner = getattr(config, "vision_config", config)
        size = getattr(inner, "image_size", 32)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs = {"pixel_values": torch.randn(2, getattr(inner, "num_channels", 3), height, width, generator=g)}
    elif model.main_input_name == "input_ids":
        inputs = {"input_ids": torch.randint(3, 80, (2, _LONG), generator=g)}
        takes = inspect.signature(model.forward).parameters
        if "pixel_values" in takes and not hasattr(config, "image_token_id") and hasattr(config, "vision_config"):
            size = config.vision_config.image_size
            inputs["pixel_values"] = torch.randn(2, 3, size, size, generator=g)
    elif model.main_input_name in ("input_features", "input_values"):
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", None)
        shape = (2, 1600) if model.main_input_name == "input_values" else (2, bins or 80, 2 * 64)
        inputs = {model.main_input_name: torch.randn(shape, generator=g)}
    else:
        raise RuntimeError(f"takes {model.main_input_name}")
    if config.is_encoder_decoder and "input_ids" not in inputs or config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 80, (2, 17), generator=g)
    return inputs


def _first(output):
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            return getattr(output, name)
    for value in output.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise RuntimeError("no tensor comes out")


def _results(model, inputs):
    """Name and tensor of everything that is compared."""
    found = {}
    out = _first(model(**inputs))
    found["forward"] = out.detach()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * weights).sum(), list(parameters.values()), allow_unused=True)
    found["gradients"] = torch.cat([g.flatten() for g in gradients if g is not None])
    if "input_ids" not in inputs:
        return found
    with torch.no_grad():
        for side, kept in (("left", slice(9, None)), ("right", slice(0, _LONG - 9))):
            mask = torch.zeros(2, _LONG, dtype=torch.long)
            mask[0], mask[1, kept] = 1, 1
            out = _first(model(**inputs, attention_mask=mask))
            if out.dim() == 3 and out.shape[1] == _LONG:
                out = out[mask.bool()]
            found[f"{side} padding"] = out
        if type(model).can_generate() and getattr(model, "generation_config", None) is not None:
            out = model.generate(
                input_ids=inputs["input_ids"], attention_mask=torch.ones(2, _LONG).long(),
                max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
            found["generation"] = torch.stack(out.logits)
    return found


def _reference(kind, way):
    """A model with transformers' own attention, its name, inputs and results."""
    try:
        config, attention = _config(kind, way), "sdpa"
        model = _make(config, attention)
    except ValueError:
        config, attention = _config(kind, way), "eager"
        model = _make(config, attention)
    inputs = _inputs(model, config)
    want, again = _results(model, inputs), _results(model, inputs)
    for name, x in want.items():
        if not x.isfinite().all() or not torch.allclose(x, again[name], atol=1e-6, rtol=1e-5):
            raise RuntimeError(f"{name} with {attention}: not finite, or not the same twice")
    return model, attention, inputs, want


def compare(kind):
    """(verdict, what is said): equal, refused, wrong or not comparable."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import tessera.integrations.transformers as tessera_hf

    tessera_hf.register()
    said = []
    for way in range(len(_WAYS)):
        try:
            want_model, attention, inputs, want = _reference(kind, way)
            break
        except Exception as e:
            said.append(f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
    else:
        return "not comparable", " | ".join(dict.fromkeys(said))
    try:
        model = _make(_config(kind, way), "tessera")
    except ValueError as e:
        if "tessera" in str(e):
            return "refused", str(e)
        return "wrong", f"construction: {e}"
    except Exception as e:
        return "wrong", f"construction: {type(e).__name__}: {e}"
    model.load_state_dict(want_model.state_dict())
    try:
        got = _results(model, inputs)
    except Exception as e:
        said = (str(e).splitlines() or [""])[0]
        return ("refused when called" if isinstance(e, ValueError) and "allowed:" in said else "wrong"), (
            f"{type(e).__name__}: {said}"
        )
    said = _difference(got, want)
    if said and attention == "sdpa":  # some models leave causality out with sdpa
        eager = _make(_config(kind, way), "eager")
        eager.load_state_dict(want_model.state_dict())
        if not _difference(got, _results(eager, inputs)):
            return "equal", "to eager; sdpa differs from it"
    return ("wrong", f"{said} from {attention}") if said else ("equal", ", ".join(want))


def _difference(got, want):
    for name, x in want.items():
        error = (got[name] - x).abs().max() / x.abs().max().clamp(min=1)
        if not error < (1e-2 if name == "gradients" else 1e-3):  # of deep stacks they are sums that cancel
            return f"{name}: {error:.2g}"
    return None


def _child(kind, pipe):
    torch.set_num_threads(1)
    pipe.send(compare(kind))


def compare_apart(kind, seconds=300):
    """The same in a process of its own, so that one that hangs or dies is one line."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, theirs))
    process.start()
    theirs.close()
    try:
        verdict = mine.recv() if mine.poll(seconds) else ("not comparable", f"more than {seconds} s")
    except EOFError:
        verdict = ("wrong", "the process died")
    process.kill()
    process.join()
    return verdict


def main(kinds):
    from concurrent.futures import ThreadPoolExecutor

    import tessera.integrations.transformers  # noqa: F401  (children have it then)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = kinds or sorted(CONFIG_MAPPING_NAMES)
    count = collections.Counter()
    with ThreadPoolExecutor(2) as threads:
        for kind, (verdict, said) in zip(kinds, threads.map(compare_apart, kinds)):
            print(f"{kind:28} {verdict}: {said[:300]}", flush=True)
            count[verdict] += 1
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())))
    return count["wrong"] > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
