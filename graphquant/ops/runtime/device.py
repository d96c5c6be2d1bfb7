"""Properties of GPUs by which kernels and tiles are chosen, and the name of the processor."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class GpuProperties:
    sm: int  # compute capability times ten: 80, 90, 100
    num_sms: int  # streaming multiprocessors
    shared: int  # bytes of shared memory per CTA, with opt-in


@functools.cache
def gpu_properties(device: torch.device) -> GpuProperties:
    """Properties of a GPU; for the CPU those of an H200, for tests in Triton's interpreter."""
    if device.type == "cpu":
        return GpuProperties(90, 132, 232_448)
    of = torch.cuda.get_device_properties(device)
    shared = of.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return GpuProperties(of.major * 10 + of.minor, of.multi_processor_count, shared)


@functools.cache
def processor() -> str:
    """The name of this machine's processor, as its vendor writes it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
