"""Registration and tuning of int8_linear's kernels, each of which has several tile shapes.

A kernel file defines `refuses`, `tiles` (candidates, best guess first) and `run`, and registers
them by `tiled`. The first tile is used, or the one that `tune` measured to be the fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphquant.ops.define import load_kernels
from graphquant.ops.int8_linear.op import int8_linear
from graphquant.ops.numerics import quantize_rows, quantize_symmetric
from graphquant.ops.timing import recall, times


class Operands(NamedTuple):
    """The op's tensors, in order; op.py says what they are."""

    xq: Tensor
    x_scale: Tensor
    x_shift: Tensor
    wq: Tensor
    w_scale: Tensor
    w_sum: Tensor
    bias: Tensor | None
    residual: Tensor | None
    num_rows: Tensor | None


@dataclass(frozen=True)
class Problem:
    """What the speed of the tiles of a product depends on."""

    M: int
    N: int
    K: int
    dtype: torch.dtype  # of y and the residual
    bias: torch.dtype | None
    residual: bool

    @classmethod
    def of(cls, o: Operands, dtype: torch.dtype) -> Problem:
        N, K = o.wq.shape
        bias = None if o.bias is None else o.bias.dtype
        M = o.xq.numel() // K
        M = M if isinstance(M, int) else int(M.node.hint)  # a symbol: what it was traced with
        return cls(M, N, K, dtype, bias, o.residual is not None)

    def question(self, kernel: str) -> str:
        return f"int8_linear {kernel} {astuple(self)}"


@dataclass(frozen=True)
class Tiled:
    """One kernel with several tiles, which may be of any type whose str() is unique."""

    refuses: Callable[[Operands, torch.dtype], str | None]
    tiles: Callable[[Problem, torch.device], Sequence[Any]]
    run: Callable[[Any, Operands, Tensor], None]  # tile, operands, y


KERNELS: dict[str, Tiled] = {}


def tiled(name: str, kernel: Tiled) -> None:
    """Register a kernel of int8_linear, after those already there."""
    KERNELS[name] = kernel

    def refuses(*args: Any) -> str | None:
        operands, (dtype,) = int8_linear.split(args)
        return kernel.refuses(Operands(*operands), dtype)

    @int8_linear.kernel(name, refuses=refuses)
    def fill(
        xq: Tensor,
        x_scale: Tensor,
        x_shift: Tensor,
        wq: Tensor,
        w_scale: Tensor,
        w_sum: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        dtype: torch.dtype,
        num_rows: Tensor | None = None,
        *,
        out: tuple[Tensor],
    ) -> None:
        (y,) = out
        if y.numel():
            o = Operands(xq, x_scale, x_shift, wq, w_scale, w_sum, bias, residual, num_rows)
            kernel.run(_tile(name, kernel, Problem.of(o, dtype), xq.device), o, y)


def _tile(name: str, kernel: Tiled, problem: Problem, device: torch.device) -> Any:
    tiles = kernel.tiles(problem, device)
    by_name = {str(tile): tile for tile in tiles}
    measured = recall(problem.question(name), device) or {}
    usable = {t: us for t, us in measured.items() if us > 0 and t in by_name}
    return by_name[min(usable, key=lambda t: usable[t])] if usable else tiles[0]


def tune(problem: Problem, device: torch.device) -> dict[str, float]:
    """Autotune the tiles of the kernel that is chosen for this product: microseconds of each."""
    load_kernels()
    o = _random(problem, device)
    y = torch.empty(problem.M, problem.N, dtype=problem.dtype, device=device)
    name = int8_linear.choose(*int8_linear.join(o, (problem.dtype,))).name
    kernel = KERNELS[name]

    def call(tile: Any) -> Callable[[], None]:
        return lambda: kernel.run(tile, o, y)

    tiles = {str(tile): call(tile) for tile in kernel.tiles(problem, device)}
    return times(problem.question(name), device, tiles) or {}


def _random(problem: Problem, device: torch.device) -> Operands:
    random = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=random)

    M, N, K = problem.M, problem.N, problem.K
    wq, w_scale = quantize_symmetric(normal(N, K))
    return Operands(
        *quantize_rows(normal(M, K)),
        wq,
        w_scale[:, 0].contiguous(),
        normal(N),
        None if problem.bias is None else normal(N).to(problem.bias),
        normal(M, N).to(problem.dtype) if problem.residual else None,
        None,
    )
