"""Triton kernels that read samples of many tensors, or compare them with earlier ones.

One program per tensor.

table  int64 [tensors, 3, SAMPLES]: addresses; values as int32; bytes per value, the same in all
       columns. The halves of 8-byte values are combined by exclusive or.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphquant.ops.runtime.launch import launch_triton


@triton.jit
def _read(row, SAMPLES: tl.constexpr):
    address = tl.load(row + tl.arange(0, SAMPLES))
    width = tl.load(row + 2 * SAMPLES)
    if width == 8:
        both = tl.load(address.to(tl.pointer_type(tl.int64)))
        value = (both ^ (both >> 32)).to(tl.int32)
    elif width == 4:
        value = tl.load(address.to(tl.pointer_type(tl.int32)))
    elif width == 2:
        value = tl.load(address.to(tl.pointer_type(tl.int16))).to(tl.int32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.int8))).to(tl.int32)
    return value


@triton.jit
def _gather(table, out, SAMPLES: tl.constexpr):
    tensor = tl.program_id(0).to(tl.int64)
    value = _read(table + tensor * 3 * SAMPLES, SAMPLES)
    tl.store(out + tensor * SAMPLES + tl.arange(0, SAMPLES), value)


@triton.jit
def _compare(table, flag, SAMPLES: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 3 * SAMPLES
    value = _read(row, SAMPLES)
    then = tl.load(row + SAMPLES + tl.arange(0, SAMPLES)).to(tl.int32)
    different = tl.sum((value != then).to(tl.int32), axis=0)
    tl.store(flag, 1, mask=different > 0)


def gather(table: Tensor, out: Tensor) -> None:
    """Write the current values to out [tensors, SAMPLES] int32."""
    launch_triton(_gather, (table.shape[0],), table, out, SAMPLES=table.shape[2], num_warps=1)


def compare(table: Tensor, flag: Tensor) -> None:
    """Set flag[0] = 1 if a value has changed, else write nothing. flag may be in pinned memory."""
    launch_triton(_compare, (table.shape[0],), table, flag, SAMPLES=table.shape[2], num_warps=1)
