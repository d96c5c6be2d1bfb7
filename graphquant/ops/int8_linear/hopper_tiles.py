"""Tiles of hopper.cu, how to launch them, and which one to take by M, N, K and the GPU.

One launch, in the order of the kernel's arguments (see the head of hopper.cu):

    descriptors(tile, M, N, K, y)                    four CUtensorMap: xq, wq, y, residual
    x_scale, x_shift, w_scale, w_sum, bias           pointers
    M, N, *tile.cover(M, N, K)                       int32: M, N, down, right, height, steps
    num_rows                                         pointer, if it is given

    grid (tile.grid(M, N, num_sms), 1, 1), block (tile.threads, 1, 1), tile.shared bytes
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from graphquant.ops.hopper import DTYPES
from graphquant.ops.hopper.wgmma import shapes, wgmma_ss
from graphquant.ops.numerics import padded

BK = 128  # columns of K in a stage
THREADS = 384
SHARED = 232_448  # bytes of shared memory that one block may have
CACHED_WEIGHT = 12_000_000  # bytes of wq that stay in L2 beside all that passes through it


@dataclass(frozen=True)
class HopperTile:
    """One specialization of hopper.cu, whose head explains the fields."""

    m: int
    n: int
    stages: int
    pingpong: bool = True
    cluster_m: int = 1
    cluster_n: int = 1
    split_k: int = 1
    buffers: int = 3
    narrow: bool = False  # chunks of 64 bytes and not 128

    @property
    def threads(self) -> int:
        return THREADS

    @property
    def blocks(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n * self.split_k

    @property
    def rows(self) -> int:
        """Rows of y that one warp stages and stores at a time."""
        return self.m // (4 if self.pingpong else 8)

    @property
    def chunk(self) -> int:
        """Bytes of a row of y that are staged together."""
        return 64 if self.narrow or self.n // self.split_k % 64 else 128

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory, in the order in which the kernel lays them out."""
        rows = 4 * self.rows  # of a consumer
        ring = self.stages * (self.m + self.n) * BK
        chunks = 8 * self.buffers * self.rows * self.chunk
        sums = 2 * (self.split_k - 1) * rows * (self.n // self.split_k) * 4
        vectors = 2 * (self.n * 12 + rows * 8)
        barriers = 8 * (2 * self.stages + 10 + 8 * self.buffers)
        return 1024 + ring + chunks + sums + vectors + barriers  # 1024: to align the ring

    def defines(self, y: str, bias: str, residual: bool, num_rows: bool) -> dict[str, int | str]:
        """Macros that specialize hopper.cu; y and bias are keys of DTYPES."""
        return {
            "BM": self.m,
            "BN": self.n,
            "STAGES": self.stages,
            "PINGPONG": int(self.pingpong),
            "CLUSTER_M": self.cluster_m,
            "CLUSTER_N": self.cluster_n,
            "SPLIT_K": self.split_k,
            "CHUNK": self.chunk,
            "BUFFERS": self.buffers,
            "Y": DTYPES[y],
            "BIAS": DTYPES[bias],
            "RESIDUAL": int(residual),
            "NUM_ROWS": int(num_rows),
            "SHARED_BYTES": self.shared,
        }

    def wgmma_shapes(self) -> str:
        """The wgmma instruction that the kernel needs."""
        return shapes(wgmma_ss(self.n, "s8"))

    def cover(self, M: int, N: int, K: int) -> tuple[int, int, int, int]:
        """The kernel's `down`, `right`, `height` and `steps`.

        Clusters' tiles; how many of them down before one right; BKs of a block's share of K. With
        height 1 xq is read once, and all of wq again, from L2, for every row of tiles.
        """
        down = -(-M // (self.m * self.cluster_m))
        right = -(-N // (self.n * self.cluster_n))
        height = 1 if N * K <= CACHED_WEIGHT else 8
        return down, right, height, -(-K // (BK * self.split_k))

    def clusters(self, num_sms: int) -> int:
        """How many run at once: those of four leave a part of some GPCs idle."""
        if self.blocks > 2:
            num_sms = num_sms * 10 // 11  # 30 clusters of 4 on 132 SMs
        return max(num_sms // self.blocks, 1)

    def grid(self, M: int, N: int, num_sms: int) -> int:
        """Blocks to launch: no more than run at once, each takes several tiles."""
        down, right, _, _ = self.cover(M, N, 1)
        return min(down * right, self.clusters(num_sms)) * self.blocks


# Each is the best of all that were tried for some encoder's shape, on one H200 (2026-11-25).
# `predict` does not tell the first two apart, so the first is taken: on 20 shapes it was 3 % faster
# on average and nowhere more than 0.3 % slower (2026-12-01).
TILES = (
    HopperTile(128, 192, 4, narrow=True),  # large M
    HopperTile(128, 192, 4, cluster_m=2, narrow=True),
    HopperTile(128, 160, 4, buffers=4, narrow=True),
    HopperTile(128, 128, 5, buffers=2, narrow=True),
    HopperTile(256, 128, 4, pingpong=False, cluster_n=2, buffers=1, narrow=True),
    HopperTile(128, 224, 4, pingpong=False, buffers=2),
    HopperTile(64, 192, 5),
    HopperTile(64, 128, 6),
    HopperTile(64, 96, 8),
    HopperTile(64, 64, 8),
    HopperTile(128, 128, 5, pingpong=False, cluster_m=2, split_k=2, buffers=1),  # small M, large K
    HopperTile(64, 128, 6, split_k=2, buffers=1),
    HopperTile(64, 64, 8, split_k=2, buffers=2),
)


@dataclass(frozen=True)
class Descriptor:
    """What cuTensorMapEncodeTiled wants for one [rows, columns] matrix, rank 2, zeros outside.

    Global sizes (columns, rows); the row stride in bytes is the tensor's own, a multiple of 16.
    Interleave none, L2 promotion 128 bytes, element strides 1.
    """

    dtype: str  # uint8 | bfloat16 | float16 | float32
    rows: int
    columns: int
    box_rows: int
    box_columns: int
    swizzle: int  # bytes: 128 | 64


def descriptors(tile: HopperTile, M: int, N: int, K: int, y: str) -> tuple[Descriptor, ...]:
    """Of xq, wq, y and residual. Without a residual the fourth may be anything.

    K is the true K and not the padded one, so that pads read as zeros.
    """
    size = 4 if y == "float32" else 2
    chunk = (tile.rows, tile.chunk // size, tile.chunk)
    return (
        Descriptor("uint8", M, K, tile.m // tile.cluster_n, BK, 128),
        Descriptor("uint8", N, K, tile.n // tile.cluster_m, BK, 128),
        Descriptor(y, M, N, *chunk),
        Descriptor(y, M, N, *chunk),
    )


# The model of `predict`, fitted to 85 shapes on one H200: off by 5 % on average. In cycles, but:
GHZ = 1.69
LAUNCH_US = 1.68  # with programmatic dependent launch
MEMORY = 2.73e6  # bytes a microsecond: what a stream through epilogues reaches
MULTIPLY = 1.07 / 32  # for each of a tile's elements and BK columns
STEP = 99.4  # more for each BK columns
L2 = 57.4  # bytes a cycle that an SM loads when all do
MISALIGNED = 1.97  # times that where rows start at no multiple of 128 bytes
EPILOGUE = 0.101  # an element
RESIDUAL = 0.0603  # an element, more
TAIL = 353.0  # a tile
OVERLAP = 1.48  # one consumer multiplies while one writes: each is slower than alone
SPLIT = 1200.0  # to exchange sums


def predict(
    tile: HopperTile, M: int, N: int, K: int, num_sms: int, residual: bool, itemsize: int = 2
) -> float:
    """About how many microseconds int8_linear takes; itemsize is of y."""
    down, right, _, steps = tile.cover(M, N, K)
    running = tile.clusters(num_sms)
    waves = -(-down * right // running)
    busy = min(1.0, down * right * tile.blocks / num_sms)
    area = tile.m * tile.n
    load = (tile.m / tile.cluster_n + tile.n / tile.cluster_m) * BK
    if padded(K) % BK:
        load *= MISALIGNED
    multiply = steps * max(area * MULTIPLY + STEP, load / L2 * busy)
    epilogue = area * (EPILOGUE + residual * RESIDUAL) / tile.split_k + TAIL
    if tile.pingpong:
        cycles = waves * max(multiply, (multiply + epilogue) / 2 * OVERLAP) + epilogue
    else:
        cycles = waves * (multiply + epilogue)
    if tile.split_k > 1:
        cycles += waves * SPLIT
    compute = cycles / GHZ / 1e3
    memory = (M * K + N * K + M * N * itemsize * (1 + residual)) / MEMORY
    return float(LAUNCH_US + (compute**6 + memory**6) ** (1 / 6))  # about the longer of the two


def candidates(
    M: int, N: int, K: int, num_sms: int, residual: bool, itemsize: int = 2
) -> tuple[HopperTile, ...]:
    """TILES, the one predicted fastest first: what a tuner should measure in this order."""
    return tuple(
        sorted(TILES, key=lambda tile: predict(tile, M, N, K, num_sms, residual, itemsize))
    )


@functools.cache
def choose(M: int, N: int, K: int, num_sms: int, residual: bool, itemsize: int = 2) -> HopperTile:
    return candidates(M, N, K, num_sms, residual, itemsize)[0]
