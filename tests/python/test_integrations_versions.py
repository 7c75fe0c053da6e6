"""The releases that the integrations are tested with: what their table says is what is installed, for the newest; and
the integrations' tests pass with the oldest too, in a process of their own beside the other tests."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tessera.integrations import _versions

HERE = Path(__file__).parent
# Where ./test puts the oldest releases, for PYTHONPATH: they come before those of the environment.
OLDEST = Path(sys.prefix, "oldest")
TESTS = [HERE / f"test_integrations_{name}.py" for name in ("lightning", "transformers", "transformers_compile")]
RUN = pytest.StashKey[subprocess.Popen[str]]()


def start(config: pytest.Config) -> None:
    """Called by conftest.py before the first test."""
    if not OLDEST.is_dir():
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--disable-warnings", *TESTS],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    config.add_cleanup(run.kill)
    config.stash[RUN] = run


@pytest.mark.skipif(not OLDEST.is_dir(), reason=f"needs the oldest releases in {OLDEST}, where ./test puts them")
def test_oldest(pytestconfig):
    for package, (oldest, _) in _versions.TESTED.items():
        found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(OLDEST)])}
        assert found[package].split(".")[:2] == [str(number) for number in oldest]
    run = pytestconfig.stash[RUN]
    printed = run.communicate()[0]
    assert run.returncode == 0, printed


@pytest.mark.parametrize("package", _versions.TESTED)
def test_newest(package):
    pytest.importorskip(package)
    newest = _versions.TESTED[package][1]
    assert importlib.metadata.version(package).split(".")[:2] == [str(number) for number in newest]


def test_newer_is_a_warning_and_older_an_error(monkeypatch):
    monkeypatch.setattr(_versions, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("5.0.0", "5.0.1", "5.24.3", "5.24.0.dev0"):
            _versions.check_version("transformers", version)

    def register(version):
        _versions.check_version("transformers", version)

    with pytest.warns(UserWarning, match=r"^tessera: transformers 6\.1\.0 is newer than 5\.\d+, ") as caught:
        register("6.1.0")
        register("6.2.0")  # said once
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(ImportError, match=r"^transformers: got version 4\.57\.6; allowed: 5\.0 or later$"):
        _versions.check_version("transformers", "4.57.6")
