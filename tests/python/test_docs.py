"""Blocks of Python in README and docs run as they stand, from top to bottom; names that the docs mention exist."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tessera

import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))])


def _blocks(page):
    """(heading, code) of each block."""
    text = (ROOT / page).read_text()
    found = []
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        heading = re.findall(r"^#+ (.*)$", text[: block.start()], re.MULTILINE)[-1]
        found.append((heading, block[1]))
    return found


def _run(page, heading, names):
    blocks = [code for h, code in _blocks(page) if h.startswith(heading)]
    assert blocks, f"{page} has no block under {heading!r}"
    for code in blocks:
        exec(compile(code, f"{page}: {heading}", "exec"), names)
    return names


def test_every_block_is_run_here():
    tested = {"README.md": ["Tessera"], "docs/python.md": ["From Python"], "docs/decoding.md": [
        "A cache", "Patterns", "Beams"], "docs/frameworks.md": [
        "Hugging Face", "Models made of", "Lightning", "FlexAttention", "torch.sparse", "DeepSpeed"]}  # fmt: skip
    for page in PAGES:
        for heading, _ in _blocks(page):
            assert any(heading.startswith(h) for h in tested.get(page, [])), f"{page}: {heading}"


@pytest.mark.parametrize("page, heading", [("README.md", "Tessera"), ("docs/python.md", "From Python")])
def test_first_page(page, heading):
    names = _run(page, heading, {})
    assert names["out"].shape == (1, 8192, 8, 64) and names["q"].grad.isfinite().all()
    if page != "README.md":
        names["attention"](*[torch.randn(1, 512, 512)] * 3)


def test_readme_in_cpp(tmp_path):
    block = re.search(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    include, body = block.split("\n\n", 1)
    view = "make_view(x.data(), tessera::DType::f32, {1, 8192, 1, 8})"
    source = tmp_path / "readme.cc"
    source.write_text(f"""{include}
#include <vector>
int main() {{
  std::vector<float> x(8192 * 8), l(8192);
  const auto q = tessera::{view}, k = q, v = q, out = q;
  const auto lse = tessera::make_view(l.data(), tessera::DType::f32, {{1, 1, 8192}});
  {body}
}}
""")
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'include'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_index_of_names():
    """docs/api.md lists what there is; what it says of a name may lag behind."""
    program = ROOT / "build/release/cli/tessera"
    if not program.exists():
        pytest.skip("the program is not built here")
    script = [sys.executable, ROOT / "tools/api_index.py", program]
    now = subprocess.run(script, check=True, capture_output=True, text=True).stdout

    def names(text):
        rows = re.findall(r"^(?:\| `([^`]+)` \|.*?((?: `\w+`,?)*) \||#+ (.*))$", text, re.MULTILINE)
        return sorted((a, c, *re.findall(r"\w+", b)) for a, b, c in rows)

    assert names((ROOT / "docs/api.md").read_text()) == names(now), "tools/api_index.py writes it anew"


def test_decoding():
    names = {}
    for heading in ("A cache", "Patterns", "Beams"):
        _run("docs/decoding.md", heading, names)
    assert names["cache"].lengths.tolist() == [299, 301, 118]


@pytest.mark.parametrize("script", sorted((ROOT / "examples/python").glob("*.py")), ids=lambda path: path.stem)
def test_examples(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2)  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    names = _run("docs/frameworks.md", "Hugging Face", {"name": str(tmp_path)})
    assert names["model"].config._attn_implementation == "sdpa"  # and back
    names["model"].set_attn_implementation("tessera-10")
    assert names["model"](torch.arange(2, 97)[None]).logits.isfinite().all()


def test_models_of_multihead_attention():
    layer = torch.nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x = torch.randn(1, 50, 32)
    want = model(x)
    _run("docs/frameworks.md", "Models made of", {"model": model})
    assert type(model.layers[1].self_attn) is tessera.MultiheadAttention
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


def test_lightning():
    pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run("docs/frameworks.md", "Lightning", {})


def test_flex_attention():
    names = _run("docs/frameworks.md", "FlexAttention", {})
    torch.testing.assert_close(names["out"], names["same"], atol=1e-5, rtol=1e-5)


def test_sparse_matrices():
    pytest.importorskip("scipy")
    assert _run("docs/frameworks.md", "torch.sparse", {})["per_head"].heads == 2


def test_deepspeed():
    assert _run("docs/frameworks.md", "DeepSpeed", {})["out"].isfinite().all()


def _resolves(path):
    thing = tessera
    for name in path.split(".")[1:]:
        if name == "cc":
            return True
        try:
            thing = getattr(thing, name)
        except AttributeError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_names_that_are_mentioned_exist(page):
    text = re.sub(r"https?://\S+|[\w/]*/[\w./]+", "", (ROOT / page).read_text())
    mentioned = set(re.findall(r"(?<![\w:.])tessera(?:\.[A-Za-z_]\w*)+", text))
    assert [m for m in sorted(mentioned) if not _resolves(m)] == []


def test_guides_names_are_there_or_listed_as_missing():
    there, missing = (ROOT / "docs/guide-names.md").read_text().split("## Not there yet")
    names = set()
    for row in re.findall(r"^\| (`.*?) \|", there, re.MULTILINE):
        names.update(re.findall(r"`([A-Z]\w+|create_\w+|get_block_\w+|pattern_\w+(?=`))", row))
    assert len(names) >= 15 and [n for n in sorted(names) if not hasattr(tessera, n)] == []
    absent = set(re.findall(r"`([A-Z]\w+|create_\w+)`", missing)) - {"ImportError", "AttributeError"}
    assert len(absent) > 10 and [n for n in sorted(absent) if hasattr(tessera, n)] == []
