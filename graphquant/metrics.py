"""Error metrics between int8 values and the float values that they approximate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """Error of int8 values y8 against float values y, summed over any number of elements.

    signal  sum y^2
    noise   sum (y8 - y)^2
    power   sum y8^2
    dot     sum y8 y
    """

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    dot: float = 0.0

    @classmethod
    def of(cls, y8: Tensor, y: Tensor) -> Error:
        """Error between two tensors of equal shape, without elements at which y is inf or nan."""
        y8, y = _comparable(y8, y)
        sums = (y.square(), (y8 - y).square(), y8.square(), y8 * y)
        return cls(*torch.stack([s.sum() for s in sums]).tolist())

    def __add__(self, other: Error) -> Error:
        return Error(
            self.signal + other.signal,
            self.noise + other.noise,
            self.power + other.power,
            self.dot + other.dot,
        )

    @property
    def exact(self) -> bool:
        """Is every int8 value equal to the float one?"""
        return self.noise == 0.0

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB. inf if exact; nan if an int8 value is not finite."""
        return -20 * math.log10(self.relative) if self.relative else math.inf

    @property
    def relative(self) -> float:
        """|y8 - y| / |y|, 0 if exact; inf if y is zero and y8 is not."""
        if self.exact:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity of y8 and y, -1 to 1; 0 if only one of them is zero."""
        if self.exact:
            return 1.0
        length = math.sqrt(self.signal) * math.sqrt(self.power)
        # the sums are rounded: a cosine must not be 1 + 1e-16
        return _clip(self.dot / length) if length else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON, in which inf and nan are null; `exact` distinguishes the case without error."""
        return {
            "sqnr_db": _finite(self.sqnr),
            "exact": self.exact,
            "relative_error": _finite(self.relative),
            "cosine": _finite(self.cosine),
        }


@dataclass(frozen=True)
class RowCosines:
    """Cosine similarities of int8 and float rows (slices along the last dim) of a value."""

    total: float = 0.0
    rows: int = 0
    worst: float = 1.0

    @classmethod
    def of(cls, y8: Tensor, y: Tensor) -> RowCosines:
        """Of tensors of equal shape; a scalar is one row. Rows that are zero in both give 1."""
        if not y.numel():
            return cls()
        y8, y = (t.reshape(-1, t.shape[-1] if t.dim() else 1) for t in _comparable(y8, y))
        length = y8.norm(dim=1) * y.norm(dim=1)
        cosines = ((y8 * y).sum(1) / length).clamp(-1, 1)
        cosines = torch.where(length == 0, 0.0, cosines)
        cosines = torch.where((y8 == y).all(1), 1.0, cosines)
        return cls(cosines.sum().item(), len(cosines), cosines.min().item())

    def __add__(self, other: RowCosines) -> RowCosines:
        worst = min(self.worst, other.worst)  # of nan and a number, min may take either
        worst = math.nan if math.isnan(self.worst + other.worst) else worst
        return RowCosines(self.total + other.total, self.rows + other.rows, worst)

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else 1.0


def _comparable(y8: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, set to zero where the float value is inf or nan."""
    y8, y = y8.detach().double(), y.detach().double()
    usable = torch.isfinite(y)
    if not bool(usable.all()):
        y8, y = (torch.where(usable, t, 0.0) for t in (y8, y))
    return y8, y


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clip(cosine: float) -> float:
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))
