"""Samples of rows: the same in any order, distinct, and of no kind more than of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.calibration import sample
from graphquant.calibration.sample import ROWS, sample_rows


def rows_of(seed: int, n: int, K: int) -> Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def as_set(rows: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in rows.tolist()}


@given(st.integers(0, 99), st.lists(st.integers(0, 90), max_size=6), st.integers(1, 5))
def test_joined_in_any_order_they_are_those_of_the_whole(
    seed: int, cuts: list[int], K: int
) -> None:
    x = rows_of(seed, 150, K)
    x = torch.cat([x, x[:40]])  # some twice
    want = sample_rows(x)
    assert len(want) == ROWS == len(as_set(want)) and as_set(want) <= as_set(x)
    joined = torch.empty(0, K)
    for part in reversed(x.tensor_split(sorted(cuts))):
        joined = sample_rows(torch.cat([sample_rows(part), joined]))
    assert torch.equal(joined, want)
    assert torch.equal(sample_rows(x[torch.randperm(len(x))]), want)


def test_few_rows_are_all_kept_and_rows_that_are_not_finite_are_not() -> None:
    x = rows_of(0, 9, 4)
    bad = x.clone()
    bad[:, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(3)
    assert as_set(sample_rows(torch.cat([bad, x]))) == as_set(x)
    assert sample_rows(bad).shape == sample_rows(x[:0]).shape == (0, 4)


def test_every_part_of_the_data_is_met_by_its_share() -> None:
    """Of 64 rows about half are from either half, even if one is a thousand times larger and one
    row of the other is there a thousand times: 32 +- 4 x 4."""
    small, large = rows_of(1, 2000, 8), 1000 * rows_of(2, 2000, 8)
    kept = sample_rows(torch.cat([small, large, small[:1].expand(1000, 8)]))
    assert 16 <= int((kept.abs().amax(1) < 10).sum()) <= 48


def test_large_inputs_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows_of(3, 500, 16)
    want = sample_rows(x)
    monkeypatch.setattr(sample, "CHUNK", 100)
    assert torch.equal(sample_rows(x), want)
