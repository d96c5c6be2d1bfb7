"""What each process of a distributed test does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import graphquant
from graphquant import Calibration, CalibrationError
from tests.small import seeded

RANKS = 2


class Model(nn.Module):
    """Two readers of one value, and a third that only some calls come to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rare = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, which: str) -> Tensor:
        if which == "rare":
            return self.rare(x)
        return self.a(x) + self.b(x) if which == "both" else self.a(x)


def model(seed: int = 0) -> nn.Module:
    made: nn.Module = seeded(Model, seed).eval()
    return made


def batches() -> dict[str, list[list[Any]]]:
    """By scenario: the batches of each rank."""
    draw = torch.Generator().manual_seed(0)
    x = [torch.randn(5, 8, generator=draw) * size for size in (1.0, 100.0, 1e-4, 3.0)]
    return {
        "different data": [[(x[0], "both"), (x[2], "both")], [(x[1], "both")]],
        "a rank without a batch": [[], [(x[1], "both"), (x[3], "both")]],
        "a site of one rank": [[(x[0], "both"), (x[1], "rare")], [(x[2], "both")]],
        "shared on one rank": [[(x[0], "a")], [(x[3], "both")]],
        "no rank has data": [[], []],
    }


def calibration(data: list[Any]) -> Calibration:
    if not data:
        return Calibration(model())
    return graphquant.calibrate(model(), data, progress=False)


def spawn(work: Callable[..., None], folder: Path, *given: Any) -> None:
    """work(rank, folder, *given) in RANKS processes with a gloo group."""
    mp.spawn(_joined, (sys.path, work, folder, *given), RANKS)


def _joined(
    rank: int, path: list[str], work: Callable[..., None], folder: Path, *given: Any
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        work(rank, folder, *given)
    finally:
        dist.destroy_process_group()


def sync_all(rank: int, folder: Path) -> None:
    for name, data in batches().items():
        mine = calibration(data[rank])
        assert mine.sync() is mine
        mine.save(folder / f"{name}.{rank}")
    alone = dist.new_group([0])
    if rank == 0:
        before = calibration(batches()["different data"][0])
        before.sync(alone)
        before.save(folder / "alone")


def sync_others(rank: int, folder: Path) -> None:
    try:
        Calibration(model(seed=rank)).sync()
    except CalibrationError as why:
        (folder / f"error.{rank}").write_text(str(why))
