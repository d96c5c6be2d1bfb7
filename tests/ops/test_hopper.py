"""The Hopper kernel of int8_linear, as far as it can be tested without a GPU."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphquant.errors import KernelBuildError
from graphquant.ops.attention import hopper as attention_hopper
from graphquant.ops.int8_linear import hopper, hopper_tiles
from graphquant.ops.int8_linear.hopper_tiles import SHARED, TILES, HopperTile, choose, descriptors
from graphquant.ops.int8_linear.tiled import Operands, Problem, _random
from graphquant.ops.numerics import padded
from graphquant.ops.runtime.chips import COMPILED
from graphquant.ops.runtime.device import GpuProperties
from graphquant.ops.varlen_attention import hopper as varlen_hopper
from tests.ops.bounds import needs_nvrtc
from tests.ops.offline import CUOBJDUMP

CPU = torch.device("cpu")
PROCESSORS = 132
SPILLED = 48  # bytes: a constant or a few that are saved outside of the main loop
sizes = st.integers(1, 70_000)


@needs_nvrtc
@pytest.mark.parametrize(
    ("y", "bias", "num_rows"),
    [("bfloat16", "bfloat16", False), ("float32", "none", False), ("bfloat16", "float32", True)],
)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_compiles_to_int8_tensor_core_instructions(
    tile: HopperTile, y: str, bias: str, num_rows: bool, tmp_path: Path
) -> None:
    file = tmp_path / "tile.cubin"
    file.write_bytes(hopper.cubin(tile, y, bias, y == "bfloat16", num_rows))

    def said(what: str) -> str:
        command = [str(CUOBJDUMP), what, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = said("-res-usage")
    assert "int8_linear_hopper" in usage
    assert sum(map(int, re.findall(r"STACK:(\d+)", usage))) <= SPILLED
    assert sum(map(int, re.findall(r"REG:(\d+)", usage))) * tile.threads <= 65_536

    # What lies between a step's multiplications is issued beside the other consumer's epilogue.
    step = _instructions_between_multiplications(said("-sass"))
    assert "R2UR" not in step, "descriptors come from ordinary registers"


def _instructions_between_multiplications(sass: str) -> list[str]:
    """Names of the instructions from the first integer wgmma to the last, predicates left out."""
    at = r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9]+)"
    names = re.findall(at, sass, re.MULTILINE)
    first, last = names.index("IGMMA"), len(names) - names[::-1].index("IGMMA")
    return names[first:last]


def test_the_number_of_rows_is_one_argument_more_of_another_specialization(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it, the launch is what it would be if there were none."""
    launched: list[Any] = []
    monkeypatch.setattr(hopper, "launch", lambda *args, **options: launched.append(args))
    monkeypatch.setattr(hopper, "_function", lambda *key: key)
    o, y = _random(Problem(300, 128, 64, torch.bfloat16, None, True), CPU), torch.empty(300, 128)
    n = torch.tensor([7], dtype=torch.int32)
    for num_rows in (None, n):
        hopper._run(TILES[1], o._replace(num_rows=num_rows), y.bfloat16())
    (key, *shape, params), (key_n, *shape_n, params_n) = launched
    assert key == (TILES[1], "bfloat16", "none", True, False, CPU)
    assert key_n == (TILES[1], "bfloat16", "none", True, True, CPU) and shape_n == shape
    assert params_n[-1] == ("pointer", n) and len(params_n) == len(params) + 1
    assert params_n[4:-1] == params[4:] and len(params) == 15


@needs_nvrtc
@pytest.mark.parametrize("sm", [sm for sm in COMPILED if sm > hopper.ONLY])
def test_a_newer_gpu_cannot_compile_the_hopper_kernel_and_is_refused(
    sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its instructions exist on sm_90a only, so nothing else may ever be asked to compile it."""
    with monkeypatch.context() as there:
        there.setattr("graphquant.ops.hopper.SM", sm)
        with pytest.raises(KernelBuildError, match=f"sm_{sm}a"):
            hopper.cubin(TILES[0], "bfloat16", "none", residual=False)
    gpu = GpuProperties(sm, PROCESSORS, SHARED)
    for module in (hopper, attention_hopper, varlen_hopper):
        monkeypatch.setattr(module, "gpu_properties", lambda device: gpu)
    o = Operands(*(torch.empty(16, 16, device="meta"),) * 6, None, None, None)
    q = torch.empty(1, 1, 16, 64, device="meta")
    for refusal in (
        hopper._refuses(o, torch.bfloat16),
        attention_hopper.refuses_heads(q, q, q),
        varlen_hopper._refuses(q, q, q, None, None, None, 1.0, 16),
    ):
        assert refusal == f"the device is sm_{sm}, this one is for sm_90 alone"


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_tile_fits_the_shared_memory_of_a_cta(tile: HopperTile) -> None:
    assert tile.shared <= SHARED


@needs_nvrtc
def test_another_size_of_shared_memory_than_the_kernels_does_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HopperTile, "shared", TILES[0].shared + 8)
    with pytest.raises(KernelBuildError, match=r"static assertion failed.*hopper_tiles\.py"):
        hopper.cubin(TILES[0], "bfloat16", "none", residual=False)


@given(M=sizes, N=sizes, K=st.integers(1, 20_000), tile=st.sampled_from(TILES))
def test_the_tiles_of_a_launch_cover_the_result_and_the_sum(
    M: int, N: int, K: int, tile: HopperTile
) -> None:
    down, right, height, steps = tile.cover(M, N, K)
    assert (down - 1) * tile.m * tile.cluster_m < M <= down * tile.m * tile.cluster_m
    assert (right - 1) * tile.n * tile.cluster_n < N <= right * tile.n * tile.cluster_n
    assert steps * tile.split_k * hopper_tiles.BK >= K
    assert height >= 1
    grid = tile.grid(M, N, PROCESSORS)
    assert grid % tile.blocks == 0 and tile.blocks <= grid <= PROCESSORS


@given(M=sizes, N=sizes, K=st.integers(1, 20_000), y=st.sampled_from(["bfloat16", "float32"]))
def test_descriptors_end_where_the_matrices_end(M: int, N: int, K: int, y: str) -> None:
    """At the true K: what stands in the pads is not read."""
    x, w, result, residual = descriptors(TILES[0], M, N, K, y)
    assert (x.rows, x.columns, w.rows, w.columns) == (M, K, N, K)
    assert (result.rows, result.columns) == (M, N) and residual == result
    for d in (x, w):
        assert d.box_columns == d.swizzle == 128 and d.box_rows <= 256
    assert result.box_columns * (4 if y == "float32" else 2) == result.swizzle


@given(M=sizes, N=sizes, K=st.integers(1, 20_000), residual=st.booleans())
def test_the_choice_is_the_best_prediction(M: int, N: int, K: int, residual: bool) -> None:
    best = choose(M, N, K, PROCESSORS, residual)
    every = [hopper_tiles.predict(t, M, N, K, PROCESSORS, residual) for t in TILES]
    assert hopper_tiles.predict(best, M, N, K, PROCESSORS, residual) == min(every) > 0


@pytest.mark.parametrize(
    ("M", "N", "K", "us"),
    [
        (46_656, 3456, 1152, 265),
        (46_656, 4304, 1152, 345),
        (46_656, 1152, 4304, 329),
        (8192, 8192, 8192, 690),
        (729, 3456, 1152, 7.7),
        (128, 768, 768, 2.9),
    ],
)
def test_predictions_are_near_what_an_h200_took(M: int, N: int, K: int, us: float) -> None:
    tile = choose(M, N, K, PROCESSORS, False)
    assert hopper_tiles.predict(tile, M, N, K, PROCESSORS, False) == pytest.approx(us, rel=0.2)


def test_of_tiles_predicted_to_be_alike_the_one_without_clusters_is_taken() -> None:
    alone, pair = TILES[:2]
    assert pair == dataclasses.replace(alone, cluster_m=2) and alone.cluster_m == 1
    assert choose(46_656, 3456, 1152, PROCESSORS, False) == alone


def test_long_rows_are_padded_to_whole_steps() -> None:
    assert padded(4304) % hopper_tiles.BK == 0
