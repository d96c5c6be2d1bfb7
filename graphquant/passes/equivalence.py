"""Are two functions one, on every value that a type can hold?

Both are evaluated in float64: on both signs, on all decades from the smallest subnormal number to
the type's maximum, at zero, inf and nan, and close to where anything that is computed on the way
changes its sign or comes near zero: there are the kinks of a clamp, and bumps no wider than the
distance of two samples. They may differ by RELATIVE of the value, for constants are written with
eight digits, and by float64's own rounding; by nothing else, however small the value is beside 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Steps = Callable[[Tensor], Sequence[Tensor]]  # all values on the way, the function's own last

RELATIVE = 1e-6  # gelu's two forms are 4.7e-4 apart
ROUNDING = 2.0**-48  # of what terms that cancel are made of: 1 + erf(x) rounds to float64's 2^-53
SMALLEST = 2.0**-149  # float32's and bfloat16's smallest subnormal number
ROUNDS = 3  # of samples between samples
CUTS = 24  # new samples between two


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
    """Is steps(x)[-1] == want(x) for rows x [M, K] of numbers up to `most`? `beta` [K] is what is
    added to a row last, and hides nothing."""
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
    """Numbers from least to most, so many in each decade."""
    low, high = math.log10(least), math.log10(most)
    count = int(each * (high - low)) + 2
    found = torch.logspace(low, high, count, dtype=torch.float64, device="cpu")
    return found.clamp(least, most)


def _refined(x: Tensor, steps: Steps, limit: int) -> Sequence[Tensor]:
    """These samples in order, and more where a step of the function turns: CUTS between each two
    samples, at `limit` places at most, and again between those."""
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
    """Where, among values [n, m] in order, those from [i] to [i + 3] turn: the sign changes, or
    those in the middle are nearer to zero than those around them, by more than rounding."""
    sign, size = v.sign(), v.abs()
    changes = (sign[1:-2] != sign[2:-1]).any(1)
    middle, around = torch.minimum(size[1:-2], size[2:-1]), torch.minimum(size[:-3], size[3:])
    return changes | (middle < 0.5 * around).any(1)


def _same_ends(value: Tensor, want: Tensor) -> bool:
    """At -inf, inf and nan: where the one is inf the other is, and nan stays nan. Forms that differ
    in a product of 0 and inf are one."""
    inf, nan = want.isinf(), want.isnan()
    return bool(
        torch.where(inf, value == want, torch.where(nan, ~value.isfinite(), True)).all()
        and torch.where(want.isfinite(), value.isnan() | (value == want), True).all()
    )
