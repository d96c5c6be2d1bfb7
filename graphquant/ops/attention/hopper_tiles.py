"""Tiles of hopper.cu, and how to launch them.

One launch, in the order of the kernel's arguments (11 in all, see the head of hopper.cu):

    four CUtensorMap: q, k, v, y (`box` has the tokens of a box)
    S, *tile.cover(B, H, S, T)      int32: S, first_keys, kv_blocks, query_tiles, heads, tiles
    scale * log2(e)                 float32

    grid (tile.grid(...), 1, 1), block (tile.threads, 1, 1), tile.shared(D) bytes
"""

from __future__ import annotations

from dataclasses import dataclass

from graphquant.ops.hopper import DTYPES
from graphquant.ops.hopper.wgmma import shapes, wgmma_rs, wgmma_ss

ONLY = 90  # sm: its instructions are Hopper's own
PART = 64  # columns of a head in a box: the 128 bytes of the swizzle
ROWS = 64  # queries of a consumer
STORED = 16  # rows of y that one warp stores
SHARED = 232_448  # bytes of shared memory that one block may have
WIDEST = 128  # head
PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}
REGISTERS = {2: 176, 3: 116, 4: 84}  # of a thread, for what products read and write, by consumers


@dataclass(frozen=True)
class HopperTile:
    """One specialization of hopper.cu, whose head explains the fields."""

    groups: int
    n: int
    stages: int = 2

    @property
    def m(self) -> int:
        """Queries of a tile."""
        return self.groups * ROWS

    def refuses(self, D: int) -> str | None:
        """Why heads of D columns do not fit, or None."""
        if D % 8 or D > WIDEST:
            return f"heads of {D}: needs a multiple of 8 up to {WIDEST}"
        # scores, probabilities and part of y of a thread: with more, ptxas finds no room for wgmma
        width = D if self.groups == 4 else _sixteens(D)
        if self.n * 3 // 4 + width // 2 > REGISTERS[self.groups]:
            return f"heads of {D} do not fit the registers"
        return None

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    def shared(self, D: int) -> int:
        """Bytes of dynamic shared memory, in the order in which the kernel lays them out."""
        row = -(-D // PART) * 2 * PART
        barriers = 8 * (4 + 4 * self.stages)
        return 1024 + (2 * self.m + 2 * self.stages * self.n) * row + barriers

    def first(self, T: int) -> int:
        """Keys of the first block, the one that may be narrow."""
        return (T - 1) % self.n + 1

    def defines(self, T: int, D: int, dtype: str) -> dict[str, int | str]:
        """Macros that specialize hopper.cu; dtype is a key of PTX_NAMES."""
        keys = self.first(T)
        return {
            "GROUPS": self.groups,
            "BN": self.n,
            "FIRST": _sixteens(keys),
            "MASKED": int(keys % 16 != 0),
            "D": D,
            "STAGES": self.stages,
            "DTYPE": DTYPES[dtype],
            "SHARED_BYTES": self.shared(D),
        }

    def wgmma_shapes(self, T: int, D: int, dtype: str) -> str:
        """The wgmma instructions that the kernel needs; dtype is a key of PTX_NAMES."""
        ptx = PTX_NAMES[dtype]
        scores = (wgmma_ss(n, ptx) for n in (_sixteens(self.first(T)), self.n))
        return shapes(*scores, wgmma_rs(D, ptx))

    def cover(self, B: int, H: int, S: int, T: int) -> tuple[int, int, int, int, int]:
        """The kernel's `first_keys`, `kv_blocks`, `query_tiles`, `heads` and `tiles`."""
        keys, down = self.first(T), -(-S // self.m)
        return keys, (T - keys) // self.n, down, H, down * H * B

    def grid(self, B: int, H: int, S: int, num_sms: int) -> int:
        """Blocks to launch: no more than run at once, each takes several tiles."""
        return min(-(-S // self.m) * H * B, num_sms)


def _sixteens(n: int) -> int:
    return -(-n // 16) * 16


# For each encoder's shape one of these was the best of all that were tried on an H200 (2026-11-25,
# and 256x64 for heads of 72 on 2026-12-01).
_OFFERED = (
    *(HopperTile(3, n) for n in (96, 112)),
    *(HopperTile(2, n) for n in (128, 160, 192)),
    HopperTile(4, 64, stages=3),
)
TILES = {f"{tile.m}x{tile.n}": tile for tile in _OFFERED}
# The tile of hopper_padded.py, which takes what those do not, and was faster than all of them for
# heads of 64 columns (2026-12-01).
MASKED = "64x64"
