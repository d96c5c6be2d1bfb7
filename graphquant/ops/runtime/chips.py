"""What is known of kinds of GPUs: peak throughputs, and on which of them graphquant has run.

docs/hardware.md has the sources of the numbers. Choices are made by measuring, not by this table:
`python -m graphquant doctor` and the notes of a report say what it leads one to expect.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from graphquant.ops.runtime.device import gpu_properties

OLDEST = 80  # compute capability times ten; older GPUs lack instructions that the kernels use
COMPILED = (80, 86, 89, 90, 100, 103, 120)  # by tests/ops/test_offline_compile.py
RAN = {90: "an H200"}  # where all tests have run


@dataclass(frozen=True)
class Gpu:
    """A GPU and its vendor's peaks: dense products with tensor cores, in 10^12 operations a second.

    fp8        sums in float32; None: it has no such products
    bandwidth  of its memory, TB/s
    """

    name: str
    sm: int
    bf16: float
    fp8: float | None
    int8: float
    bandwidth: float


GPUS = (
    Gpu("A100 80GB SXM", 80, 312, None, 624, 2.04),
    Gpu("A10", 86, 125, None, 250, 0.6),
    Gpu("L4", 89, 121, 242, 242, 0.3),
    Gpu("L40S", 89, 362, 733, 733, 0.864),
    Gpu("RTX 4090", 89, 165, 330, 661, 1.01),
    Gpu("H100 SXM", 90, 989, 1979, 1979, 3.35),
    Gpu("H200 SXM", 90, 989, 1979, 1979, 4.8),
    Gpu("B200", 100, 2250, 4500, 4500, 7.7),
    Gpu("B300", 103, 2250, 4500, 150, 7.7),
    Gpu("GB300", 103, 2500, 5000, 165, 8.0),
    Gpu("RTX 5090", 120, 209, 419, 838, 1.79),
)


def too_old(device: torch.device) -> str | None:
    """Why graphquant's kernels cannot run on this GPU, or None. (None without a GPU.)"""
    if not torch.cuda.is_available():
        return None
    sm = gpu_properties(device).sm
    return None if sm >= OLDEST else f"the GPU is sm_{sm}, {never_ran(sm)}"


@functools.cache
def slow_int8(sm: int) -> str | None:
    """What is known against int8 on such a GPU, or None."""
    slow = [gpu for gpu in GPUS if gpu.sm == sm and gpu.int8 < gpu.bf16]
    if not slow:
        return None
    gpu = slow[0]
    parts = {"fp8": gpu.fp8, "bfloat16": gpu.bf16}
    shares = [f"1/{of / gpu.int8:.0f} of {name}'s" for name, of in parts.items() if of]
    names = ", ".join(g.name for g in slow)
    return f"int8 tensor cores of sm_{sm} ({names}) have {' and '.join(shares)} throughput"


def never_ran(sm: int) -> str | None:
    """That graphquant has not been run on such a GPU, and what else is known; None if it has."""
    if sm in RAN:
        return None
    if sm < OLDEST:
        return f"graphquant's kernels need sm_{OLDEST} or later"
    if sm in COMPILED:
        return f"graphquant's kernels compile for sm_{sm}, but were never run on such a GPU"
    return f"graphquant's kernels were never compiled for sm_{sm}, nor run on such a GPU"
