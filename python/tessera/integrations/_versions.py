"""Versions of other packages that an integration is tested with."""

from __future__ import annotations

import re
import warnings

# Package: the oldest and the newest release, of which ./test runs the integration's tests with both. The newest is what
# tests/python/requirements.lock installs, the oldest what tests/python/oldest.lock does.
TESTED = {"lightning": ((2, 6), (2, 6)), "transformers": ((5, 0), (5, 24))}

_warned: set[str] = set()


def check_version(package: str, version: str) -> None:
    """Warns, once, of a release that is newer than those that were tested.

    Raises:
        ImportError: of one that is older.
    """
    oldest, newest = TESTED[package]
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if release < oldest:
        raise ImportError(f"{package}: got version {version}; allowed: {oldest[0]}.{oldest[1]} or later")
    if release > newest and package not in _warned:
        _warned.add(package)
        warnings.warn(
            f"tessera: {package} {version} is newer than {newest[0]}.{newest[1]}, the newest release that is tested",
            stacklevel=3,
        )
