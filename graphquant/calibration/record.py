"""Statistics of one linear input over all calibration data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from graphquant.calibration.histogram import Histogram
from graphquant.calibration.sample import sample_rows

METHODS = ("absmax", "percentile", "mse")


class Site(NamedTuple):
    """Input of the linear at a module path. K is part of it: one weight may be used both ways."""

    path: str
    K: int


@dataclass(frozen=True)
class Record:
    """Statistics of rows x [..., K], on the CPU; adding two records is exact, in any order.

    low, high  [K] float32, minimum and maximum of each channel; inf and -inf without finite values
    histogram  of all finite values
    sample     [n, K] float32, n <= 64, a random sample of the rows (sample.py)
    rows       number of rows, x.numel() / K
    calls      number of calls of linears
    left_out   number of inf and nan values, which are in none of the above
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
        """Record of one call: x [..., K], floating-point, on any device, converted to float32."""
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
        return Record(low, high, histogram, sample_rows(x), len(x), 1, left_out)

    def __add__(self, other: Record) -> Record:
        return Record(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.histogram + other.histogram,
            sample_rows(torch.cat([self.sample, other.sample])),
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
        """max |x| of each channel, [K] float32; 0 for a channel without finite values."""
        return torch.maximum(-self.low, self.high).clamp(min=0.0)

    def range(self, method: str, percentile: float) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high; see Calibration.range."""
        low, high = min(self.low.min().item(), 0.0), max(self.high.max().item(), 0.0)
        if method == "percentile":
            limit = self.histogram.percentile(percentile)
            return max(low, -limit), min(high, limit)
        return self._best_range if method == "mse" else (low, high)

    @cached_property
    def _best_range(self) -> tuple[float, float]:
        low, high = self.range("absmax", 100.0)
        return self.histogram.best_range(low, high)
