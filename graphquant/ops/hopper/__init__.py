"""What the CUDA C++ kernels for Hopper (sm_90a) have in common: headers, and how one is compiled.

ptx.cuh has the instructions that C++ has no functions for, wgmma.cuh and wgmma.py the warp group's
matrix multiplication, softmax.cuh the online softmax, smem.cuh the layout of shared memory.
attention.cu is a kernel of two ops.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from graphquant.ops.hopper.wgmma import HEADER
from graphquant.ops.runtime import nvrtc

SM = 90  # compute capability times ten: the instructions are Hopper's own
SHARED = 232_448  # bytes of shared memory that one CTA may have
DTYPES = {"none": "NONE", "bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}  # of ptx.cuh


def compile_kernel(source: Path, defines: Mapping[str, object], shapes: str) -> bytes:
    """The cubin of a CUDA source; `shapes` is what wgmma.py writes for it.

    Raises KernelBuildError with NVRTC's log.
    """
    headers = {**_headers(), HEADER: shapes}
    return nvrtc.compile_cubin(source.read_text(), defines, f"sm_{SM}a", headers)


@functools.cache
def _headers() -> dict[str, str]:
    """By the names under which the sources include them: nvcc finds them with -I graphquant/ops."""
    return {f"hopper/{f.name}": f.read_text() for f in sorted(Path(__file__).parent.glob("*.cuh"))}
