from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives nan and 127 instead of what happened to be there."""
    with _poisoned():
        yield


@pytest.fixture(scope="module")
def poisoned_throughout() -> Iterator[None]:
    """`poisoned` for all tests of a file, also of hypothesis."""
    with _poisoned():
        yield


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with torch's default fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int8) == 127).all()
    yield
    torch.use_deterministic_algorithms(False)
