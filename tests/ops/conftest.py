from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives nan and 127 instead of what happened to be there."""
    torch.use_deterministic_algorithms(True)  # with torch's default fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int8) == 127).all()
    yield
    torch.use_deterministic_algorithms(False)
