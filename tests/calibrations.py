"""Statistics of what every nn.Linear of a model reads, taken by hooks: a calibration's stand-in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Measured:
    """Of one call of the model."""

    def __init__(self, model: nn.Module, *args: Any) -> None:
        self.rows: dict[str, Tensor] = {}

        def seen(path: str, x: Tensor) -> None:
            self.rows[path] = x.detach().reshape(-1, x.shape[-1]).float()

        hooks = [
            module.register_forward_pre_hook(lambda m, given, path=path: seen(path, given[0]))
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            model(*args)
        for hook in hooks:
            hook.remove()

    def absmax(self, path: str) -> Tensor | None:
        return self.rows[path].abs().amax(0) if path in self.rows else None

    def range(self, path: str) -> tuple[float, float] | None:
        if path not in self.rows:
            return None
        low, high = self.rows[path].aminmax()
        return float(low), float(high)


class Sampled(Measured):
    """With the rows themselves."""

    def sample(self, path: str) -> Tensor | None:
        return self.rows.get(path)
