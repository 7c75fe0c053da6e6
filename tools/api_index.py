#!/usr/bin/env python3
"""Prints docs/api.md: every public name of Python, C++ and the program, on one page, from the code itself.

    build/venv/bin/python tools/api_index.py PROGRAM > docs/api.md

tests/python/test_docs.py compares the page with what this prints.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Modules for people, with what their names are called in a program.
MODULES = [
    "tessera",
    "tessera.patterns",
    "tessera.analysis",
    "tessera.interop.flex",
    "tessera.interop.scipy",
    "tessera.interop.torch_sparse",
    "tessera.interop.deepspeed",
    "tessera.integrations.transformers",
    "tessera.integrations.lightning",
    "tessera.guides",
]


def first_sentence(text: str | None) -> str:
    words = " ".join((text or "").split("\n\n")[0].split())
    found = re.match(r"(.*?[^.][.])(?= [A-Z`(]|$)", words)
    words = (found[1] if found else words).rstrip(".:;")
    return re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", words).replace("``", "`").replace("|", "\\|")


def public_names(name: str) -> list[tuple[str, str]]:
    """(name, what it is) of a module's public names."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            n
            for n, thing in vars(module).items()
            if not n.startswith("_") and getattr(thing, "__module__", None) == name and callable(thing)
        ]
    found = []
    for n in sorted(names):
        thing = getattr(module, n)
        if inspect.ismodule(thing) or isinstance(thing, (str, tuple)):
            continue
        own = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
        found.append((n, first_sentence(own)))
    return found


def members(thing: object) -> list[str]:
    """Public methods and properties that a class defines itself."""
    return sorted(n for n, m in vars(thing).items() if not n.startswith("_") and (callable(m) or hasattr(m, "__get__")))


def header_names(text: str) -> list[str]:
    """What a header declares in its namespace: declarations start in the first column."""
    text = re.sub(r"namespace detail \{.*?\n\}  // namespace detail", "", text, flags=re.DOTALL)
    names = re.findall(r"^(?:class|struct|enum class|using) (\w+)(?=[ ;{])", text, re.MULTILINE)
    names += re.findall(r"^(?:[\w:<>,&*\[\]]+ )+\*?(\w+)\(", text, re.MULTILINE)
    names += re.findall(r"^#define (TESSERA_\w+) ", text, re.MULTILINE)
    return list(dict.fromkeys(n for n in names if n not in ("if", "fail", "operator")))


def help_of(program: str, *command: str) -> str:
    return subprocess.run([program, *command, "--help"], check=True, capture_output=True, text=True).stdout


def page(program: str) -> str:
    lines = [
        "# All names",
        "",
        "From the code, by `tools/api_index.py`; a test compares. Arguments, shapes, errors: docstrings and headers.",
        "",
        "## Python",
    ]
    for module in MODULES:
        lines += ["", f"### {module}", "", "| name | what |", "|---|---|"]
        for name, what in public_names(module):
            lines.append(f"| `{name}` | {what} |")
    import tessera

    lines += ["", "### Members", "", "| class | methods and properties |", "|---|---|"]
    for name in ("BlockPattern", "KVCache", "PatternConfig", "PerformanceMonitor"):
        lines.append(f"| `{name}` | {', '.join(f'`{m}`' for m in members(getattr(tessera, name)))} |")

    lines += ["", "## C++", "", "| header | what | names |", "|---|---|---|"]
    for folder, where in (("include/tessera", "tessera"), ("torch", "tessera/torch")):
        for path in sorted((ROOT / folder).glob("*.h")):
            text = path.read_text()
            comment = re.match(r"(?:// .*\n|//\n)+", text)
            what = first_sentence(re.sub(r"^// ?", "", comment[0] if comment else "", flags=re.MULTILINE))
            if folder == "torch" and path.stem not in ("functional", "modules"):
                continue  # of the operators themselves
            names = ", ".join(f"`{n}`" for n in header_names(text))
            lines.append(f"| `<{where}/{path.name}>` | {what} | {names} |")

    lines += ["", "## The program", "", "| command | what |", "|---|---|"]
    commands = help_of(program).split("Subcommands:")[1].split("\n\n")[0]
    for name in re.findall(r"^  (\w+) +\S", commands, re.MULTILINE):
        what = help_of(program, name).split("Usage:")[0]
        lines.append(f"| `tessera {name}` | {first_sentence(what)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(sys.argv[1]))
