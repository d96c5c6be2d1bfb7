"""CPU kernels of norm_quantize and norm_quantize_keep (cpu.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.norm_quantize.op import norm_quantize, norm_quantize_keep
from graphquant.ops.qparams import QParams


@norm_quantize.cpu_kernel("norm_quantize", refuses=cpu.refuses, rows=("x",))
def arguments(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    *qparams: Any,
    out: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    return _arguments(x, gamma, beta, eps, rms, None, qparams, out)


@norm_quantize_keep.cpu_kernel("norm_quantize", refuses=cpu.refuses, rows=("x",))
def arguments_keep(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    *qparams: Any,
    out: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    return _arguments(x, gamma, beta, eps, rms, out[0], qparams, out[1:])


def _arguments(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    rms: bool,
    y: Tensor | None,
    qparams: tuple[Any, ...],
    triple: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    given = QParams(*qparams)
    return (
        *(*cpu.rows(x, given.num_rows), x.shape[-1], int(rms), eps),
        *cpu.matrix(x),
        *cpu.vector(gamma),
        *cpu.vector(beta),
        *cpu.matrix(y),
        *cpu.qparams(given),
        *cpu.quantized(*triple),
    )
