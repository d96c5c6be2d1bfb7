"""Encoders over two processes by DTensor: docs/recipes/distributed.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import in_a_group
from tests.tensor_parallel import CASES

GPUS = torch.cuda.device_count()
DEVICES = [
    pytest.param("gloo", "cpu", id="gloo", marks=pytest.mark.cpu),
    pytest.param(
        "nccl", "cuda", id="nccl", marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
    ),
]


def check(case: str, backend: str, device: str, folder: Path) -> None:
    in_a_group(["-m", "tests.tensor_parallel", case, backend, device, folder / "group"], 2)


def test_bert_over_two_processes(tmp_path: Path) -> None:
    check("bert of one layer", "gloo", "cpu", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device"), DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "bert of one layer"])
def test_two_processes(case: str, backend: str, device: str, tmp_path: Path) -> None:
    check(case, backend, device, tmp_path)
