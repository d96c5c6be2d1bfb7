"""What kernels and tiles are chosen by."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """A card, as far as kernels care."""

    sm: int  # compute capability times ten: 80, 90, 100
    processors: int  # streaming multiprocessors
    shared: int  # bytes of shared memory that one program may have


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # Triton's interpreter, in tests
        return Chip(90, 132, 232_448)
    of = torch.cuda.get_device_properties(device)
    shared = of.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Chip(of.major * 10 + of.minor, of.multi_processor_count, shared)
