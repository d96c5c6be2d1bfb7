"""Rows held in registers, or read and activated twice where they are too long."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.act_quantize.op import act_quantize
from graphquant.ops.triton_rows import launch_quantize_rows


@act_quantize.kernel("triton")
def act_quantize_triton(
    x: Tensor,
    act: str,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    launch_quantize_rows(x, None, act, factor, low, high, clip, out)
