"""The page of encoders, from records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tools.bench import summary
from tools.bench.__main__ import main
from tools.bench.encoders import ENCODERS, PRESETS
from tools.bench.models import MODELS
from tools.bench.records import Encoder, Run, save

HEADER = {"card": "a card", "torch": "2.11.0", "date": "2026-01-01", "command": "python -m x"}
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def record(variant: str, ms: float, batch: int = 64, **more: Any) -> Encoder:
    facts = {"cosine": 0.9998, "back_to_back_ms": ms / 2, "weight_bytes": 3 << 20}
    return Encoder("vit-b-16", batch, 197, variant, ms, **{**facts, "peak_bytes": 1 << 20, **more})


def run_of(*records: Encoder, **header: str) -> Run:
    return Run({**HEADER, **header}, encoders=list(records))


FULL = run_of(
    record("bf16-max-autotune", 12.0),
    record("graphquant", 4.0, back_to_back_ms=3.0, weight_bytes=5 << 20),
    record("bf16-reduce-overhead", 1.0, 1),
    record("graphquant-reduce-overhead", 0.5, 1, back_to_back_ms=0.4),
)


def rows(page: str | None) -> list[list[str]]:
    assert page is not None
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_one_line_for_each_encoder() -> None:
    assert rows(summary.page([FULL])) == [
        [
            *("ViT-B/16, 224 px", "64 x 197", "12.00", "4.000", "3.00x", "2.00x", "0.99980"),
            *("1.000", "0.500", "2.00x", "1.25x", "3 to 5", "1 to 1"),
        ]
    ]


def test_ratios_are_within_a_run_and_the_newest_counts() -> None:
    new = run_of(
        record("bf16-max-autotune", 10.0), record("graphquant", 2.0), date="2026-02-02", card="new"
    )
    alone = run_of(record("graphquant", 1.0), date="2026-03-03")
    page = summary.page([FULL, new, alone])
    ((_, _, base, int8, ratio, *_),) = rows(page)
    assert (base, int8, ratio) == ("10.00", "2.000", "5.00x")
    assert page is not None and "- a card, torch" in page and "- new, torch 2.11.0, 2026-02" in page


def test_no_ratio_for_what_is_wrong() -> None:
    bad = record("graphquant", 4.0, cosine=0.9)
    (row,) = rows(summary.page([run_of(record("bf16-max-autotune", 12.0), bad)]))
    assert row[4:6] == ["-", "-"] and row[7:11] == ["-"] * 4
    wrong = Run({**HEADER}, ["int8_linear"], FULL.encoders)
    (row,) = rows(summary.page([wrong]))
    assert row[4] == row[9] == "-"


def test_nothing_to_tell(tmp_path: Path) -> None:
    failed = run_of(record("bf16-max-autotune", 1.0), record("graphquant", 1.0, failed="no"))
    on_cpu = Run({**HEADER, "processor": "a CPU"}, encoders=FULL.encoders)
    for runs in ([], [failed], [on_cpu], [run_of(record("graphquant", 1.0))]):
        assert summary.page(runs) is None
    assert summary.write([], tmp_path) == [] and not list(tmp_path.iterdir())


@needs_matplotlib
def test_write_makes_the_page_and_the_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "performance.json"
    save([FULL], file)
    assert main(["write", str(file)]) == 0
    assert "encoders.md" in capsys.readouterr().out
    page = (tmp_path / "encoders.md").read_text()
    assert "![speed-ups of encoders over bfloat16](encoders.png)" in page
    assert (tmp_path / "encoders.png").read_bytes().startswith(b"\x89PNG")


def test_twenty_encoders_in_their_true_depth() -> None:
    assert len(ENCODERS) == len({name for name, *_ in ENCODERS}) == 20
    assert {name for name, *_ in ENCODERS} == set(summary.NAMES) <= set(MODELS)
    assert summary._name("internvit-6b") == "InternViT-6B, 448 px, 4 of 45 layers"
    assert len(PRESETS["encoders"]) == 40


def test_a_model_of_stages_is_cut_in_each() -> None:
    assert MODELS["swin-b"].cut(4).settings.depths == [2, 2, 4, 2]
    assert MODELS["t5-large"].cut(2).settings.num_layers == 2
