"""The report's arithmetic, its forms, and that no character of a model's names breaks them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from graphquant import FileError, Outcome, Report

FUSED = Outcome("linear", "block.fc1", "linear", ("norm_linear",), M=10, N=40, K=20)
STACKED = Outcome("linear", "block.q", "linear_1", ("stack_siblings",), M=10, N=20, K=20)
FLOAT = Outcome("linear", "head", "linear_2", refused="excluded by 'head'", M=10, N=4, K=50)
NORM = Outcome("norm", "block.norm", "layer_norm", ("norm_linear",), K=20)
LOST = Outcome("activation", "", "gelu", refused="read by the output", K=20)
REPORT = Report((NORM, FUSED, STACKED, LOST, FLOAT), notes=("a note",))


def linears(*sizes: tuple[int, int, int, bool]) -> Report:
    return Report(
        tuple(
            Outcome("linear", f"fc{i}", "linear", ("linear",) if int8 else (), M=M, N=N, K=K)
            for i, (M, N, K, int8) in enumerate(sizes)
        )
    )


def test_coverage_weighs_linears_by_their_flops() -> None:
    assert FUSED.flops == 2 * 10 * 40 * 20
    assert dataclasses.replace(NORM, M=10, N=40).flops == 0
    assert REPORT.coverage == pytest.approx(8000 / (8000 + 4000 + 2000))


def test_a_linear_that_was_only_stacked_is_not_int8() -> None:
    assert FUSED.int8 and not STACKED.int8 and not NORM.int8 and not FLOAT.int8
    assert STACKED.applied and not FLOAT.applied


def test_coverage_is_zero_without_linears_and_without_rows() -> None:
    assert Report(()).coverage == 0.0
    assert Report((NORM, LOST)).coverage == 0.0
    assert linears((0, 8, 8, True)).coverage == 0.0


size = st.tuples(st.integers(0, 999), st.integers(1, 999), st.integers(1, 999), st.booleans())


@given(st.lists(size, max_size=6), st.lists(size, max_size=6))
def test_coverage_of_a_merge_lies_between_those_of_its_parts(a: Any, b: Any) -> None:
    one, two = linears(*a), linears(*b)
    both = Report.merge([one, two])
    parts = [r.coverage for r in (one, two) if sum(o.flops for o in r.linears)] or [0.0]
    assert min(parts) - 1e-12 <= both.coverage <= max(parts) + 1e-12
    assert both.linears == one.linears + two.linears


def test_a_merge_adds_graphs_and_says_each_note_once() -> None:
    merged = Report.merge(iter([REPORT, REPORT, Report((), graphs=3, notes=("another",))]))
    assert merged.graphs == 5
    assert merged.notes == ("a note", "another")
    assert merged.outcomes == REPORT.outcomes * 2
    assert Report.merge([]) == Report((), graphs=0)


def test_counts_and_reasons_are_of_linears() -> None:
    assert REPORT.counts() == {"norm_linear": 1, "stack_siblings": 1}
    assert REPORT.reasons() == {"excluded by 'head'": 1}
    assert REPORT.applied == (NORM, FUSED, STACKED)
    assert REPORT.refused == (LOST, FLOAT)


def test_the_summary_is_one_line_with_all_of_it() -> None:
    assert REPORT.summary() == (
        "1 of 3 linears in int8, 57.1% of their FLOPs; norm_linear 1, stack_siblings 1; "
        "refused: excluded by 'head' (1)"
    )
    assert "in 2 graphs" in Report.merge([REPORT, REPORT]).summary()
    assert Report(()).summary() == "0 of 0 linears in int8, 0.0% of their FLOPs"


text = st.text(max_size=20)
outcomes = st.builds(
    Outcome,
    st.sampled_from(["linear", "norm", "activation"]),
    text,
    text,
    st.lists(st.sampled_from(["linear", "residual"]), max_size=3).map(tuple),
    text,
    M=st.integers(0, 10**9),
    N=st.integers(0, 10**6),
    K=st.integers(0, 10**6),
    float_us=st.floats(0, 1e6),
    int8_us=st.floats(0, 1e6),
)
reports = st.builds(
    Report, st.lists(outcomes, max_size=4).map(tuple), st.integers(0, 9), st.tuples(text)
)


@given(reports)
def test_json_brings_back_an_equal_report(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json(indent=None)) == report


@given(reports)
def test_any_report_can_be_shown(report: Report) -> None:
    assert "graphquant" in str(report)


def test_json_also_says_what_can_be_computed() -> None:
    data = json.loads(REPORT.to_json())
    assert data["coverage"] == REPORT.coverage
    assert data["counts"] == REPORT.counts()
    assert [o["path"] for o in data["outcomes"]] == [o.path for o in REPORT.outcomes]


def shown(report: Report) -> str:
    page = Console(file=io.StringIO(), width=200, color_system=None)
    page.print(report)
    return page.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_a_row_for_every_outcome() -> None:
    rows = shown(REPORT).splitlines()
    for outcome, words in {
        NORM: ["block.norm", "norm", "norm_linear"],
        FUSED: ["block.fc1", "linear", "10 x 40 x 20", "norm_linear"],
        LOST: ["gelu", "activation", "refused: read by the output"],
        FLOAT: ["head", "linear", "10 x 4 x 50", "refused: excluded by 'head'"],
    }.items():
        assert any(all(w in row for w in words) for row in rows), outcome
    assert "10 x" not in next(row for row in rows if "block.norm" in row)
    assert REPORT.summary() in shown(REPORT).replace("\n", "")
    assert "note: a note" in shown(REPORT)


MARKUP = "[bold] [/] [a-z]+ [red]x[/red]"


@pytest.mark.parametrize("field", ["refused", "path", "node", "note"])
def test_brackets_are_shown_as_they_are(field: str) -> None:
    """A module may be called `layers[a]`, and a reason may quote a regular expression."""
    outcome = dataclasses.replace(FLOAT, path="" if field == "node" else "head")
    if field != "note":
        outcome = dataclasses.replace(outcome, **{field: MARKUP})
    report = Report((outcome,), notes=(MARKUP,) if field == "note" else ())
    assert MARKUP in shown(report) and MARKUP in str(report)
    if field == "refused":
        assert MARKUP in shown(report).rpartition("FLOPs")[2]  # in the summary as well


def test_a_report_and_an_outcome_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.graphs = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FUSED.refused = "x"  # type: ignore[misc]


def test_an_outcome_reads_as_a_line() -> None:
    assert str(FUSED) == "linear block.fc1 10x40x20: norm_linear"
    assert str(LOST) == "activation gelu: refused: read by the output"


def test_what_was_measured_stands_behind_what_was_done() -> None:
    """A refusal for speed names both times in its reason."""
    timed = dataclasses.replace(FUSED, float_us=20.04, int8_us=7.96)
    assert str(timed) == "linear block.fc1 10x40x20: norm_linear (8.0 us, float 20.0 us)"
    slower = dataclasses.replace(FLOAT, float_us=1.0, int8_us=2.0)
    assert str(slower) == str(FLOAT)
    rows = shown(Report((timed, slower))).splitlines()
    assert any("norm_linear (8.0 us, float 20.0 us)" in row for row in rows)
    assert not any("1.0 us" in row for row in rows)
    data = json.loads(Report((timed,)).to_json())
    assert (data["outcomes"][0]["float_us"], data["outcomes"][0]["int8_us"]) == (20.04, 7.96)


def test_a_report_from_before_there_were_times_can_be_read() -> None:
    data = json.loads(REPORT.to_json())
    for outcome in data["outcomes"]:
        del outcome["float_us"], outcome["int8_us"]
    assert Report.from_json(json.dumps(data)) == REPORT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outcomes": 3}, "outcomes must be a list, got 3"),
        ({"outcomes": [3]}, r"outcomes\[0\] must be an object"),
        ({"outcomes": [{}]}, r"it has no outcomes\[0\]\.kind"),
        ({"graphs": "two"}, "graphs must be a whole number"),
        ({"graphs": -1}, "graphs must be a whole number"),
        ({"notes": "note"}, "notes must be a list"),
        ({"notes": [None]}, r"notes\[0\] must be text, got None"),
        ({"more": 1}, "an unknown field 'more'"),
    ],
)
def test_what_is_no_report_is_refused_by_its_field(change: dict[str, Any], said: str) -> None:
    data = {**json.loads(REPORT.to_json()), **change}
    with pytest.raises(FileError, match=f"this is not a report: .*{said}"):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Outcome)])
def test_no_field_of_an_outcome_takes_a_value_of_another_type(name: str) -> None:
    data = json.loads(REPORT.to_json())
    for value in ({}, [[]], None, True, "" if name in ("M", "N", "K") else 10**400):
        data["outcomes"][1][name] = value
        with pytest.raises(FileError, match=rf"outcomes\[1\]\.{name}"):
            Report.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text", ["", "[" * 10**5, "[]", "NaN", "1" * 5000, '{"a": 1, "a": 2}', None]
)
def test_texts_that_are_no_report_are_refused(text: Any) -> None:
    with pytest.raises(FileError, match="this is not a report: "):
        Report.from_json(text)


@given(reports, st.data())
def test_a_report_with_a_flipped_bit_or_cut_is_a_report_or_refused(
    report: Report, data: st.DataObject
) -> None:
    text = bytearray(report.to_json().encode())
    at = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        with pytest.raises(FileError):
            Report.from_json(text[:at].decode())
        return
    text[at] ^= 1 << data.draw(st.integers(0, 6))
    with contextlib.suppress(FileError):
        loaded = Report.from_json(text.decode(errors="replace"))
        assert str(loaded) and Report.from_json(loaded.to_json()) == loaded
