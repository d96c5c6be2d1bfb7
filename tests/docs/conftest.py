"""What the pages' short snippets take for granted: a model, its inputs, a package of the reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphquant.passes.attention import dtype as attention_dtype
from tests import zoo

# What `python -m tools.show_graph --model my_package.my_module:make_model` imports.
MY_MODULE = """
from tests import zoo

ENTRY = zoo.load("vit")

def make_model(batch=2):
    return ENTRY.build("sdpa"), *ENTRY.inputs(batch)

def make_batches():
    return [ENTRY.inputs(2, 0), ENTRY.inputs(3, 1)]
"""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A reader's working directory, and the names that a page may use without making them.

    model    a ViT of two small layers, built from a config, with random weights
    x        [2, 3, 32, 32] float32, what it takes
    batches  two, of 2 and of 3 images
    """
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_module.py").write_text(MY_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "140")
    # reports are the same on every machine
    monkeypatch.setattr(attention_dtype, "has_bfloat16", lambda: False)
    entry = zoo.load("vit")
    (x,), _ = entry.inputs(2)
    batches = [entry.inputs(n, draw) for draw, n in enumerate((2, 3))]
    torch._dynamo.reset()
    yield {"model": entry.build("sdpa"), "x": x, "batches": batches}
    torch._dynamo.reset()
