"""What the tests of the Python package share."""

from __future__ import annotations

import pytest

import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers whatever ran before it, on one thread: the sizes here are too small for more,
    and threads that wait for a busy core cost most. Tests about threads say how many."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """A test file that waits for something long may start it before the first test."""
    for module in {item.module for item in session.items if hasattr(item.module, "start")}:
        module.start(session.config)
