"""CPU kernel of quantize (cpu.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.qparams import QParams
from graphquant.ops.quantize.op import quantize


def _refuses(
    x: Tensor, up: Tensor | None = None, act: str | None = None, *qparams: Any
) -> str | None:
    return cpu.no_activation(act)


@quantize.cpu_kernel("quantize", refuses=_refuses, rows=("x", "up"))
def arguments(
    x: Tensor, up: Tensor | None, act: str | None, *qparams: Any, out: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    given = QParams(*qparams)
    return (
        *(*cpu.rows(x, given.num_rows), x.shape[-1], cpu.activation(act)),
        *cpu.matrix(x),
        *cpu.matrix(up),
        *cpu.qparams(given),
        *cpu.quantized(*out),
    )
