"""QParams for tests: how to make them, and what they make of a value (ops/qparams.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops.qparams import DYNAMIC, QParams

U = 2.0**-24


@dataclass(frozen=True)
class Recipe:
    """How to make QParams for K channels; numbers are in units of the value's magnitude."""

    factor: str = ""  # "positive" | "any sign": at most 1, so that nothing overflows
    low: float | None = None
    high: float | None = None
    clip: float | None = None

    def on(self, K: int, device: str | torch.device, unit: float = 1.0) -> QParams:
        def number(v: float | None) -> float | None:
            if v is None:
                return None
            number = float(torch.tensor(v * unit, dtype=torch.float32))
            return number if abs(number) > 1e-37 else 0.0  # Triton's interpreter takes less as fp64

        factor = None
        if self.factor:
            lowest = 0.01 if self.factor == "positive" else -1.0
            factor = torch.linspace(lowest, 1.0, 2 * K, device=device)[::2]  # strided
        return QParams(factor, number(self.low), number(self.high), number(self.clip))


RECIPES = {
    "factor": Recipe("positive"),
    "range": Recipe(low=-1.0, high=2.5),
    "clip": Recipe(clip=1.5),
    "factor and range": Recipe("any sign", low=-0.5, high=1.0),
    "factor and clip": Recipe("any sign", clip=0.5),
}

_numbers = st.floats(-3.0, 3.0, width=32)


@st.composite
def recipes(draw: st.DrawFn, *, ranges: bool = True) -> Recipe:
    """ranges: with static ranges and clips too; else a factor at most."""
    factor = draw(st.sampled_from(["", "positive", "any sign"]))
    kind = draw(st.sampled_from(["row", "range", "clip"])) if ranges else "row"
    if kind == "range":
        low, high = sorted((draw(_numbers), draw(_numbers)))
        return Recipe(factor, low, high)
    clip = draw(st.floats(2**-7, 4.0, width=32)) if kind == "clip" else None
    return Recipe(factor, clip=clip)


def meant(y: Tensor, noise: Tensor, qparams: QParams = DYNAMIC) -> tuple[Tensor, Tensor]:
    """(what is quantized for y [..., K] float64, its noise), for y that is off by at most noise.

    A product is off by U of itself, besides |factor| times the noise. Clamping brings no two values
    further apart; it makes an infinity exact, and a static range also a nan.
    """
    factor, low, high, clip, _ = qparams
    known = y.isfinite()
    if factor is not None:
        f = factor.cpu().double()
        y, noise = y * f, noise * f.abs()
        noise = noise + U * y.abs() + 2.0**-126  # Triton's interpreter has no denormals
    if low is None or high is None:
        low, high = (-clip, clip) if clip is not None else (-torch.inf, torch.inf)
    else:
        y = y.where(~y.isnan(), low)
    return y.clamp(low, high), noise.where(known, 0.0)
