"""The examples in docstrings run as they stand, and every public name has one."""

from __future__ import annotations

import doctest
import importlib.util
import inspect

import pytest
import tessera

import torch

MODULES = ["tessera", "tessera.patterns", "tessera.analysis", "tessera.interop", "tessera.interop.deepspeed",
           "tessera.guides"]  # fmt: skip
if importlib.util.find_spec("lightning") is not None:
    MODULES.append("tessera.integrations.lightning")


def _names():
    """(module, name) of all functions and classes for people."""
    for module in map(importlib.import_module, MODULES):
        names = getattr(module, "__all__", None)
        if names is None:
            own = {n for n, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__}
            names = [n for n in own if not n.startswith("_")]
        for name in sorted(names):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                yield module, name


@pytest.mark.parametrize("module, name", [pytest.param(*x, id=f"{x[0].__name__}.{x[1]}") for x in _names()])
def test_has_an_example_that_runs(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "scipy" in name:
        pytest.importorskip("scipy")
    thing = getattr(module, name)
    assert ">>>" in (thing.__doc__ or ""), f"{name}: its docstring has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in doctest.DocTestFinder().find(thing, name, globs={"torch": torch, "tessera": tessera}):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_names_are_found():
    found = {f"{module.__name__}.{name}" for module, name in _names()}
    assert {
        "tessera.decode",
        "tessera.patterns.random",
        "tessera.analysis.Quality",
        "tessera.interop.to_torch",
    } <= found
    assert len(found) >= 55
