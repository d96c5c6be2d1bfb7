"""What quantisers can be told of what they quantise: factor, range, clip (numerics.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

U = 2.0**-24
Arguments = tuple[Tensor | None, float | None, float | None, float | None]


@dataclass(frozen=True)
class Told:
    """A description of (factor, low, high, clip); numbers are in units of the value's magnitude."""

    factor: str = ""  # "positive" | "any sign": at most 1, so that nothing overflows
    low: float | None = None
    high: float | None = None
    clip: float | None = None

    def on(self, K: int, device: str | torch.device, unit: float = 1.0) -> Arguments:
        def number(v: float | None) -> float | None:
            if v is None:
                return None
            number = float(torch.tensor(v * unit, dtype=torch.float32))
            return number if abs(number) > 1e-37 else 0.0  # Triton's interpreter takes less as fp64

        factor = None
        if self.factor:
            lowest = 0.01 if self.factor == "positive" else -1.0
            factor = torch.linspace(lowest, 1.0, 2 * K, device=device)[::2]  # strided
        return factor, number(self.low), number(self.high), number(self.clip)


TOLD = {
    "factor": Told("positive"),
    "range": Told(low=-1.0, high=2.5),
    "clip": Told(clip=1.5),
    "factor and range": Told("any sign", low=-0.5, high=1.0),
    "factor and clip": Told("any sign", clip=0.5),
}

_numbers = st.floats(-3.0, 3.0, width=32)


@st.composite
def told(draw: st.DrawFn, *, ranges: bool = True) -> Told:
    """ranges: with static ranges and clips too; else a factor at most."""
    factor = draw(st.sampled_from(["", "positive", "any sign"]))
    kind = draw(st.sampled_from(["row", "range", "clip"])) if ranges else "row"
    if kind == "range":
        low, high = sorted((draw(_numbers), draw(_numbers)))
        return Told(factor, low, high)
    clip = draw(st.floats(2**-7, 4.0, width=32)) if kind == "clip" else None
    return Told(factor, clip=clip)


def meant(
    y: Tensor,
    noise: Tensor,
    factor: Tensor | None = None,
    low: float | None = None,
    high: float | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(what is quantised for y [..., K] float64, its noise), for y that is off by at most noise.

    A product is off by U of itself, besides |factor| times the noise. Clamping brings no two values
    further apart; it makes an infinity exact, and a static range also a nan.
    """
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
