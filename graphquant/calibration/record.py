"""What one value of a model, the input of one or several linears, was over all data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from graphquant.calibration.histogram import Histogram
from graphquant.calibration.sample import smallest

METHODS = ("absmax", "percentile", "mse")


class Site(NamedTuple):
    """The input of the linears at a path. K tells those apart that use one weight both ways."""

    path: str
    K: int


@dataclass(frozen=True)
class Record:
    """Sums of rows x [..., K], all on the CPU; adding two is exact, in any order.

    low, high  [K] float32, of each channel; inf and -inf where no finite value was seen
    histogram  of all finite values
    sample     [n, K] float32, n <= 64 of the rows (sample.py says which)
    rows       how many rows, x.numel() / K
    calls      how many times a linear read such rows
    left_out   how many values were inf or nan: they are in none of the above
    """

    low: Tensor
    high: Tensor
    histogram: Histogram
    sample: Tensor
    rows: int = 0
    calls: int = 0
    left_out: int = 0

    @classmethod
    def empty(cls, K: int) -> Record:
        none = torch.full((K,), math.inf)
        return cls(none, -none, Histogram.empty(), torch.empty(0, K))

    @classmethod
    def of(cls, x: Tensor) -> Record:
        """Of one call: x [..., K], floating-point, on any device. Values count in float32."""
        K = x.shape[-1]
        x = x.detach().reshape(-1, K).float()
        if not x.numel():
            return replace(Record.empty(K), rows=len(x), calls=1)
        finite = x.isfinite()
        left_out = x.numel() - int(finite.sum())
        lowest = highest = values = x
        if left_out:
            lowest, highest = x.where(finite, math.inf), x.where(finite, -math.inf)
            values = x[finite]
        low, high = lowest.amin(0).cpu(), highest.amax(0).cpu()
        absmax = max(-low.min().item(), high.max().item(), 0.0)
        histogram = Histogram.of(values, absmax) if values.numel() else Histogram.empty()
        return Record(low, high, histogram, smallest(x), len(x), 1, left_out)

    def __add__(self, other: Record) -> Record:
        return Record(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.histogram + other.histogram,
            smallest(torch.cat([self.sample, other.sample])),
            self.rows + other.rows,
            self.calls + other.calls,
            self.left_out + other.left_out,
        )

    @property
    def K(self) -> int:
        return len(self.low)

    @cached_property
    def seen(self) -> bool:
        """Was there any finite value?"""
        return bool(self.histogram.counts.any())

    @property
    def absmax(self) -> Tensor:
        """[K] float32, of each channel; 0 for one that had no finite value."""
        return torch.maximum(-self.low, self.high).clamp(min=0.0)

    def range(self, method: str, percentile: float) -> tuple[float, float]:
        """(low, high), low <= 0 <= high: see Calibration.range."""
        low, high = min(self.low.min().item(), 0.0), max(self.high.max().item(), 0.0)
        if method == "percentile":
            most = self.histogram.percentile(percentile)
            return max(low, -most), min(high, most)
        return self._best_range if method == "mse" else (low, high)

    @cached_property
    def _best_range(self) -> tuple[float, float]:
        low, high = self.range("absmax", 100.0)
        return self.histogram.best_range(low, high)
