"""CPU kernel of pack_weight (cpu.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphquant.ops import cpu
from graphquant.ops.pack_weight.op import pack_weight


@pack_weight.cpu_kernel("pack_weight", refuses=cpu.refuses, rows=("wq",))
def arguments(wq: Tensor, out: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (*wq.shape, cpu.stride(wq), wq, out[0])
