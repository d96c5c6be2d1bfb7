"""python -m graphquant doctor: what the machine is, and nothing private."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphquant import cli
from graphquant.cli import doctor
from graphquant.ops import OPS, load_kernels
from tests.processes import ROOT


def test_a_process_of_its_own_says_what_runs_here(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    done = subprocess.run(
        [sys.executable, "-m", "graphquant", "doctor", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "GRAPHQUANT_MINE": "/home/me/x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__
    for op in OPS.values():
        assert all(f"{op.name}: {kernel}" in found["kernels"] for kernel in op.files)
    if not torch.cuda.is_available():
        assert set(found["kernels"].values()) == {"no NVIDIA GPU"}
    assert found["a layer in int8"]["cpu"].startswith("100% of the linears' FLOPs")
    ours = next(place for place, text in found["caches"].items() if text.startswith("graphquant"))
    assert ours.startswith(str(tmp_path)) and ours in done.stdout
    assert found["variables"]["GRAPHQUANT_MINE"] == "(a path)" and "/home/me" not in done.stdout
    assert str(ROOT) not in done.stdout


def test_without_a_trial_nothing_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_compiled", lambda device: "FAILS: not asked for")
    assert cli.main(["doctor", "--no-trial"]) == 0
    assert "a layer in int8" not in capsys.readouterr().out
    assert cli.main(["doctor"]) == 1  # what fails is the exit code


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    return doctor._calls("cpu")


def test_the_layer_calls_every_op_that_has_kernels(calls: dict[str, tuple[Any, ...]]) -> None:
    asked = {name for name, op in OPS.items() if op.files} - {"norm_quantize_keep"}
    assert asked <= calls.keys()


def test_a_kernel_is_held_to_the_reference(calls: dict[str, tuple[Any, ...]]) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch.cuda, "synchronize", lambda: None)
    op, args = OPS["int8_linear"], calls["int8_linear"]

    def tried(fn: Any, why: str | None = None) -> str:
        kernel: Any = SimpleNamespace(fn=fn, refuses=lambda *_: why)
        return doctor._tried(op, kernel, args)

    def broken(*_: Any) -> Any:
        raise RuntimeError("\nno image\nfor this device")

    with monkey.context():
        assert tried(op.reference) == "runs"
        assert tried(lambda *a: op.reference(*a) * 1.1).startswith("WRONG")
        assert tried(lambda *a: op.reference(*a) * torch.nan).startswith("WRONG")
        assert tried(broken) == "FAILS: RuntimeError: no image"
        assert tried(op.reference, "the device is sm_70") == "the device is sm_70"
        assert doctor._tried(op, SimpleNamespace(), None).startswith("not tried")  # type: ignore[arg-type]
    monkey.undo()


def test_the_kernels_are_tried_in_the_interpreter_as_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("the next test is for GPUs")
    small = doctor._layer("cpu")
    monkeypatch.setattr(doctor, "_layer", lambda _: tuple(part.bfloat16() for part in small))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    load_kernels()
    calls = doctor._calls("cpu")
    found = {
        f"{op.name}: {kernel.name}": doctor._tried(op, kernel, calls.get(op.name))
        for op in OPS.values()
        for kernel in op.kernels
    }
    assert not [f"{k}: {v}" for k, v in found.items() if v.startswith(("FAILS", "WRONG"))]
    ran = {name.partition(":")[0] for name, text in found.items() if text == "runs"}
    assert {"quantize", "norm_quantize", "int8_linear"} <= ran


@pytest.mark.cuda
def test_on_a_gpu_every_kernel_runs_or_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.kernels()
    assert not [text for text in found.values() if text.startswith(("FAILS", "WRONG"))]
    for name in ("quantize", "int8_linear", "norm_quantize"):
        assert any(k.startswith(f"{name}: ") and v == "runs" for k, v in found.items()), name
