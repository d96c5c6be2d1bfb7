"""Rows held in registers, or read and activated twice where they are too long."""

from __future__ import annotations

from torch import Tensor

from graphquant.ops.glu_quantize.op import glu_quantize
from graphquant.ops.triton_rows import launch_quantize_rows


@glu_quantize.kernel("triton")
def glu_quantize_triton(
    gate: Tensor,
    up: Tensor,
    act: str,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    launch_quantize_rows(gate, up, act, factor, low, high, clip, out)
