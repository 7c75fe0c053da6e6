"""``python -m tessera``: the program ``tessera`` that comes with the package (``tessera --help``)."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path


def _program() -> Path | None:
    """As the wheel installs it, else as it is built in the source tree that this package lies in."""
    try:
        files = importlib.metadata.files("tessera") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    places = [Path(str(f.locate())) for f in files if f.name == "tessera" and f.parent.name == "bin"]
    places.append(Path(__file__).parents[2] / "build/release/cli/tessera")
    return next((p.resolve() for p in places if p.is_file() and os.access(p, os.X_OK)), None)


def main() -> None:
    program = _program()
    if program is None:
        sys.exit(
            "tessera: the program is not installed beside this package; pip install it again, or ./run in the source"
        )
    os.execv(program, [str(program), *sys.argv[1:]])


if __name__ == "__main__":
    main()
