"""Every kernel compiles for every architecture, without spills; no GPU needed."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from graphquant.ops.int8_linear import tiles
from graphquant.ops.runtime.chips import COMPILED, GPUS, RAN
from graphquant.ops.runtime.device import GpuProperties
from graphquant.ops.triton_rows import row_config

# bytes one program may have: the table of technical specifications by compute capability in the
# CUDA C++ programming guide
SHARED = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376
}  # fmt: skip
# Bytes of stack: Triton 3.6 spills up to 216 in the epilogue of int8_linear's largest tile.
SPILT = 0 if version("triton") >= "3.7" else 256
# The Triton 3.7.1 of our pins spills up to 40 in attention over ragged text on sm_120.
SPILT_BY = {120: 64}


# `make test` compiles for Hopper alone
ARCHITECTURES = [pytest.param(sm, marks=[pytest.mark.slow] * (sm != 90)) for sm in COMPILED]


@functools.cache
def _compiled(sm: int) -> tuple[dict[str, Any], ...]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.offline", str(sm)],
        env=env, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return tuple(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(sm: int) -> None:
    kernels = _compiled(sm)
    assert len(kernels) > 20
    most = max(SPILT, SPILT_BY.get(sm, 0))
    assert not [k for k in kernels if k["stack"] > most or k["local"]]
    gpu = GpuProperties(sm, 100, SHARED[sm])
    not_offered = {
        str(tile)
        for table in (tiles.TMA, tiles.TMA_FLOAT32, tiles.POINTER)
        for tile in {*table} - {*tiles.fitting(table, gpu)}
    }
    offered = [k for k in kernels if not any(tile in k["name"] for tile in not_offered)]
    assert len(offered) > 20
    assert not [k for k in offered if k["shared"] > SHARED[sm]]


def test_what_is_said_of_a_gpu_names_every_one_that_is_compiled_for() -> None:
    assert set(COMPILED) == set(SHARED) >= {gpu.sm for gpu in GPUS}
    assert set(RAN) <= set(COMPILED)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_rows_meet_in_shared_memory_for_nothing_but_their_sums_and_ranges(sm: int) -> None:
    """No layout is converted there, which would cost more than the arithmetic. A warp's row needs
    none at all; of a row of W warps each gives two int32."""
    rows = [k for k in _compiled(sm) if k["name"].startswith(("rows", "norm"))]
    assert len(rows) > 10
    for k in rows:
        width = int(re.findall(r"\d+", k["name"])[0])
        inputs = 2 if k["name"].startswith(("rows glu", "rows product")) else 1
        warps = row_config(width, inputs)["LANES"] // 32
        most = 8 * warps if warps > 1 else 0
        assert k["shared"] <= most or k["name"] == "norm 20000 keep=True", k


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_order_of_a_rows_sums_does_not_depend_on_where_rows_start(sm: int) -> None:
    """Rows of one width have several alignments: in slices, and as one row of a larger tensor."""
    sums = [k["sums"] for k in _compiled(sm) if k["name"].startswith("sums")]
    assert len(sums) == 3 and len(sums[0]) == 2, "the mean and the variance"
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.parametrize(
    ("sm", "instruction"),
    [
        (90, "wgmma.mma_async"),
        *(
            pytest.param(sm, "mma.sync.aligned.m16n8k32", marks=pytest.mark.slow)
            for sm in COMPILED
            if sm != 90
        ),
    ],
)
def test_int8_linear_multiplies_int8_on_tensor_cores(sm: int, instruction: str) -> None:
    linears = [k for k in _compiled(sm) if k["name"].startswith(("pointer", "tma"))]
    assert linears
    for k in linears:
        assert k["mma"] and all(m.startswith(instruction) for m in k["mma"]), k
        assert all("s8.s8" in m for m in k["mma"]), k


def test_varlen_attention_multiplies_on_tensor_cores() -> None:
    found = [k for k in _compiled(90) if k["name"].startswith("varlen") and "bf16" in k["name"]]
    assert found
    for k in found:
        assert k["mma"] and all(m.startswith("wgmma.mma_async") for m in k["mma"]), k
