"""python -m graphquant doctor: what the machine is, and nothing private."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphquant import cli
from graphquant.cli import doctor
from graphquant.ops import OPS, cpu, load_kernels
from graphquant.ops.cpu import ISA_VARIABLE
from graphquant.ops.define import Kernel
from graphquant.ops.int8_linear import onednn
from graphquant.ops.runtime.device import GpuProperties
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
    assert re.match(r"float [\d.]+ ms, int8 [\d.]+ ms", found["a layer in int8"]["cpu, time"])
    if cpu.missing() is None:
        library = found["CPU kernels"]
        assert library["kernels"].startswith(f"for {cpu.library().isa.name}, ready in ")
        assert library["cached"].startswith(str(tmp_path)) and Path(library["cached"]).exists()
        ops = found["ops on the CPU"]
        assert ops.pop("int8_linear: onednn").startswith(("runs", "oneDNN"))
        assert set(ops.values()) == {"runs"}
        assert {n.partition(":")[0] for n in ops} == {n for n, o in OPS.items() if o.has_cpu_kernel}
    ours = next(place for place, text in found["caches"].items() if text.startswith("graphquant"))
    assert ours.startswith(str(tmp_path)) and ours in done.stdout
    assert found["variables"]["GRAPHQUANT_MINE"] == "(a path)" and "/home/me" not in done.stdout
    assert str(ROOT) not in done.stdout


def test_without_a_trial_nothing_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_compiled", lambda device: "FAILS: not asked for")
    monkeypatch.setattr(doctor, "_timed", lambda: "")
    assert cli.main(["doctor", "--no-trial"]) == 0
    assert "a layer in int8" not in capsys.readouterr().out
    assert cli.main(["doctor"]) == 1  # what fails is the exit code


def test_it_says_what_is_known_of_each_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [GpuProperties(sm, 132, 232_448) for sm in (90, 103, 75, 103)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(doctor, "gpu_properties", lambda device: gpus[device.index])
    slow = "int8 tensor cores of sm_103 (B300, GB300) have 1/30 of fp8's and 1/15 of bfloat16's"
    assert doctor._of_gpus() == {
        "kernels on sm_75": "graphquant's kernels need sm_80 or later",
        "int8 on sm_90": "is measured",
        "kernels on sm_90": "all tests have run on an H200",
        "int8 on sm_103": f"is measured, and rarely the faster one: {slow} throughput",
        "kernels on sm_103": (
            "graphquant's kernels compile for sm_103, but were never run on such a GPU"
        ),
    }


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    return doctor._calls("cpu")


def test_the_layer_calls_every_op_that_has_kernels(calls: dict[str, tuple[Any, ...]]) -> None:
    assert {name for name, op in OPS.items() if op.files or op.has_cpu_kernel} <= calls.keys()


def test_it_says_what_the_processor_lacks_for_better_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (why := cpu.missing()) is not None:
        pytest.skip(why)
    has = {**torch.cpu.get_capabilities(), "amx_int8": False, "avx512_vnni": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**has, "avx_vnni": True})
    amx, avx512, _, avx2 = cpu.INSTRUCTION_SETS
    library = cpu.Library(avx2, cpu.library().module)
    monkeypatch.setattr(cpu, "library", lambda: library)
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    found = doctor.cpu_library()
    assert found["kernels"].startswith("for avx2, ready in ")
    assert found["not amx"].startswith("the processor lacks") and "amx_int8" in found["not amx"]
    assert found["not avx512_vnni"].endswith("avx512_vnni")
    assert "cannot be built" in found["not avx_vnni"]
    assert found["int8"] == (
        'this processor has no int8 dot product: int8 stays float unless select="always"'
    )
    monkeypatch.setenv(ISA_VARIABLE, "avx2")
    assert doctor.cpu_library()["not avx_vnni"] == f"{ISA_VARIABLE} asks for avx2"
    assert amx.missing and avx512.missing


@pytest.mark.parametrize("exact", [True, False])
def test_without_a_compiler_it_says_what_computes_int8(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setattr(cpu, "missing", lambda: "they need a C++ compiler")
    monkeypatch.setattr(onednn, "missing", lambda: None if exact else "it saturates")
    found = doctor.cpu_library()
    assert found["compiler"].startswith("none: ")
    assert found["kernels"] == "none: they need a C++ compiler"
    assert found["instead"] == ("oneDNN and " if exact else "") + "PyTorch's operators"
    assert found["int8"].startswith("is measured") is exact
    assert ('stays float unless select="always"' in found["int8"]) is not exact
    monkeypatch.setattr(onednn, "_product", lambda xq, wq: xq.float() @ wq.float().T)
    ops = doctor.cpu_kernels()
    assert ops.pop("int8_linear: onednn") == ("runs" if exact else "it saturates")
    assert set(ops.values()) == {"they need a C++ compiler"}


def test_a_cpu_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = OPS["quantize"]
    kernel = Kernel("cpu", lambda *a: quantize.reference(*a)[::-1], lambda *a: None)
    monkeypatch.setattr(doctor, "Kernel", lambda *_: kernel)
    assert doctor.cpu_kernels()["quantize: cpu"].startswith(("FAILS", "WRONG"))


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
