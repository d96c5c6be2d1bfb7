"""Specializations of attention.cu, for the ops varlen_attention and attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from graphquant.ops.hopper import DTYPES, compile_kernel
from graphquant.ops.hopper.wgmma import shapes, wgmma_rs, wgmma_ss
from graphquant.ops.runtime.launch import native

LOG2_E = 1.4426950408889634
TILE = 64  # rows of q, k and v that are multiplied at a time
MAX_KEYS = 4096  # of a mask
WIDEST = 128  # head
STAGES = 4
COLUMNS, BOX = 64, 8  # of a head, and rows, that TMA loads at a time
KEYS = (16, 32, 48, TILE)  # that are multiplied at a time: the first block may be narrow
PTX_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Variant:
    """One specialization of attention.cu, whose head explains the macros."""

    D: int
    dtype: torch.dtype
    causal: bool = False
    window: bool = False
    bias: torch.dtype | None = None
    padded: bool = False
    key_mask: bool = False
    bias_pairs: bool = False

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "attention_padded_hopper" if self.padded else "varlen_attention_hopper"

    @property
    def teams(self) -> int:
        """Of a CTA: two, if registers and shared memory suffice."""
        narrow = self.bias is None or (self.padded and self.bias.itemsize == 2)
        return 2 if self.D <= 64 and narrow else 1

    @property
    def threads(self) -> int:
        return 128 * (2 * self.teams + 1)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory, in the order in which the kernel lays them out."""
        tile = -(-self.D // 64) * 64 * 2 * TILE
        positions = 4 * TILE * (4 + STAGES)
        team = tile * (4 + 2 * STAGES) + positions + 2 * 16 + 8 * (4 + 4 * STAGES)
        return 1024 * (1 + self.teams * -(-team // 1024))

    def defines(self) -> dict[str, int | str]:
        """Macros that specialize attention.cu."""
        return {
            "D": self.D,
            "TEAMS": self.teams,
            "STAGES": STAGES,
            "DTYPE": _dtype(self.dtype),
            "CAUSAL": int(self.causal),
            "WINDOW": int(self.window),
            "BIAS": _dtype(self.bias),
            "PADDED": int(self.padded),
            "KEY_MASK": int(self.key_mask),
            "BIAS_PAIRS": int(self.bias_pairs),
            "SHARED_BYTES": self.shared,
        }

    def cubin(self) -> bytes:
        """The compiled kernel."""
        ptx = PTX_NAMES[self.dtype]
        scores = (wgmma_ss(n, ptx) for n in KEYS)
        products = shapes(*scores, wgmma_rs(self.D, ptx))
        return compile_kernel(Path(__file__).with_suffix(".cu"), self.defines(), products)


@functools.cache
def function(variant: Variant, device: torch.device) -> int:
    """The handle of a loaded specialization. `device`: each has functions of its own."""
    code = variant.cubin()
    with torch.cuda.device(device):
        loaded: int = native().load(device.index, code, variant.entry, variant.shared)
    return loaded


def _dtype(dtype: torch.dtype | None) -> str:
    return DTYPES[str(dtype or "none").removeprefix("torch.")]
