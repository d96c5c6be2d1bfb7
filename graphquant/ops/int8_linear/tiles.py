"""Tile shapes of the Triton kernels, chosen by M, N, K and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from graphquant.ops.runtime.device import GpuProperties


@dataclass(frozen=True)
class Tile:
    """[m, n] elements of the result per program, k elements of K per step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int  # pipelined steps

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the int8 tiles in flight take."""
        return (self.m + self.n) * self.k * self.stages

    def count(self, M: int, N: int) -> int:
        return (M + self.m - 1) // self.m * ((N + self.n - 1) // self.n)


GROUP = 8  # tiles down before one to the right
DEEP_K = 2048  # from this K on, epilogues are short beside main loops, and larger tiles win

# Largest first. On one H200 (2026-11-22): 128x128x128 with 4 warps and 3 stages is best at K near
# 1100, where two or three programs share an SM and one's epilogue hides behind another's
# main loop; 256x128x128 is best at K = 4304. The rows for small M are not measured yet.
TMA = (
    Tile(256, 128, 128, 8, 4),
    Tile(128, 128, 128, 4, 3),
    Tile(64, 128, 128, 4, 4),
    Tile(64, 64, 128, 4, 4),
)
# Heavier epilogues need more registers, and the tiles above would spill. Not measured yet.
TMA_FLOAT32 = (
    Tile(128, 128, 128, 8, 3),
    Tile(64, 128, 128, 8, 4),
    Tile(64, 64, 128, 4, 4),
)
TMA_ODD_N = TMA_FLOAT32[1:]  # rows of y are no multiple of 16 bytes: stored through pointers
# Not measured yet. 64 KiB and less: fits two programs on sm_80, one on sm_86, sm_89 and sm_120.
POINTER = (
    Tile(128, 128, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
)
SPARE = 2048  # bytes of shared memory left for barriers and reductions


def tma_table(itemsize: int, aligned: bool) -> tuple[Tile, ...]:
    """The table for y with this itemsize. aligned: its rows are multiples of 16 bytes."""
    if not aligned:
        return TMA_ODD_N
    return TMA if itemsize < 4 else TMA_FLOAT32


def fitting(table: tuple[Tile, ...], gpu: GpuProperties) -> tuple[Tile, ...]:
    """The tiles whose stages fit the GPU's shared memory; if none does, the last."""
    fit = tuple(t for t in table if t.shared + SPARE <= gpu.shared)
    return fit or table[-1:]


def choose(table: tuple[Tile, ...], M: int, N: int, K: int, gpu: GpuProperties) -> Tile:
    """The largest tile that fits the GPU and still gives every SM work, else the last.

    A tile of more than 128 rows also needs K >= DEEP_K and two programs per SM.
    """
    for tile in fitting(table, gpu):
        large = tile.m > 128
        waves = 2 if large else 1
        if large and K < DEEP_K:
            continue
        if tile.count(M, N) >= waves * gpu.num_sms:
            return tile
    return table[-1]
