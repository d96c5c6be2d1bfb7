"""Every test of the passes starts from the same random numbers, without autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_inference() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield
