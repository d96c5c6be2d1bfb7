"""Rows held in registers, or read and activated twice where they are too long."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.act_quantize.op import act_quantize
from graphquant.ops.numerics import empty_triple
from graphquant.ops.triton_util import launch_quantize_rows


@act_quantize.kernel("triton")
def act_quantize_triton(x: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    xq, x_scale, x_shift = empty_triple(x, x.shape)
    launch_quantize_rows(x, None, act, xq, x_scale, x_shift)
    return xq, x_scale, x_shift
