"""Hypothesis strategies. They draw descriptions, which print well and shrink well, not tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FINITE = (
    "normal",
    "zero row",
    "below the floor",
    "outlier",
    "constant",
    "positive",
    "negative",
    "ties",
)
CONTENTS = (*FINITE, "inf", "-inf", "nan", "inf and nan", "inf and -inf")
HUGE = "huge"  # high - low overflows: for ops that do not multiply
LAYOUTS = ("contiguous", "slice", "every other", "swapped", "expanded")


@dataclass(frozen=True)
class Rows:
    """A tensor [*lead, K]. What `content` says happens in the first row alone."""

    lead: tuple[int, ...]
    K: int
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    content: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @property
    def finite(self) -> bool:
        return self.content in (*FINITE, HUGE) or 0 in self.lead

    def on(self, device: str) -> Tensor:
        x = torch.randn(*self.lead, self.K, generator=torch.Generator().manual_seed(self.seed))
        x = (x * self.magnitude).to(self.dtype)
        if x.numel():
            self._fill(x.view(-1, self.K))
        return self._laid_out(x.to(device))

    def _fill(self, x: Tensor) -> None:
        row, last = x[0], self.K - 1
        if self.content == "zero row":
            row.zero_()
        elif self.content == "below the floor":
            row.mul_(1e-25 / self.magnitude)
        elif self.content == HUGE:
            largest = 3e38 if self.dtype != torch.float16 else 60_000
            row.div_(self.magnitude).clamp_(-1, 1).mul_(largest)
        elif self.content == "positive":
            row.abs_()
        elif self.content == "negative":
            row.abs_().neg_()
        elif self.content == "constant":
            row.fill_(self.magnitude)
        elif self.content == "outlier":
            row[last] = 1000 * self.magnitude if self.dtype != torch.float16 else 60_000
        elif self.content == "ties":  # shift 0, a scale of exactly 1: every other value is halfway
            row.copy_(torch.arange(self.K) % 250 * 0.5)
            row[0], row[last] = 127, -127
        elif self.content in ("inf and nan", "inf and -inf"):
            row[0], row[last] = torch.inf, float(self.content.removeprefix("inf and "))
        elif self.content != "normal":
            row[last] = float(self.content)

    def _laid_out(self, x: Tensor) -> Tensor:
        """The same values, other strides."""
        if self.layout == "slice":
            wide = torch.full((*self.lead, self.K + 11), 77.0, dtype=x.dtype, device=x.device)
            wide[..., 5 : 5 + self.K] = x
            return wide[..., 5 : 5 + self.K]
        if self.layout == "every other":
            wide = torch.full((*self.lead, 2 * self.K), 77.0, dtype=x.dtype, device=x.device)
            wide[..., ::2] = x
            return wide[..., ::2]
        if self.layout == "swapped" and len(self.lead) > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "expanded" and self.lead and x.numel():
            return x[:1].expand(x.shape)
        return x


@st.composite
def rows(
    draw: st.DrawFn,
    *,
    max_exponent: int = 30,
    max_K: int = 150,
    contents: tuple[str, ...] = CONTENTS,
) -> Rows:
    """[K], [M, K] or [B, S, K] of magnitudes 10^-max_exponent to 10^max_exponent."""
    lead = draw(
        st.sampled_from([(), (1,), (0,), (2, 0)])
        | st.tuples(st.integers(1, 40))
        | st.tuples(st.integers(1, 4), st.integers(1, 5))
    )
    dtype = draw(st.sampled_from(FLOATS))
    low, high = (-4, 3) if dtype == torch.float16 else (-max_exponent, max_exponent)
    return Rows(
        lead,
        draw(st.integers(1, max_K)),
        dtype,
        10.0 ** draw(st.integers(max(low, -max_exponent), min(high, max_exponent))),
        draw(st.sampled_from(contents)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 99)),
    )
