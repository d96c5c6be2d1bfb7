"""graphquant.lowering.aoti: our ops as launches of Triton kernels, which AOTInductor compiles.

Here without a GPU, up to the launches that Inductor gets; test_aoti.py makes and runs packages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from graphquant.lowering.aoti import decompose_attention
from tests.processes import ROOT

pytest.importorskip("triton")

Launches = list[dict[str, Any]]


@pytest.fixture(scope="module")
def launches() -> dict[str, Launches]:
    """What tests/lowering/packaging.py prints."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.packaging"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # what a kernel writes was found by reading it, not taken to be everything
    assert "assuming every input is mutated" not in done.stderr
    found: dict[str, Launches] = json.loads(done.stdout.splitlines()[-1])
    return found


def kernels(launches: Launches) -> list[str]:
    return [launch["kernel"] for launch in launches]


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_every_op_is_one_launch_that_writes_its_results_and_nothing_else(
    launches: dict[str, Launches], sizes: str
) -> None:
    linear = "int8_linear_tma_kernel"
    mlp, gated = launches[f"mlp {sizes}"], launches[f"gated {sizes}"]
    assert kernels(mlp) == ["norm_quantize_kernel", linear, "quantize_rows_kernel", linear]
    assert [launch["written"] for launch in mlp] == [4, 1, 3, 1]
    assert kernels(gated) == ["quantize_rows_kernel", linear] * 2
    assert [launch["written"] for launch in gated] == [3, 1, 3, 1]


def test_dynamic_sizes_are_followed(launches: dict[str, Launches]) -> None:
    static, dynamic = launches["mlp static"], launches["mlp dynamic"]
    assert [launch["numbers"]["M"] for launch in static] == ["46"] * 4
    (rows,) = {launch["numbers"]["M"] for launch in dynamic}
    assert re.fullmatch(r"s\d+\*s\d+", rows)
    for one, other in zip(static, dynamic, strict=True):
        assert one["grid"][0].isdecimal() and rows in other["grid"][0]
        # tiles and settings are those of the size that it was traced with
        assert {**one["numbers"], "M": rows} == other["numbers"]
        assert one["warps"] == other["warps"]


def test_descriptors_are_of_whole_buffers(launches: dict[str, Launches]) -> None:
    """Pads of xq are among its columns; those of wq are not, so that they meet zeros."""
    _, first, _, second = launches["mlp static"]
    assert first["blocks"] == {
        "x_desc": ["46", "64"],
        "w_desc": ["128", "64"],
        "y_desc": ["46", "128"],
    }
    assert second["blocks"]["x_desc"] == ["46", "128"]
    _, first, _, second = launches["gated static"]
    assert first["blocks"] == {"x_desc": ["46", "64"], "w_desc": ["76", "60"]}
    assert second["blocks"] == {"x_desc": ["46", "48"], "w_desc": ["27", "38"]}
    assert first["numbers"]["K"] == "60" and first["numbers"]["y_desc"] == "None"


def test_the_arguments_of_the_op_arrive(launches: dict[str, Launches]) -> None:
    norm, _, act, second = launches["mlp static"]
    assert norm["numbers"]["eps"] == "1e-05" and norm["numbers"]["RMS"] == "False"
    assert (act["numbers"]["ACT"], act["numbers"]["clip"]) == ("gelu", "2.0")
    assert act["numbers"]["OVERLAP"] == "False", "a package launches one kernel after the other"
    assert "residual_ptr" not in second["numbers"] and second["numbers"]["bias_ptr"] == "None"
    assert norm["warps"] == 2


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_the_number_of_rows_arrives_as_a_tensor_that_is_read(
    launches: dict[str, Launches], sizes: str
) -> None:
    counted = launches[f"counted {sizes}"]
    linear = "int8_linear_tma_kernel"
    assert kernels(counted) == ["norm_quantize_kernel", linear, "quantize_rows_kernel", linear]
    assert [launch["written"] for launch in counted] == [3, 1, 3, 1]
    assert not any("num_rows_ptr" in launch["numbers"] for launch in counted)
    without = launches[f"mlp {sizes}"]
    assert all(launch["numbers"]["num_rows_ptr"] == "None" for launch in without)


def test_rows_are_copied_if_their_distance_is_a_symbol(launches: dict[str, Launches]) -> None:
    """The kernel is compiled for what divides it."""
    static, dynamic = (launches[f"first {sizes}"][0]["numbers"] for sizes in ("static", "dynamic"))
    assert int(static["x_row"]) * int(static["X_UNIT"]) == 23 * 64
    assert int(dynamic["x_row"]) * int(dynamic["X_UNIT"]) == 64


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_rows_are_copied_if_they_are_none_in_memory(
    launches: dict[str, Launches], sizes: str
) -> None:
    assert kernels(launches[f"transposed {sizes}"]) == [
        "quantize_rows_kernel",
        "int8_linear_tma_kernel",
    ]


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_a_part_of_a_buffer_has_the_kernel_that_takes_pointers(
    launches: dict[str, Launches], sizes: str
) -> None:
    (launch,) = [k for k in launches[f"part {sizes}"] if k["kernel"] != "aten.view.dtype"]
    assert launch["kernel"] == "int8_linear_kernel"
    assert launch["numbers"]["x_row"] == "128" and launch["written"] == 1


def test_attention_is_torchs_in_packages_for_cuda_alone() -> None:
    with FakeTensorMode():
        for device, aot in (("cuda", True), ("cuda", False), ("cpu", True)):
            q, k, v = (torch.empty(2, 4, 16, 72, device=device) for _ in "qkv")
            mask = torch.ones(2, 16, dtype=torch.bool, device=device)
            bias = torch.empty(1, 4, 16, 16, device=device)
            for more in (("128x128",), ("64x64", mask, True, 3, bias), ("64x64", None, False, 3)):
                with V.set_aot_compilation(aot):
                    y = decompose_attention(q, k, v, 0.125, *more)
                if (device, aot) != ("cuda", True):
                    assert y is NotImplemented
                    continue
                assert (y.shape, y.dtype, y.device.type) == (q.shape, q.dtype, "cuda")
                assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_attention_of_packed_sequences_is_two_launches(
    launches: dict[str, Launches], sizes: str
) -> None:
    index, attention = launches[f"packed {sizes}"]
    assert (index["kernel"], index["written"]) == ("token_index_kernel", 6)
    assert (attention["kernel"], attention["written"]) == ("varlen_attention_kernel", 1)
    assert ("//64" in attention["grid"][0]) == (sizes == "dynamic")
    assert attention["numbers"]["window"] == "9" and attention["numbers"]["GROUP"] == "1"
