"""Numerical equivalence of two functions over the whole range of a dtype.

Both are evaluated in float64: on both signs, on all decades from the smallest subnormal to the
dtype's maximum, at zero, inf and nan, and densely where an intermediate value changes its sign or
comes near zero, as at the kinks of a clamp. They may differ by RELATIVE of the value, since models
write constants with eight digits, and by float64's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Steps = Callable[[Tensor], Sequence[Tensor]]  # all intermediate values, the result last

RELATIVE = 1e-6  # gelu's two forms are 4.7e-4 apart
ROUNDING = 2.0**-48  # relative to canceling terms: 1 + erf(x) rounds to 2^-53
SMALLEST = 2.0**-149  # float32's and bfloat16's smallest subnormal number
ROUNDS = 3  # of refinement
CUTS = 24  # new samples between two of a refined interval


def elementwise(steps: Steps, want: Callable[[Tensor], Tensor], most: float) -> bool:
    """Is steps(x)[-1] == want(x) for x from -most to most?"""
    positive = _decades(SMALLEST, most, 32)
    x = torch.cat([-positive.flip(0), positive.new_zeros(1), positive])

    def same(x: Tensor) -> bool:
        value, wanted = steps(x)[-1], want(x)
        if value.shape != wanted.shape:
            return False
        far = (value - wanted).abs() > RELATIVE * wanted.abs() + ROUNDING * x.abs()
        return not bool((far | ~value.isfinite()).any())

    ends = x.new_tensor([-math.inf, math.inf, math.nan])
    return all(map(same, _refined(x, steps, 512))) and _same_ends(steps(ends)[-1], want(ends))


def rowwise(
    steps: Steps, want: Callable[[Tensor], Tensor], beta: Tensor | None, K: int, most: float
) -> bool:
    """Is steps(x)[-1] == want(x) for rows x [M, K] of magnitudes up to `most`? Errors are relative
    to want(x) without beta [K], which is added last."""
    random = torch.Generator("cpu").manual_seed(K)
    even, other = torch.randn(2, K, generator=random, dtype=torch.float64, device="cpu")
    outlier = other.clone()
    outlier[-1] = 1e3
    shift = 0.0 if beta is None else beta

    def same(x: Tensor) -> bool:
        value, wanted = steps(x)[-1], want(x)
        if value.shape != wanted.shape:
            return False
        size = (wanted - shift).abs().amax(-1, keepdim=True)
        slack = RELATIVE * size + ROUNDING * (0.0 if beta is None else beta.abs())
        both = wanted.isfinite() == value.isfinite()
        return bool((both & ~((value - wanted).abs() > slack)).all())

    for row in (even, other + 1e3, outlier, -outlier):
        t = _decades(1e-30, most / float(row.abs().amax()), 3)

        def steps_at(t: Tensor, row: Tensor = row) -> Sequence[Tensor]:
            return steps(t.unsqueeze(1) * row)

        if not all(same(t.unsqueeze(1) * row) for t in _refined(t, steps_at, 16)):
            return False
    return same(even.new_zeros(1, K))


def _decades(least: float, most: float, each: int) -> Tensor:
    """Log-spaced numbers from least to most, `each` per decade."""
    low, high = math.log10(least), math.log10(most)
    count = int(each * (high - low)) + 2
    found = torch.logspace(low, high, count, dtype=torch.float64, device="cpu")
    return found.clamp(least, most)


def _refined(x: Tensor, steps: Steps, limit: int) -> Sequence[Tensor]:
    """The samples `x`, then in ROUNDS rounds denser ones around turning points of any step: CUTS
    per interval, at no more than `limit` places."""
    found = [x]
    for _ in range(ROUNDS):
        turns = [_turns(v.reshape(len(x), -1)) for v in steps(x) if v.shape[:1] == x.shape]
        at = torch.stack(turns).any(0).nonzero().squeeze(1)
        if not len(at):
            break
        at = at[:: -(-len(at) // limit)]
        low, high = x[at].unsqueeze(1), x[at + 3].unsqueeze(1)
        cut = torch.linspace(0, 1, 3 * CUTS, dtype=x.dtype, device="cpu")
        x = (low * (1 - cut) + high * cut).flatten().unique()
        found.append(x)
    return found


def _turns(v: Tensor) -> Tensor:
    """bool [n - 3]: do the values v[i:i + 4] of v [n, m] change sign, or dip toward zero?"""
    sign, size = v.sign(), v.abs()
    changes = (sign[1:-2] != sign[2:-1]).any(1)
    middle, around = torch.minimum(size[1:-2], size[2:-1]), torch.minimum(size[:-3], size[3:])
    return changes | (middle < 0.5 * around).any(1)


def _same_ends(value: Tensor, want: Tensor) -> bool:
    """Equality at -inf, inf and nan: inf must match, nan must stay non-finite. A finite result may
    become nan, as forms that multiply 0 by inf do."""
    inf, nan = want.isinf(), want.isnan()
    return bool(
        torch.where(inf, value == want, torch.where(nan, ~value.isfinite(), True)).all()
        and torch.where(want.isfinite(), value.isnan() | (value == want), True).all()
    )
