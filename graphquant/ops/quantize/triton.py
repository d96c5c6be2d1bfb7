"""Triton kernel of quantize: rows are held in registers, or read twice if too long."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops.qparams import QParams
from graphquant.ops.quantize.op import quantize
from graphquant.ops.triton_rows import launch_quantize_rows


@quantize.kernel("triton")
def quantize_triton(
    x: Tensor,
    up: Tensor | None = None,
    act: str | None = None,
    *qparams: Any,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    launch_quantize_rows(x, up, act, QParams(*qparams), out)
