"""Traced programs leave the process, and run in another one at other sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphquant
from graphquant import UnsupportedInputError
from tests import zoo
from tests.small import Model

RUN = """
import sys, torch, graphquant
for name in sys.argv[1:]:
    traced = torch.jit.load(f"{name}.pt")
    got = traced(**torch.load(f"{name}.in"))
    torch.save(dict(got), f"{name}.out")
"""
LOAD = "import sys, torch; torch.jit.load(sys.argv[1])"


def python(code: str, *args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def exported(name: str, **dynamic: dict[int, Any]) -> tuple[torch.export.ExportedProgram, Any]:
    entry = zoo.SMALL[name]
    args, kwargs = entry.inputs(2)
    model = entry.build("sdpa")
    return graphquant.export(model, args, kwargs, dynamic_shapes=dynamic), entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two traced programs, inputs of other sizes, and what the programs make of them."""
    folder = tmp_path_factory.mktemp("torchscript")
    batch, length = Dim("batch"), Dim("length", max=40)
    text = {0: batch, 1: length}
    programs = {
        "clip_vision": exported("clip_vision", pixel_values={0: batch}),
        "bert": exported("bert", input_ids=text, attention_mask=text),
    }
    for name, (program, entry) in programs.items():
        graphquant.torchscript(program).save(folder / f"{name}.pt")
        args, kwargs = entry.inputs(5)
        kwargs = {k: v[:, :13] for k, v in kwargs.items()}
        names = dict(zip(["pixel_values"], args, strict=False))  # it takes all by name
        torch.save({**names, **kwargs}, folder / f"{name}.in")
        with torch.no_grad():
            want = program.module()(*args, **kwargs)
        torch.save(dict(want), folder / f"{name}.want")
    return folder


def test_a_new_process_runs_it_at_other_sizes(folder: Path) -> None:
    """The same ops in the same order: the same bits."""
    done = python(RUN, "clip_vision", "bert", folder=folder)
    assert done.returncode == 0, done.stderr
    for name in ("clip_vision", "bert"):
        got, want = torch.load(folder / f"{name}.out"), torch.load(folder / f"{name}.want")
        assert list(got) == list(want)
        for key in want:
            assert torch.equal(got[key], want[key]), (name, key)


def test_without_graphquant_torch_names_the_op(folder: Path) -> None:
    done = python(LOAD, "bert.pt", folder=folder)
    assert done.returncode != 0
    assert "Unknown builtin op: graphquant::norm_quantize" in done.stderr


def test_weights_are_int8_and_no_float_copy_is_left(folder: Path) -> None:
    traced = torch.jit.load(folder / "clip_vision.pt")
    weights = {n: t for n, t in traced.state_dict().items() if t.dim() == 2}
    assert {n for n, t in weights.items() if t.dtype == torch.int8} == {
        f"encoder.layers.{i}.{path}.wq"
        for i in range(2)
        for path in ("self_attn.q_proj_k_proj_v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    }
    others = {n for n, t in weights.items() if t.dtype != torch.int8}
    assert all(n.startswith("embeddings.") for n in others), others


def test_it_takes_arguments_by_position_too() -> None:
    model = Model(lambda m, x, y: m.fc(x) + y, fc=nn.Linear(32, 32))
    args = torch.randn(3, 32), torch.randn(3, 32)
    program = graphquant.export(model, args)
    traced = graphquant.torchscript(program)
    assert torch.equal(traced(*args), program.module()(*args))


def test_a_dynamic_slice_is_followed() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, : x.shape[1] // 2])

    length = {1: 2 * Dim("half", min=2, max=32)}
    program = graphquant.export(
        Half().eval(), (torch.randn(2, 8, 32),), dynamic_shapes={"x": length}
    )
    x = torch.randn(2, 20, 32)
    got = graphquant.torchscript(program)(x)
    assert got.shape == (2, 10, 32)
    assert torch.equal(got, program.module()(x))


def test_an_argument_that_is_no_tensor_is_refused() -> None:
    model = Model(lambda m, x, scale: m.fc(x) * scale, fc=nn.Linear(32, 32))
    program = graphquant.export(model, (torch.randn(3, 32), 2.0))
    with pytest.raises(UnsupportedInputError, match=r"takes only tensors, but .* is float"):
        graphquant.torchscript(program)
