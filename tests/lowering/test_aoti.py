"""AOTInductor's packages: with our Triton kernels on CUDA, with our ops in Python on a CPU, and
without them in C++ alone.

`pytest --device cuda` makes and runs the same packages on a GPU. torch needs a C++ compiler for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.cpp_extension import include_paths, library_paths

import graphquant
from graphquant.exporters.standalone import PRODUCTS
from graphquant.ops import OPS, int8_linear, norm_quantize_keep, quantize
from tests import zoo
from tests.models import relative
from tests.processes import ROOT, WITHOUT, in_a_new_process
from tests.small import Mlp, seeded

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="NOT RUN: needs g++")

EXAMPLE = ROOT / "examples" / "aoti"
# Inductor's code rounds the same arithmetic elsewhere: a few values fall one int8 step aside. One
# step in a row of 60 normal values, which span five sigma, is 5 / 254 / sqrt(60) = 0.3 % of it.
NEAR = 3e-3


@dataclass
class Packages:
    """One model twice, some input in another size than it was exported with, and the results."""

    ops: Path  # with graphquant's ops
    alone: Path  # without
    x: Path
    want: Tensor
    folder: Path


class Normed(nn.Module):
    """All kinds of calls: a norm that is also the result, an activation, a residual; K = 60 and 76,
    whose int8 rows are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(60, 76)
        self.norm = nn.LayerNorm(60)
        self.head = nn.Linear(60, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x + self.mlp(x))
        return y, self.head(y)


def compiled(program: ExportedProgram, path: Path) -> Path:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, device: str) -> Packages:
    folder = tmp_path_factory.mktemp("aoti")
    model = seeded(Normed).eval().to(device)
    example = torch.randn(7, 60, device=device)
    program = graphquant.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
    x = torch.randn(19, 60)
    torch.save(x, folder / "x.pt")
    with torch.no_grad():
        want = torch.cat(program.module()(x.to(device)), -1).cpu()
    return Packages(
        compiled(program, folder / "ops.pt2"),
        compiled(graphquant.standalone(program, products="int8"), folder / "alone.pt2"),
        folder / "x.pt",
        want,
        folder,
    )


RUN = """
import sys, torch
package, device, x, results = sys.argv[1:]
results_ = torch._inductor.aoti_load_package(package)(torch.load(x).to(device))
torch.save(tuple(r.cpu() for r in results_), results)
"""


def ran(packages: Packages, package: Path, device: str, code: str) -> Tensor:
    """The results of a package in a new process."""
    results = packages.folder / "results.pt"
    results.unlink(missing_ok=True)
    done = in_a_new_process(code, package, device, packages.x, results)
    assert done.returncode == 0, done.stderr
    return torch.cat(torch.load(results), -1)


def test_a_package_runs_in_a_new_process_that_has_imported_graphquant(
    packages: Packages, device: str
) -> None:
    got = ran(packages, packages.ops, device, "import graphquant" + RUN)
    assert relative(got, packages.want) < NEAR


def test_without_graphquant_torch_names_the_op_unless_the_kernels_are_in_the_package(
    packages: Packages, device: str
) -> None:
    if device == "cuda":
        assert relative(ran(packages, packages.ops, device, WITHOUT + RUN), packages.want) < NEAR
        return
    done = in_a_new_process(WITHOUT + RUN, packages.ops, device, packages.x, packages.folder / "no")
    assert done.returncode
    assert "Could not find schema for graphquant::norm_quantize" in done.stderr


def test_calls_in_a_package_hand_over_no_dtype(packages: Packages, device: str) -> None:
    with zipfile.ZipFile(packages.ops) as archive:
        listed = [n for n in archive.namelist() if n.endswith("wrapper.json")]
        calls = "".join(archive.read(n).decode() for n in listed)
    if device == "cuda":
        assert "graphquant::" not in calls
        return
    assert {"graphquant::int8_linear.float32", "graphquant::norm_quantize_keep.float32"} <= {
        node["node"]["target"] for node in json.loads(calls)["nodes"]
    }
    assert "as_scalar_type" not in calls  # torch 2.11 reads float64 where float32 was written


def test_a_standalone_package_runs_where_graphquant_is_not(packages: Packages, device: str) -> None:
    got = ran(packages, packages.alone, device, WITHOUT + RUN)
    assert relative(got, packages.want) < NEAR


def test_products_in_a_standalone_package_are_torchs_of_int8(
    packages: Packages, device: str
) -> None:
    with zipfile.ZipFile(packages.alone) as archive:
        listed = [n for n in archive.namelist() if n.endswith("wrapper.cpp")]
        code = "".join(archive.read(n).decode() for n in listed)
    assert f"aoti_torch_{device}__int_mm_out" in code
    assert f"aoti_torch_{device}_mm_out" not in code


# A C++ program ----------------------------------------------------------------------------------


def built_by_gxx(folder: Path, device: str) -> Path:
    """examples/aoti/main.cpp, against the libtorch that torch's wheel brings."""
    program = folder / "run"
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    if device == "cuda":
        libraries += ["-ltorch_cuda", "-lc10_cuda"]
    subprocess.run(
        [
            *("g++", "-std=c++20", EXAMPLE / "main.cpp", "-o", program),
            *(f"-I{path}" for path in include_paths()),
            *(f"-L{path}" for path in library_paths()),
            *(f"-Wl,-rpath,{path}" for path in library_paths()),
            # what torch's CUDA libraries need in turn lies in other wheels
            *("-Wl,--no-as-needed", "-Wl,--unresolved-symbols=ignore-in-shared-libs"),
            *libraries,
        ],
        check=True,
        timeout=300,
    )
    return program


def built_by_cmake(folder: Path, device: str) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("NOT RUN: needs cmake")
    build = folder / "build"
    torchs = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", build, torchs], check=True, timeout=300)
    subprocess.run(["cmake", "--build", build], check=True, timeout=300)
    return build / "run"


@pytest.mark.parametrize(
    "build", [built_by_gxx, pytest.param(built_by_cmake, marks=pytest.mark.slow)]
)
def test_a_package_runs_without_python(
    packages: Packages, device: str, build: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    program, results = build(tmp_path, device), tmp_path / "results.pt"
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in linked.splitlines()]
    assert "libtorch_cpu.so" in names and not any("python" in name for name in names)
    # no Python can be found, and no compiler
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTHON")} | {"PATH": ""}
    words = [program, packages.alone, results, packages.x]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[19, 60] float\n[19, 24] float\n"
    assert relative(torch.cat(torch.load(results), -1), packages.want) < NEAR

    words[1] = packages.ops
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    if device == "cuda":
        assert done.returncode == 0, done.stderr
        assert relative(torch.cat(torch.load(results), -1), packages.want) < NEAR
    else:
        assert done.returncode
        assert "Could not find schema for graphquant::norm_quantize" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip", "bert", "dinov2_swiglu"])
def test_whole_encoders_in_packages(name: str, device: str, tmp_path: Path) -> None:
    entry = zoo.SMALL[name]
    model = entry.build("sdpa").to(device)

    def inputs(batch: int) -> Any:
        args, kwargs = entry.inputs(batch)
        return [a.to(device) for a in args], {n: v.to(device) for n, v in kwargs.items()}

    args, kwargs = inputs(2)
    batch = {0: Dim("batch")}
    sizes = tuple(batch for _ in args) if args else dict.fromkeys(kwargs, batch)
    program = graphquant.export(model, tuple(args), kwargs, dynamic_shapes=sizes)
    args, kwargs = inputs(5)
    with torch.no_grad():
        want = program.module()(*args, **kwargs)
    alone = [graphquant.standalone(program, products=how) for how in PRODUCTS]
    for made in (program, *alone):
        package = torch._inductor.aoti_load_package(str(compiled(made, tmp_path / "model.pt2")))
        got = package(*args, **kwargs)
        for field in ("last_hidden_state", "pooler_output"):
            # steps aside in one layer move what the next ones round
            assert relative(got[field], want[field]) < 5 * NEAR


# The calls in a package -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_overload_is_the_op_with_this_dtype(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(3, 40, device=device), torch.randn(16, 40, device=device)
    xq, x_scale, x_shift = quantize(x)
    calls: list[tuple[Any, list[Any]]] = [
        (norm_quantize_keep, [x, None, None, 1e-5, False, dtype, None, None, None, 2.0]),
        (norm_quantize_keep, [x, None, None, 1e-5, True, dtype]),
        (
            int8_linear,
            [xq, x_scale, x_shift, *torch.ops.graphquant.quantize_weight(w), None, None, dtype],
        ),
    ]
    for op, args in calls:
        overload, rest = op.typed(args)
        assert str(overload).endswith(str(dtype).removeprefix("torch."))
        assert dtype not in rest
        torch.testing.assert_close(overload(*rest), op(*args), rtol=0, atol=0)


def test_ops_without_a_dtype_have_one_overload() -> None:
    for op in OPS.values():
        typed = [o for o in op.target._overloadpacket.overloads() if o != "default"]
        assert typed == (
            ["float16", "bfloat16", "float32"] if "dtype" in str(op.target._schema) else []
        )
    x = torch.randn(3, 40)
    assert quantize.typed([x]) == (quantize.target, (x,))
