"""Calibrations of two processes (gloo) become that of all their data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphquant import Calibration
from tests.calibration import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    ranks.spawn(ranks.sync_all, made)
    return made


@pytest.mark.parametrize("name", ranks.batches())
def test_every_rank_has_what_one_process_would_have_seen(name: str, folder: Path) -> None:
    data = ranks.batches()[name]
    whole = ranks.calibration([batch for part in data for batch in part])
    # bytes of the file: sites, sharing, lows, highs, counts, exponents, rows, calls, batches
    whole.save(folder / "whole")
    for rank in range(ranks.RANKS):
        assert (folder / f"{name}.{rank}").read_bytes() == (folder / "whole").read_bytes()


def test_a_group_of_one_has_its_own_data(folder: Path) -> None:
    want = ranks.calibration(ranks.batches()["different data"][0])
    got = Calibration.load(folder / "alone", ranks.model())
    assert got.batches == want.batches == 2
    assert torch.equal(got.record("a").low, want.record("a").low)  # type: ignore[union-attr]


def test_other_models_are_refused_on_every_rank(tmp_path: Path) -> None:
    ranks.spawn(ranks.sync_others, tmp_path)
    for rank in range(ranks.RANKS):
        said = (tmp_path / f"error.{rank}").read_text()
        assert (
            f"rank {1 - rank}'s model is not the one" in said and "a.bias has other values" in said
        )


def test_without_a_process_group_nothing_happens() -> None:
    calibration = ranks.calibration(ranks.batches()["different data"][0])
    record = calibration.record("a")
    assert calibration.sync() is calibration
    assert calibration.record("a") is record and calibration.batches == 2
