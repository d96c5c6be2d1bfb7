"""Rows of the page of versions: counted from pytest's own report, kept until they run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import versions
from tools.versions import NOT_RUN, Row, counted, minor, read, write

RAN = Row("2.13.0+cpu", "5.22.2", "3.11", "7", "0", "1", "`-k x`", "2030-01-02")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = versions.PAGE.read_text().partition(versions.HEAD)[0]
    monkeypatch.setattr(versions, "PAGE", tmp_path / "page.md")
    versions.PAGE.write_text(f"{text}{versions.HEAD}|---|\n\nWhat follows.\n")
    return versions.PAGE


def test_the_page_has_a_table_that_can_be_read() -> None:
    assert versions.HEAD in versions.PAGE.read_text()
    assert all(row.passed == NOT_RUN or row.passed.isdigit() for row in read())


def test_a_result_replaces_that_of_its_versions_alone(page: Path) -> None:
    write([Row("2.13", "5.22"), Row("2.9", "5.22"), Row("2.13", "5.4")])
    write([*read(), RAN])
    assert read() == [Row("2.9", "5.22"), Row("2.13", "5.4"), RAN]  # by number
    write([Row("2.13", "5.22"), *read()])
    assert read()[-1] == RAN  # to be asked for is no result
    later = RAN._replace(transformers="5.22.3", failed="1")
    write([*read(), later])
    assert read()[-1] == later and len(read()) == 3
    text = page.read_text()
    assert text.startswith("# Versions") and text.endswith("|\n\nWhat follows.\n")


def test_tests_are_counted_from_the_report(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    assert counted(file) == (0, 1, 0)  # pytest came to no end
    file.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    assert counted(file) == (3, 3, 3)


@pytest.mark.parametrize(
    ("version", "want"), [("2.13.0+cpu", "2.13"), ("5.22.2", "5.22"), ("5.9", "5.9")]
)
def test_minor_versions(version: str, want: str) -> None:
    assert minor(version) == want


def test_the_last_minors_are_those_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "t (5.3.1)\nAvailable versions: 5.3.1, 5.3.0, 5.2.9, 5.10.0, 5.1.0\n  INSTALLED: 5.2.9\n"

    def run(*args: Any, **kwargs: Any) -> Any:
        return versions.subprocess.CompletedProcess(args, 0, said)

    monkeypatch.setattr(versions.subprocess, "run", run)
    assert versions.last_minors("t", 3) == ["5.3", "5.2", "5.10"]
