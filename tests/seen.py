"""A calibration for tests: what one call of a model shows, or what a test says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Seen:
    """graphquant.config.Statistics from dicts by module path; with `rows`, also to search on."""

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def range(self, path: str) -> tuple[float, float] | None:
        return self.ranges.get(path)

    def absmax(self, path: str) -> Tensor | None:
        return self.largest.get(path)

    def sample(self, path: str) -> Tensor | None:
        return self.rows.get(path)


def seen(model: nn.Module, *args: Any, rows: bool = False) -> Seen:
    """What the nn.Linear modules of a model read in one call, in float; with the rows, or not."""
    found, hooks = Seen(), []

    def look(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            found.ranges[path] = float(x.min()), float(x.max())
            found.largest[path] = x.abs().flatten(0, -2).amax(0)
            if rows:
                found.rows[path] = x.flatten(0, -2)

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(look(path)))
    with torch.no_grad():
        model(*args)
    for hook in hooks:
        hook.remove()
    return found
