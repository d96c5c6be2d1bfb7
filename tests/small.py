"""Small modules and the few words that the tests of weights, gradients and the backend share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant import Report
from graphquant.report import Quiet

# A row of int8 values has steps of absmax / 127. On gaussian rows (absmax about 3 sigma) the
# rounding error is 0.7 % of the row, for x and for the weight: 1 % of a linear, 1.4 % of two.
NEAR = 0.03
FAR = 0.2  # other weights, not the same weights in other arithmetic


class Mlp(nn.Module):
    """norm -> linear -> gelu -> linear, without a residual that would hide a wrong weight."""

    def __init__(self, dim: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Scaled(nn.Module):
    """A layer scale that is a buffer."""

    scale: Tensor

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.register_buffer("scale", torch.linspace(-1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Model(nn.Module):
    """A model written on one line: Model(lambda m, x: m.fc(x), fc=...), in eval mode."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """make(), the same for each seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def int8(module: Any, reports: list[Report] | None = None, **options: Any) -> Any:
    """The module under the backend, without Inductor; its reports are appended to the list."""
    if reports is not None:
        options["on_report"] = reports.append
    return torch.compile(module, backend="graphquant", options={"inner": "eager", **options})


def again(model: nn.Module) -> nn.Module:
    """A float model built anew that holds the same values."""
    fresh = copy.deepcopy(model)
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        new = old.detach().clone()
        if isinstance(old, nn.Parameter):
            setattr(fresh.get_submodule(path), leaf, nn.Parameter(new, old.requires_grad))
        else:
            fresh.get_submodule(path).register_buffer(leaf, new)
    return fresh


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|"""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def notes(report: Report) -> tuple[str, ...]:
    """The report's notes, but for those that warn of nothing: on a CPU there always is one."""
    return tuple(note for note in report.notes if not isinstance(note, Quiet))
