"""torchvision where its compiled part is for another build of torch.

PyPI's torchvision is built for PyPI's torch, which brings CUDA. Beside a CPU build it is imported
all the same once its operators exist by name, and timm and open_clip call none of them.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.docs.pages import ROOT

# `make nightly` installs torchvision, timm and open_clip there, apart from what other tests import:
# transformers would use torchvision too.
FOLDER = ROOT / "build" / "vision"
PACKAGES = Path(os.environ.get("GRAPHQUANT_VISION") or FOLDER)
APART = "GRAPHQUANT_VISION_APART"  # set in the process that has them


def is_here() -> bool:
    """Is this the process that has torchvision? It is imported then."""
    if APART not in os.environ:
        return False
    _import_torchvision()
    return True


def run_apart(test: str) -> None:
    """Run one test in a process where `is_here`."""
    if not PACKAGES.is_dir():
        pytest.skip(f"IS NOT RUN: `make {FOLDER.relative_to(ROOT)}/.made` installs what it needs")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    left = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", test],
        cwd=ROOT, env={**left, "PYTHONPATH": path, APART: "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if " skipped in " in done.stdout:
        pytest.skip(done.stdout[-500:])
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:] + done.stderr


def _import_torchvision() -> None:
    """From PACKAGES, with its operators, or with their names alone."""
    sys.path.append(str(PACKAGES))
    try:
        importlib.import_module("torchvision")
    except RuntimeError as why:
        if "torchvision::" not in str(why):
            raise
        _define_operators()
        importlib.import_module("torchvision")


def _define_operators() -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    fakes = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    for name in set(re.findall(r'register_\w+\("(?:torchvision::)?(\w+)"\)', fakes)):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
