"""Histograms that add exactly, and the best int8 range for one.

BINS bins of equal width w = 2^(exponent + 1) / BINS cover [-2^exponent, 2^exponent):

    bin i holds  floor(x / w) + BINS / 2 == i,   so  (i - BINS / 2) w <= x < (i + 1 - BINS / 2) w

w is a power of two, so x / w and the floor of it are exact, and floor(floor(x / w) / 2) is
floor(x / 2w): adding neighbors in pairs doubles the range, and gives the same counts as binning the
values into it. So histograms of batches can be added in any order, and give that of all data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from graphquant.ops.numerics import MIN_ABSMAX, QMAX

BINS = 8192  # a step of 2 absmax / 254 is 16 bins or more; 64 KiB
MIN_EXPONENT = -66  # 2^-66 > MIN_ABSMAX: smaller values quantize to 0
MAX_EXPONENT = 128  # float32 is below 2^128
CHUNK = 2**20  # elements binned at a time, in float64, then int64


@dataclass(frozen=True)
class Histogram:
    """Counts [BINS] int64, on the CPU, of values x with |x| < 2^exponent."""

    counts: Tensor
    exponent: int

    @classmethod
    def empty(cls) -> Histogram:
        return cls(torch.zeros(BINS, dtype=torch.int64), MIN_EXPONENT)

    @classmethod
    def of(cls, x: Tensor, absmax: float) -> Histogram:
        """Histogram of finite float32 values of any shape, |x| <= absmax."""
        exponent = math.frexp(max(absmax, 2.0 ** (MIN_EXPONENT - 1)))[1]
        counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
        for part in x.flatten().split(CHUNK):
            # float64: small values among large ones must not become 0
            steps = torch.floor(part.double() * (BINS * 2.0 ** -(exponent + 1)))
            counts += torch.bincount(steps.long() + BINS // 2, minlength=BINS)
        return cls(counts.cpu(), exponent)

    def __add__(self, other: Histogram) -> Histogram:
        exponent = max(self.exponent, other.exponent)
        return Histogram(self.widen(exponent).counts + other.widen(exponent).counts, exponent)

    def widen(self, exponent: int) -> Histogram:
        """The same values over a wider range: `exponent` is not below this one's."""
        counts = self.counts
        # After log2(BINS) - 1 steps all values are in the two bins around 0, and stay there.
        for _ in range(min(exponent - self.exponent, BINS.bit_length() - 2)):
            pairs = counts.view(-1, 2).sum(1)
            counts = torch.zeros_like(counts)
            counts[BINS // 4 : -BINS // 4] = pairs
        return Histogram(counts, exponent)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(2.0 ** (self.exponent + 1) / BINS)

    def percentile(self, percent: float) -> float:
        """The value that `percent` % of |x| do not exceed, with x uniform within each bin."""
        below, above = self.counts[: BINS // 2].flip(0), self.counts[BINS // 2 :]
        sums = (below + above).cumsum(0).double()
        target = sums[-1] * (percent / 100)
        i = int(torch.searchsorted(sums, target))
        before = float(sums[i - 1]) if i else 0.0
        inside = float(sums[i]) - before
        return self.width * (i + (float(target) - before) / inside if inside else i)

    def error(self, low: float, high: float) -> float:
        """Expected squared error: sum of (x - Q(x))^2 over all values, x uniform within each bin.

        Q rounds to the 255 levels of the static range [low, high]: shift + n * step with
        |n| <= 127, shift = (low + high) / 2, step = (high - low) / 254 (ops/numerics.py). In units
        of u = (x - shift) / step, n(u) = clamp(round(u), -127, 127), the integral of (u - n(u))^2
        is

            G(u) = n / 12 + (u - n)^3 / 3,    1/12 for every whole step

        which is continuous, and cubic beyond the last level: clipped values need no case of their
        own. A bin from a to b, in units of u, with c values adds
        c step^2 (G(b) - G(a)) / (b - a).
        """
        used = self.counts.nonzero().flatten()
        if not len(used):
            return 0.0
        first, last = int(used[0]), int(used[-1])
        step = max((high - low) / 2, MIN_ABSMAX) / QMAX
        edges = torch.arange(first, last + 2, dtype=torch.float64) - BINS // 2
        u = (edges * self.width - (low + high) / 2) / step
        n = u.round().clamp(-QMAX, QMAX)
        G = n / 12 + (u - n) ** 3 / 3
        counts = self.counts[first : last + 1].double()
        return float((counts * G.diff()).sum()) * step**3 / self.width

    def best_range(self, low: float, high: float) -> tuple[float, float]:
        """The range within [low, high], low <= 0 <= high, of least `error`.

        Both ends shrink independently, by factors of 2 down to 1/1024, then by finer ones around
        the best pair, down to 1 %.
        """
        factors = [2.0**-k for k in range(11)]
        best = self._best(low, high, factors, factors)
        ratio = 2**0.5
        while ratio > 1.01:
            around = (1.0, 1 / ratio, ratio)
            ends = [[min(f * a, 1.0) for a in around] for f in best]
            best = self._best(low, high, *ends)
            ratio **= 0.5
        return low * best[0], high * best[1]

    def _best(
        self, low: float, high: float, lows: list[float], highs: list[float]
    ) -> tuple[float, float]:
        """The first of equal pairs. An end at 0 has one candidate."""
        pairs = product(lows if low else lows[:1], highs if high else highs[:1])
        return min(pairs, key=lambda f: self.error(low * f[0], high * f[1]))
