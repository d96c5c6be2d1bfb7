"""CPU kernel of int8_linear (cpu.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.int8_linear import onednn  # noqa: F401 for where this one refuses
from graphquant.ops.int8_linear.op import int8_linear
from graphquant.ops.pack_weight import is_packed


@int8_linear.cpu_kernel("int8_linear", refuses=cpu.refuses, rows=("xq", "wq", "residual"))
def arguments(
    xq: Tensor,
    x_scale: Tensor,
    x_shift: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    num_rows: Tensor | None = None,
    *,
    out: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    N, K = w_scale.shape[0], xq.shape[-1]
    bias_type, _, bias = cpu.vector(bias)
    return (
        *(*cpu.rows(xq, num_rows), N, K),
        *(cpu.stride(xq), xq, x_scale, x_shift),
        *(0 if is_packed(wq, N, K) else cpu.stride(wq), wq, w_scale, w_sum),
        *(bias_type, bias),
        *cpu.matrix(residual),
        *(cpu.TYPES[dtype], out[0]),
    )
