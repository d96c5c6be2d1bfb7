"""Helpers of the Triton kernels: row strides, settings, programmatic dependent launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from graphquant._torch import FakeTensor
from graphquant.ops.numerics import ALIGN, row_stride
from graphquant.ops.runtime.device import gpu_properties


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x or a contiguous copy, row stride): base pointer and stride of [M, K] rows."""
    row = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if row is None else (x, row)


def misaligned(x: Tensor) -> int:
    """Bytes from the last multiple of ALIGN to x; 0 for a fake tensor, which has no address yet."""
    return 0 if isinstance(x, FakeTensor) else x.data_ptr() % ALIGN


def unit_of(row: int) -> int:
    """The largest power of two up to ALIGN that divides a row stride.

    Kernels take strides as (row // unit, unit: constexpr): the compiler then knows the alignment of
    rows whose stride is not a multiple of 16, and a new stride rarely needs a recompile.
    """
    return min(row & -row, ALIGN) or ALIGN


@functools.cache
def compiled_with(kernel: Any, warps: int, stages: int) -> Any:
    """The kernel, bound to these settings.

    With the defaults it is returned as it is: Inductor then recognizes two calls with descriptors
    as calls of one kernel, and compiles it once.
    """
    if (warps, stages) == (4, 3):
        return kernel
    return triton.autotune([triton.Config({}, num_warps=warps, num_stages=stages)], key=[])(kernel)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments for a kernel that begins with wait_for_inputs: from Hopper on, it is
    launched while the previous one runs (programmatic dependent launch), which saves 1 us."""
    if device.type == "cuda" and gpu_properties(device).sm >= 90:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the previous kernel has written its results, then allow the next one to start."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
