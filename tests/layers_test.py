"""The house rules that a compiler does not check: who may include or import whom, and what the library never does.

    python3 tests/layers_test.py SOURCE_DIR

Public headers, the folders of src/ and those of python/tessera are rooms; a room includes only those named beside it
(and itself). Everything else stands on the public headers.
"""

import ast
import pathlib
import re
import sys

# Room of each public header; one that is missing here is an error, so that a new header gets its place.
HEADER_ROOMS = {
    "error.h": "core",
    "dtype.h": "core",
    "tensor_view.h": "core",
    "executor.h": "core",
    "huge_pages.h": "core",
    "version.h": "core",
    "block_pattern.h": "pattern",
    "patterns.h": "pattern",
    "pattern_combine.h": "pattern",
    "pattern_cache.h": "pattern",
    "pattern_custom.h": "pattern",
    "pattern_statistics.h": "pattern",
    "attention.h": "call",
    "backward.h": "call",
    "kv_cache.h": "attention",
    "machine.h": "call",
    "dilated.h": "call",
    "io.h": "io",
    "analysis.h": "analysis",
    "picture.h": "picture",
    "check.h": "check",
    "tessera.h": "all of the core",
}
# What each room may include. reference and cpu are siblings that do not know each other.
ALLOWED = {
    "core": set(),
    "pattern": {"core"},
    "all of the core": {"core", "pattern", "call", "attention"},
    "call": {"core", "pattern"},
    "reference": {"core", "pattern", "call"},
    "cpu": {"core", "pattern", "call"},
    "attention": {"core", "pattern", "call", "reference", "cpu"},
    "io": {"core", "pattern"},
    "check": {"core", "pattern", "call", "reference", "cpu", "attention"},
    "analysis": {"core", "pattern", "call"},
    "picture": {"core", "pattern", "io"},
}
# Other people's headers: nowhere but here.
LIBRARIES = {"hwy": {"cpu", "analysis"}, "fmt": set(ALLOWED), "nlohmann": {"io"}, "png.h": {"picture"}}
# What stands on the public headers alone, and other people's headers there (by their folder).
OUTSIDE = {
    "torch": {"torch", "ATen", "c10", "caffe2"},
    "cli": {"CLI", "fmt", "nlohmann"},
    "bench": {"benchmark", "fmt"},
    "examples": set(),
}
# Rooms of python/tessera: its folders and files. tessera/__init__.py may import all of them.
PYTHON_ALLOWED = {
    "__main__": set(),
    "_ops": set(),
    "pattern": {"_ops"},
    "patterns": {"pattern"},
    "attention": {"_ops", "pattern"},
    "analysis": {"_ops", "attention", "pattern", "patterns"},
    "nn": {"analysis", "attention", "pattern"},
    "guides": {"analysis", "attention", "nn", "pattern"},
    "interop": {"pattern"},
    "integrations": {"attention", "interop", "pattern", "patterns"},
}
# Other people's Python packages: nowhere but here.
PYTHON_LIBRARIES = {
    "torch": {"__init__", *PYTHON_ALLOWED},
    "matplotlib": {"pattern"},
    "scipy": {"interop"},
    "lightning": {"integrations"},
    "pytorch_lightning": {"integrations"},
    "transformers": {"integrations"},
}
# A library neither prints, nor ends the program, nor reads its environment.
FORBIDDEN_WORDS = re.compile(
    r"\b(?:std::(?:cout|cerr|clog)|printf|fprintf|puts|fputs|putchar|perror|fmt::print|"
    r"abort|_?exit|quick_exit|terminate|getenv|secure_getenv|setenv|putenv)\b\s*(?=[(<;])|\bstd::(?:cout|cerr|clog)\b"
)
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def strip_comments_and_strings(text):
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r'//[^\n]*|/\*.*?\*/|R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"', keep_lines, text, flags=re.S)


def includes(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1) == '"', match.group(2)


def room_of_include(target, errors, where):
    """Room of a quoted include, as seen from src/ or include/."""
    if target.startswith("tessera/"):
        name = target.removeprefix("tessera/")
        if name not in HEADER_ROOMS:
            errors.append(f"{where}: public header {target} has no room in tests/layers_test.py")
            return None
        return HEADER_ROOMS[name]
    room = target.split("/")[0]
    if "/" not in target or room not in ALLOWED:
        errors.append(f'{where}: "{target}" is no header of a room of src/')
        return None
    return room


def check_file(path, room, public, root, errors):
    for number, quoted, target in includes(path):
        where = f"{path.relative_to(root)}:{number}"
        top = target.split("/")[0]
        if quoted and top not in LIBRARIES:
            if public and not target.startswith("tessera/"):
                errors.append(f'{where}: a public header includes "{target}", which is not installed')
                continue
            other = room_of_include(target, errors, where)
            if other is not None and other != room and other not in ALLOWED[room]:
                errors.append(f'{where}: room {room} must not include "{target}" of room {other}')
            continue
        if top in LIBRARIES:
            if public or room not in LIBRARIES[top]:
                errors.append(
                    f"{where}: <{target}> has no business in {'a public header' if public else 'room ' + room}"
                )
        elif "/" in target and top not in ("sys", "linux", "asm"):
            errors.append(f"{where}: <{target}> is of no library that the core knows")
        elif public and target.endswith(".h"):
            errors.append(f"{where}: a public header includes <{target}>; only C++ standard headers are everywhere")
    if not public:
        check_words(path, root, errors)


def check_outside_file(path, folder, root, errors):
    """A file on the public headers: it includes those, its folder's own, C++'s and the named libraries'."""
    for number, quoted, target in includes(path):
        where = f"{path.relative_to(root)}:{number}"
        own = (path.parent / target).resolve()
        if quoted and target.startswith("tessera/"):
            room_of_include(target, errors, where)
        elif quoted and not (own.is_file() and root / folder in own.parents):
            errors.append(f'{where}: "{target}" is neither a public header nor one of {folder}/')
        elif not quoted and "/" in target and target.split("/")[0] not in OUTSIDE[folder] | {"sys"}:
            errors.append(f"{where}: <{target}> is of no library that {folder}/ knows")


def check_words(path, root, errors):
    for number, line in enumerate(strip_comments_and_strings(path.read_text()).splitlines(), 1):
        match = FORBIDDEN_WORDS.search(line)
        if match:
            errors.append(f"{path.relative_to(root)}:{number}: the library must not use {match.group(0).strip()}")


def python_imports(path, package):
    """(line, dotted name) of everything that a module imports; `package`: the dotted name of its folder, as a list."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module == "tessera":  # then the names may be modules
                yield from ((node.lineno, f"tessera.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def check_python_file(path, root, errors):
    parts = path.relative_to(root / "python").with_suffix("").parts
    room = parts[1]
    if room != "__init__" and room not in PYTHON_ALLOWED:
        errors.append(f"{path.relative_to(root)}: {room} is no room of tests/layers_test.py")
        return
    for number, name in python_imports(path, parts[:-1]):
        where = f"{path.relative_to(root)}:{number}"
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "tessera":
            if room not in ("__init__", other) and other not in PYTHON_ALLOWED[room]:
                errors.append(f"{where}: room {room} must not import {name} of room {other or '__init__'}")
        elif top not in sys.stdlib_module_names and room not in PYTHON_LIBRARIES.get(top, ()):
            errors.append(f"{where}: {name} has no business in room {room}")


def check_python_circles(root, errors):
    """No module imports itself by way of others, not even inside a function. (A folder's __init__ may be imported by
    its files' names: what counts is the file.)"""
    package = root / "python"
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] != "__init__":
            modules[".".join(parts)] = {name for _, name in python_imports(path, list(parts[:-1]))}
    graph = {name: sorted(imports & modules.keys()) for name, imports in modules.items()}
    done = set()

    def visit(name, trail):
        if name in trail:
            errors.append(f"python: {' -> '.join([*trail[trail.index(name) :], name])} is a circle")
        elif name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def check_libraries(root, errors):
    """Each room is in one library of CMakeLists.txt, and what is in tessera::core includes nothing outside it."""
    text = (root / "CMakeLists.txt").read_text()
    libraries = {name: rooms.split() for name, rooms in re.findall(r"add_tessera_library\((\w+) \w+ ([\w ]+)\)", text)}
    for room, allowed in ALLOWED.items():
        if room == "all of the core":
            continue
        homes = [name for name, rooms in libraries.items() if room in rooms]
        if len(homes) != 1:
            errors.append(f"CMakeLists.txt: room {room} is in {len(homes)} libraries")
        elif homes == ["core"] and not allowed <= set(libraries["core"]):
            beyond = sorted(allowed - set(libraries["core"]))
            errors.append(f"CMakeLists.txt: room {room} of tessera::core may include {', '.join(beyond)}")


def check_version_and_umbrella(root):
    """tessera/version.h has the version of CMakeLists.txt, tessera/tessera.h all headers of the core."""
    errors = []
    version = re.search(r"project\(tessera VERSION ([0-9.]+)", (root / "CMakeLists.txt").read_text()).group(1)
    defined = dict(re.findall(r'#define TESSERA_(\w+) "?([0-9.]+)', (root / "include/tessera/version.h").read_text()))
    parts = dict(zip(("VERSION_MAJOR", "VERSION_MINOR", "VERSION_PATCH"), version.split(".")))
    if defined != {"VERSION": version, **parts}:
        errors.append(f"include/tessera/version.h: has {defined}, CMakeLists.txt {version}")
    listed = [target.removeprefix("tessera/") for _, _, target in includes(root / "include/tessera/tessera.h")]
    wanted = sorted(h for h, room in HEADER_ROOMS.items() if room in ALLOWED["all of the core"])
    if listed != wanted:
        errors.append(f"include/tessera/tessera.h: includes {listed}; wanted: {wanted}")
    return errors


def check_tree(root):
    errors = []
    for path in sorted((root / "include/tessera").rglob("*")):
        if path.suffix == ".h":
            room = room_of_include(f"tessera/{path.name}", errors, path.relative_to(root))
            if room is not None:
                check_file(path, room, True, root, errors)
    for path in sorted((root / "src").rglob("*")):
        if path.suffix not in (".h", ".cc"):
            continue
        room = path.relative_to(root / "src").parts[0]
        if room not in ALLOWED:
            errors.append(f"{path.relative_to(root)}: src/{room} is no room of tests/layers_test.py")
            continue
        check_file(path, room, False, root, errors)
    for folder in OUTSIDE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".h", ".cc"):
                check_outside_file(path, folder, root, errors)
                if folder == "torch":
                    check_words(path, root, errors)
    for path in sorted((root / "python/tessera").rglob("*.py")):
        check_python_file(path, root, errors)
    check_python_circles(root, errors)
    check_libraries(root, errors)
    return errors


def self_test(scratch):
    """The rules bite: each file below breaks one."""
    cases = {
        "include/tessera/dtype.h": ('#include "cpu/cpu.h"', "not installed"),
        "include/tessera/error.h": ("#include <fmt/format.h>", "no business in a public header"),
        "include/tessera/executor.h": ('#include "tessera/attention.h"', "must not include"),
        "include/tessera/novel.h": ("#include <vector>", "has no room"),
        "src/cpu/cpu.h": ("", None),
        "src/pattern/a.cc": ('#include "cpu/cpu.h"', "must not include"),
        "src/attention/b.cc": ("#include <torch/torch.h>", "no library that the core knows"),
        "src/io/c.cc": ("void f() { std::cerr << 1; }", "must not use"),
        "src/cpu/d.cc": ('int f() { return getenv ("A") != 0; }', "must not use"),
        "src/core/e.cc": ('// getenv(, abort(\nauto x = "abort()"; void f() { snprintf(0, 0, ""); }', None),
        "src/gpu/f.cc": ("", "no room"),
        "src/io/g.cc": ("#include <ATen/ATen.h>", "no library that the core knows"),
        "include/tessera/block_pattern.h": ("#include <c10/util/Exception.h>", "no library that the core knows"),
        "torch/h.cc": ('#include <ATen/ATen.h>\n#include <vector>\n#include "i.h"\n#include "tessera/dtype.h"', None),
        "torch/i.h": ('#include "cpu/cpu.h"', "neither a public header"),
        "torch/j.cc": ("#include <fmt/format.h>", "no library that torch/ knows"),
        "torch/k.cc": ("void f() { std::cout << 1; }", "must not use"),
        "cli/l.cc": ('#include <CLI/CLI.hpp>\n#include <sys/stat.h>\n#include "m.h"\nvoid f() { puts("1"); }', None),
        "cli/m.h": ('#include "cpu/cpu.h"', "neither a public header nor one of cli/"),
        "cli/n.cc": ("#include <hwy/highway.h>", "no library that cli/ knows"),
        "bench/o.cc": ('#include "../src/cpu/cpu.h"', "neither a public header"),
        "python/tessera/__init__.py": ("from . import guides\nfrom .nn import A", None),
        "python/tessera/_ops.py": (
            "import torch\ndef f():\n    from . import guides",
            "must not import tessera.guides",
        ),
        "python/tessera/pattern/a.py": ("from .. import _ops\nfrom .b import A\nimport os.path", None),
        "python/tessera/patterns.py": ("from .pattern import A\nfrom .patterns import B", None),
        "python/tessera/attention/a.py": ("import tessera.nn", "must not import tessera.nn"),
        "python/tessera/interop/p.py": ("from ..nn.a import b", "must not import tessera.nn"),
        "python/tessera/interop/q.py": ("from .p import a\nfrom .. import pattern\nimport scipy.sparse", None),
        "python/tessera/interop/r.py": ("import tessera", "must not import tessera of room __init__"),
        "python/tessera/nn/a.py": ("import transformers", "no business in room nn"),
        "python/tessera/rooms.py": ("", "no room"),
        "python/tessera/nn/circle_a.py": ("def f():\n    from .circle_b import g", None),
        "python/tessera/nn/circle_b.py": ("from .circle_a import f", None),
        "CMakeLists.txt": (
            "add_tessera_library(core tessera core pattern call cpu attention)\n"
            "add_tessera_library(tools tessera_tools reference io analysis picture check)",
            "attention of tessera::core may include reference",
        ),
    }
    for name, (text, _) in cases.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(text + "\n")
    errors = check_tree(scratch)
    circle = "python: tessera.nn.circle_a -> tessera.nn.circle_b -> tessera.nn.circle_a is a circle"
    if circle not in errors:
        return f"self-test: no '{circle}' in {errors}"
    for name, (_, expected) in cases.items():
        found = [e for e in errors if e.startswith(name)]
        if expected is None and found or expected is not None and not any(expected in e for e in found):
            return f"self-test: {name}: expected {expected!r}, got {found}"
    return None


def main():
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        failure = self_test(pathlib.Path(scratch).resolve())
    if failure:
        sys.exit(failure)
    root = pathlib.Path(sys.argv[1]).resolve()
    errors = check_tree(root) + check_version_and_umbrella(root)
    if (root / "examples/block_sparse.cc").read_text() not in (root / "docs/cpp.md").read_text():
        errors.append("docs/cpp.md: the example is not that of examples/block_sparse.cc")
    if errors:
        sys.exit("\n".join(errors))
    print("the rules hold")


if __name__ == "__main__":
    main()
