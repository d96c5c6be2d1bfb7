"""Tiles of hopper.cu, and how to launch them.

One launch, in the order of the kernel's arguments (11 in all, see the head of hopper.cu):

    four CUtensorMap: q, k, v, y (`box` has the tokens of a box)
    S, *tile.cover(B, H, S, T)      int32: S, keys, blocks, down, heads, tiles
    scale * log2(e)                 float32

    grid (tile.grid(...), 1, 1), block (tile.threads, 1, 1), tile.shared(D) bytes
"""

from __future__ import annotations

from dataclasses import dataclass

ONLY = 90  # sm: its instructions are Hopper's own
PART = 64  # columns of a head in a box: the 128 bytes of the swizzle
ROWS = 64  # queries of a consumer
STORED = 16  # rows of y that one warp stores
SHARED = 232_448  # bytes of shared memory that one block may have
WIDEST = 128  # head
HALVES = {"bfloat16": 1, "float16": 2}  # numbers of the macro HALF
PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}


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
        # scores, weights and part of y of a thread: with more, ptxas finds no room for wgmma
        if self.n * 3 // 4 + _sixteens(D) // 2 > (116 if self.groups == 3 else 176):
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

    def defines(self, T: int, D: int, dtype: str) -> dict[str, int]:
        """Macros that specialize hopper.cu; dtype is a key of HALVES."""
        keys = self.first(T)
        return {
            "GROUPS": self.groups,
            "BN": self.n,
            "FIRST": _sixteens(keys),
            "MASKED": int(keys % 16 != 0),
            "D": D,
            "STAGES": self.stages,
            "TURNS": int(self.groups == 2),  # three find their rhythm by themselves,
            "HALF": HALVES[dtype],
        }

    def products(self, T: int, D: int, dtype: str) -> str:
        """CUDA functions that the kernel calls: score_first, score, weigh."""
        kind = PTX_NAMES[dtype]
        return "".join(
            (
                wgmma("score_first", kind, _sixteens(self.first(T)), from_registers=False),
                wgmma("score", kind, self.n, from_registers=False),
                wgmma("weigh", kind, D, from_registers=True),
            )
        )

    def cover(self, B: int, H: int, S: int, T: int) -> tuple[int, int, int, int, int]:
        """The kernel's `keys`, `blocks`, `down`, `heads` and `tiles`."""
        keys, down = self.first(T), -(-S // self.m)
        return keys, (T - keys) // self.n, down, H, down * H * B

    def grid(self, B: int, H: int, S: int, num_sms: int) -> int:
        """Blocks to launch: no more than run at once, each takes several tiles."""
        return min(-(-S // self.m) * H * B, num_sms)


def wgmma(name: str, kind: str, n: int, *, from_registers: bool) -> str:
    """A CUDA function: d [64, n] (+)= a [64, 16] b, with d in float32 as a thread holds it.

    a from shared memory: b is [n, 16] there. a from registers: b is [16, n].
    PTX wants each of the thread's n / 2 sums named.
    """
    sums = ", ".join(f"%{i}" for i in range(n // 2))
    if from_registers:
        takes, gives = "const u32* a", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])'
        a, b = f"{{%{n // 2}, %{n // 2 + 1}, %{n // 2 + 2}, %{n // 2 + 3}}}", n // 2 + 4
        across = "1"  # b is transposed
    else:
        takes, gives, a, b = "u64 a", '"l"(a)', f"%{n // 2}", n // 2 + 1
        across = "0, 0"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))
    return (
        f"__device__ __forceinline__ void {name}(float* d, {takes}, u64 b, int keep) {{\n"
        f'  asm volatile("{{\\n.reg .pred keep;\\nsetp.ne.b32 keep, %{b + 1}, 0;\\n"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "\n'
        f'      "{{{sums}}}, {a}, %{b}, keep, 1, 1, {across};\\n}}"\n'
        f'      : {outputs}\n      : {gives}, "l"(b), "r"(keep));\n}}\n'
    )


def _sixteens(n: int) -> int:
    return -(-n // 16) * 16


# For each encoder's shape one of these was the best of all that were tried on an H200 (2026-11-25).
TILES = {f"{t.m}x{t.n}": t for t in map(HopperTile, (3, 3, 2, 2, 2), (96, 112, 128, 160, 192))}
