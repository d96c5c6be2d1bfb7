"""hopper.cu on sm_90a: compiled by NVRTC for the tile and types at hand, cached, launched.

Rows of xq, wq, residual and y must start at multiples of 16 bytes, for the tensor memory
accelerator. It fills with zeros what lies outside, so any M, N and K are right.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from graphquant.ops.hopper import compile_kernel
from graphquant.ops.int8_linear import hopper_tiles
from graphquant.ops.int8_linear.hopper_tiles import Descriptor, HopperTile
from graphquant.ops.int8_linear.tiled import Operands, Problem, Tiled, tiled
from graphquant.ops.numerics import ALIGN, row_stride
from graphquant.ops.runtime import nvrtc
from graphquant.ops.runtime.device import gpu_properties
from graphquant.ops.runtime.launch import MAP_SWIZZLES, MAP_TYPES, Param, launch, native

MATRICES = ("xq", "wq", "residual")
ONLY = 90  # its instructions are Hopper's own


def _refuses(o: Operands, dtype: torch.dtype) -> str | None:
    sm = gpu_properties(o.xq.device).sm
    if o.xq.device.type != "cuda" or sm != ONLY:
        return f"the device is sm_{sm}, this one is for sm_{ONLY} alone"
    if (why := nvrtc.missing()) is not None:
        return why
    if o.residual is not None and o.residual.dtype != dtype:
        return f"residual is {o.residual.dtype}, the result {dtype}"
    if o.wq.shape[0] * dtype.itemsize % ALIGN:
        return f"{o.wq.shape[0]} columns of {dtype} are no multiple of {ALIGN} bytes"
    for name, tensor in o._asdict().items():
        if tensor is None:
            continue
        if tensor.data_ptr() % ALIGN:
            return f"{name} does not start at a multiple of {ALIGN} bytes"
        if name not in MATRICES:
            if not tensor.is_contiguous():
                return f"{name} is not contiguous"
            continue
        row = row_stride(tensor)
        if row is None or row < tensor.shape[-1] or row * tensor.itemsize % ALIGN:
            return f"{name} with strides {tuple(tensor.stride())} is not rows at multiples of 16"
    return None


def _tiles(problem: Problem, device: torch.device) -> tuple[HopperTile, ...]:
    """All tiles, the one predicted to be the fastest first."""
    p, num_sms = problem, gpu_properties(device).num_sms
    return hopper_tiles.candidates(p.M, p.N, p.K, num_sms, p.residual, p.dtype.itemsize)


def _name(of: Tensor | torch.dtype | None) -> str:
    """As hopper_tiles spells types."""
    if of is None:
        return "none"
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")


def cubin(tile: HopperTile, y: str, bias: str, residual: bool, num_rows: bool = False) -> bytes:
    """The kernel for these types of y and bias, with or without a residual and num_rows."""
    source = Path(__file__).with_suffix(".cu")
    return compile_kernel(source, tile.defines(y, bias, residual, num_rows), tile.wgmma_shapes())


@functools.cache
def _function(
    tile: HopperTile, y: str, bias: str, residual: bool, num_rows: bool, device: torch.device
) -> int:
    """The handle of a loaded specialization. `device`: each has functions of its own."""
    code = cubin(tile, y, bias, residual, num_rows)
    with torch.cuda.device(device):
        function: int = native().load(device.index, code, "int8_linear_hopper", tile.shared)
    return function


def _run(tile: HopperTile, o: Operands, y: Tensor) -> None:
    N, K = o.wq.shape
    M, device = o.xq.numel() // K, o.xq.device
    maps = hopper_tiles.descriptors(tile, M, N, K, _name(y))
    matrices = (o.xq, o.wq, y, y if o.residual is None else o.residual)
    vectors = (o.x_scale, o.x_shift, o.w_scale, o.w_sum)
    given = (o.residual is not None, o.num_rows is not None)
    launch(
        _function(tile, _name(y), _name(o.bias), *given, device),
        tile.grid(M, N, gpu_properties(device).num_sms),
        tile.threads,
        tile.shared,
        (
            *(_map(d, t) for d, t in zip(maps, matrices, strict=True)),
            *(("pointer", v) for v in vectors),
            ("null",) if o.bias is None else ("pointer", o.bias),
            *(("i32", n) for n in (M, N, *tile.cover(M, N, K))),
            *(() if o.num_rows is None else (("pointer", o.num_rows),)),
        ),
        pdl=True,
    )


def _map(d: Descriptor, of: Tensor) -> Param:
    row = row_stride(of)
    assert row is not None
    return (
        "map", of, MAP_TYPES[getattr(torch, d.dtype)], (d.columns, d.rows), (row * of.itemsize,),
        (d.box_columns, d.box_rows), MAP_SWIZZLES[d.swizzle],
    )  # fmt: skip


tiled("hopper", Tiled(_refuses, _tiles, _run))
