"""What type checkers are told: the package passes mypy; a user's program gets real types and hears of its mistakes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_overloads

import pytest
import tessera
from tessera.attention import functional

ROOT = Path(__file__).resolve().parents[2]

# Every line with "E: code", and no other, is an error of that code.
PROGRAM = """
from typing import assert_type

import torch
from torch import Tensor

import tessera

q = torch.randn(1, 64, 2, 16)
p = tessera.patterns.dilated_sparse(64, block=(16, 32), density=0.5, dilation_rates=[1, 2], causal=True)
assert_type(p, tessera.BlockPattern)
assert_type(p.indptr, Tensor)
assert_type(p.bitmaps, Tensor | None)
assert_type(p.seqlen_q, int)
assert_type(p.density, float)
assert_type(p.statistics(causal=True).row_density.mean, float)
assert_type((p | ~p)[1:, :2] - p[1:, :2], tessera.BlockPattern)
assert_type(tessera.BlockPattern.from_mask(torch.ones(4, 4), seqlen_q=64, seqlen_k=64, block=16), tessera.BlockPattern)

assert_type(tessera.block_sparse_attention(q, q, q, p, causal=True, window=(3, None)), Tensor)
assert_type(tessera.block_sparse_attention(q, q, q, p, return_lse=True), tuple[Tensor, Tensor])
assert_type(tessera.decode(q, q, q, p, key_lengths=torch.tensor([64])), Tensor)
assert_type(tessera.decode(q, q, q, p, return_lse=True), tuple[Tensor, Tensor])
assert_type(tessera.dilated_attention(q, q, q, segment_lengths=[64], dilation_rates=[1]), Tensor)
out, lse = tessera.dilated_attention(q, q, q, segment_lengths=[64], dilation_rates=[1], return_lse=True)
ends = torch.tensor([0, 64])
assert_type(tessera.varlen_attention(q[0], q[0], q[0], ends, ends, [p]), Tensor)
assert_type(tessera.merge(out, lse, out, lse)[1], Tensor)
assert_type(tessera.attention_weights(q, q, p).block_size, tuple[int, int])

def either(flag: bool) -> None:
    assert_type(tessera.block_sparse_attention(q, q, q, p, return_lse=flag), Tensor | tuple[Tensor, Tensor])

module = tessera.MultiheadAttention(16, 2, batch_first=True, pattern=p)
plain: torch.nn.MultiheadAttention = module
assert_type(tessera.MultiheadAttention.from_torch(plain, pattern="dense"), tessera.MultiheadAttention)
assert_type(tessera.BlockSparseAttention(lambda rows, cols: p).causal, bool | None)
assert_type(tessera.interop.from_torch(torch.ones(4, 2), seqlen_q=64, seqlen_k=64), tessera.BlockPattern)

tessera.block_sparse_attention(q, q, q, "dense")  # E: call-overload
tessera.block_sparse_attention(q, q, q, p, casual=True)  # E: call-overload
tessera.block_sparse_attention(q, q, q, p, scale="large")  # E: call-overload
tessera.block_sparse_attention(q, q, q, p).sum().backwards()  # E: attr-defined
tessera.block_sparse_attention(q, q, q, p, return_lse=True).shape  # E: attr-defined
tessera.block_sparse_atention  # E: attr-defined
tessera.patterns.random(64)  # E: call-arg
tessera.patterns.random(64, density="much")  # E: arg-type
p.num_block  # E: attr-defined
p.bitmaps.shape  # E: union-attr
tessera.MultiheadAttention(16, 2, patern=p)  # E: call-arg
tessera.MultiheadAttention(16, 2, pattern=16)  # E: arg-type
"""
PROGRAM += "\n".join(f"tessera.{name}" for name in (*tessera.__all__, *tessera.guides.__all__)) + "\n"


def start(config: pytest.Config) -> None:
    """Called by conftest.py before the first test: mypy reads all of torch, half a minute beside the others."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    program = Path(folder.name, "program.py")
    program.write_text(PROGRAM)
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", folder.name, "--no-error-summary"]
    run = subprocess.Popen(
        [sys.executable, "-m", "mypy", *options, ROOT / "python/tessera", program],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    config.add_cleanup(run.kill)
    config.stash[RUN] = run


RUN = pytest.StashKey[subprocess.Popen[str]]()


def test_package_and_program(pytestconfig):
    printed = pytestconfig.stash[RUN].communicate()[0].splitlines()
    found, others = set(), []
    for line in printed:
        error = re.match(r".*program\.py:(\d+): error: .*\[([a-z-]+)\]$", line)
        if error:
            found.add((int(error[1]), error[2]))
        elif "program.py" not in line or "error" in line:
            others.append(line)
    lines = enumerate(PROGRAM.splitlines(), 1)
    expected = {(i, line.split("# E: ")[1]) for i, line in lines if "# E: " in line}
    assert not others and found == expected, "\n".join(printed)


@pytest.mark.parametrize("name", ["block_sparse_attention", "decode", "varlen_attention", "dilated_attention"])
def test_overloads_have_the_options_of_the_function(name):
    function = getattr(functional, name)
    parameters = inspect.signature(function).parameters
    assert len(get_overloads(function)) == 3
    for overload in get_overloads(function):
        spelt: dict[str, Any] = {n: p.annotation for n, p in inspect.signature(overload).parameters.items()}
        options = getattr(functional, re.fullmatch(r"Unpack\[(\w+)\]", spelt.pop("options"))[1])
        spelt |= options.__annotations__
        spelt = {n: getattr(a, "__forward_arg__", a) for n, a in spelt.items()}
        assert spelt.pop("return_lse").removesuffix(" = False") in ("Literal[False]", "Literal[True]", "bool")
        assert spelt == {n: p.annotation for n, p in parameters.items() if n != "return_lse"}


def test_names_are_those_meant_for_people():
    """The guides' names are there, but neither listed nor starred."""
    assert dir(tessera) == sorted(tessera.__all__) and len(set(tessera.__all__)) == len(tessera.__all__)
    assert {*tessera.__all__} & {*tessera.guides.__all__} == {"PatternConfig"}
    for name in tessera.__all__:
        assert getattr(tessera, name) is not None
    assert not hasattr(tessera, "BlockSparseRing")
    assert Path(tessera.__file__).with_name("py.typed").exists()


def test_version_is_that_of_the_project():
    assert (
        tessera.__version__ == re.search(r"project\(tessera VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    )
