"""Building and choosing the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphquant.errors import KernelBuildError, OptionError, UnsupportedInputError
from graphquant.ops import cpu
from graphquant.ops.cpu import ISA_VARIABLE
from graphquant.ops.numerics import ACTIVATIONS

Patch = pytest.MonkeyPatch
NAMES = [isa.name for isa in cpu.INSTRUCTION_SETS]
find = cpu.library.__wrapped__


def capable(monkeypatch: Patch, *names: str, architecture: str = "x86_64") -> None:
    found = {"architecture": architecture, **dict.fromkeys(names, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def needs(name: str) -> tuple[str, ...]:
    return cpu.INSTRUCTION_SETS[NAMES.index(name)].needs


@pytest.mark.parametrize("best", NAMES)
def test_the_best_instruction_set_of_the_processor_is_taken(best: str, monkeypatch: Patch) -> None:
    tried = []
    capable(monkeypatch, *needs(best))
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "build", lambda isa: tried.append(isa.name))
    monkeypatch.setattr(cpu, "_wrong_sums", lambda module: None)
    assert find().isa.name == best and tried == [best]


def test_a_worse_one_is_taken_where_a_better_one_fails(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(isa: cpu.InstructionSet) -> Any:
        if isa.name == "amx":
            raise KernelBuildError("unrecognized option -mamx-int8")
        return isa.name

    capable(monkeypatch, *needs("amx"), *needs("avx_vnni"))
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "build", build)
    wrong = {"avx512_vnni": "sums are wrong", "avx_vnni": None}
    monkeypatch.setattr(cpu, "_wrong_sums", lambda module: wrong[module])
    assert find().isa.name == "avx_vnni"
    assert "kernels for avx512_vnni are not used: sums are wrong" in caplog.text
    wrong["avx_vnni"] = wrong["avx2"] = "sums are wrong"
    with pytest.raises(KernelBuildError, match=r"amx: unrecognized option(.|\n)*avx2: sums are"):
        find()


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_processors_without_avx2_have_no_kernels(architecture: str, monkeypatch: Patch) -> None:
    capable(monkeypatch, "sse4_1", architecture=architecture)
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    with pytest.raises(UnsupportedInputError, match="need an x86-64 processor with AVX2"):
        find()


def test_the_variable_names_an_instruction_set(monkeypatch: Patch) -> None:
    capable(monkeypatch, *needs("avx2"))
    monkeypatch.setenv(ISA_VARIABLE, "amx")
    with pytest.raises(OptionError, match=r"'amx', but this processor lacks avx512_f, .*amx_int8"):
        find()
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(OptionError, match=r"'mmx' is not one of amx, avx512_vnni, avx_vnni, avx2"):
        find()


def test_wrong_sums_are_seen() -> None:
    class Saturates:
        @staticmethod
        def int8_linear(*args: Any) -> None:
            args[-1].zero_()

    assert cpu._wrong_sums(cpu.library().module) is None
    assert cpu._wrong_sums(Saturates()) == "sums of int8 products are wrong on this machine"  # type: ignore[arg-type]


def test_every_activation_has_its_branch() -> None:
    """by_activation in activations.h goes by the position in ACTIVATIONS."""
    text = (Path(cpu.__file__).parent / "activations.h").read_text()
    in_order = [
        line.split("return f(")[1].split("{")[0] for line in text.splitlines() if "case" in line
    ]
    snake = ["".join(f"_{c.lower()}" if c.isupper() else c for c in n)[1:] for n in in_order]
    assert snake == list(ACTIVATIONS)


@pytest.mark.parametrize("isa", cpu.INSTRUCTION_SETS, ids=lambda isa: isa.name)
def test_a_model_runs_on_kernels_for(isa: cpu.InstructionSet, tmp_path: Path) -> None:
    if isa.missing:
        pytest.skip(f"NOT RUN: this processor lacks {', '.join(isa.missing)}")
    program = """
import torch, graphquant
from graphquant.ops import cpu
from tests.small import Mlp, seeded
model, x = seeded(Mlp).eval(), torch.randn(8, 64)
reports = []
with torch.no_grad():
    y = torch.compile(model, backend="graphquant", options={"on_report": reports.append})(x)
    error = (y - model(x)).norm() / model(x).norm()
print(cpu.library().isa.name, reports[0].coverage, float(error) < 0.02)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, ISA_VARIABLE: isa.name, "GRAPHQUANT_SELECT": "always"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{isa.name} 1.0 True\n", done.stderr


def test_a_processor_without_dot_product_is_told(monkeypatch: Patch) -> None:
    avx2 = cpu.Library(cpu.INSTRUCTION_SETS[-1], cpu.library().module)
    monkeypatch.setattr(cpu, "library", lambda: avx2)
    assert cpu.without_dot() == "this processor has no int8 dot product"
