"""The house rules that a compiler does not check: who may include whom, and what the library never does.

    python3 tests/layers_test.py SOURCE_DIR

Public headers and the folders of src/ are rooms; a room includes only those named beside it (and itself).
"""

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
    "block_pattern.h": "pattern",
    "patterns.h": "pattern",
    "pattern_combine.h": "pattern",
    "pattern_cache.h": "pattern",
    "pattern_custom.h": "pattern",
    "pattern_statistics.h": "pattern",
    "attention.h": "call",
    "backward.h": "call",
    "machine.h": "call",
    "dilated.h": "call",
    "io.h": "io",
    "analysis.h": "analysis",
    "picture.h": "picture",
    "check.h": "check",
}
# What each room may include. reference and cpu are siblings that do not know each other.
ALLOWED = {
    "core": set(),
    "pattern": {"core"},
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
# Torch's own headers: nowhere but in torch/ and what tests it.
TORCH_FOLDERS = {"torch", "ATen", "c10", "caffe2"}
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
        for number, line in enumerate(strip_comments_and_strings(path.read_text()).splitlines(), 1):
            match = FORBIDDEN_WORDS.search(line)
            if match:
                errors.append(f"{path.relative_to(root)}:{number}: the library must not use {match.group(0).strip()}")


def check_torch_file(path, root, errors):
    """torch/ stands on the public headers: it includes those, torch's, C++'s and its own, and nothing of src/."""
    for number, quoted, target in includes(path):
        where = f"{path.relative_to(root)}:{number}"
        if quoted and target.startswith("tessera/"):
            room_of_include(target, errors, where)
        elif quoted and not (path.parent / target).is_file():
            errors.append(f'{where}: "{target}" is neither a public header nor one of torch/')
        elif not quoted and "/" in target and target.split("/")[0] not in TORCH_FOLDERS:
            errors.append(f"{where}: <{target}> is of no library that torch/ knows")
    for number, line in enumerate(strip_comments_and_strings(path.read_text()).splitlines(), 1):
        match = FORBIDDEN_WORDS.search(line)
        if match:
            errors.append(f"{path.relative_to(root)}:{number}: the library must not use {match.group(0).strip()}")


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
    for path in sorted((root / "torch").rglob("*")):
        if path.suffix in (".h", ".cc"):
            check_torch_file(path, root, errors)
    return errors


def self_test(scratch):
    """The rules bite: each file below breaks one."""
    cases = {
        "include/tessera/dtype.h": ('#include "cpu/cpu.h"', "not installed"),
        "include/tessera/error.h": ("#include <fmt/format.h>", "no business in a public header"),
        "include/tessera/executor.h": ('#include "tessera/attention.h"', "must not include"),
        "include/tessera/novel.h": ("#include <vector>", "has no room"),
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
    }
    for name, (text, _) in cases.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(text + "\n")
    errors = check_tree(scratch)
    for name, (_, expected) in cases.items():
        found = [e for e in errors if e.startswith(name)]
        if expected is None and found or expected is not None and not any(expected in e for e in found):
            return f"self-test: {name}: expected {expected!r}, got {found}"
    return None


def main():
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        failure = self_test(pathlib.Path(scratch))
    if failure:
        sys.exit(failure)
    root = pathlib.Path(sys.argv[1]).resolve()
    errors = check_tree(root)
    if (root / "examples/block_sparse.cc").read_text() not in (root / "README.md").read_text():
        errors.append("README.md: the example is not that of examples/block_sparse.cc")
    if errors:
        sys.exit("\n".join(errors))
    print("the rules hold")


if __name__ == "__main__":
    main()
