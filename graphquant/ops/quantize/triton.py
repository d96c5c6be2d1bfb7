"""Rows held in registers, or read twice where they are too long."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.quantize.op import quantize
from graphquant.ops.triton_rows import launch_quantize_rows


@quantize.kernel("triton")
def quantize_triton(
    x: Tensor,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    launch_quantize_rows(x, None, "none", factor, low, high, clip, out)
