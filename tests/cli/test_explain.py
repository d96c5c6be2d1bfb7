"""python -m graphquant explain: the report of graphquant.explain, printed or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphquant import Report, cli


def test_every_linear_of_a_folder_is_explained(
    folders: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, data = tmp_path / "report.txt", tmp_path / "report.json"
    where = ["--out", str(page), "--json", str(data), "--width", "200"]
    assert cli.main(["explain", str(folders / "bert"), *where]) == 0
    assert capsys.readouterr().out == ""
    report, text = Report.from_json(data.read_text()), page.read_text()
    assert len(report.linears) == 7 and report.summary() in text
    assert all(f"│ {outcome.path} " in text for outcome in report.linears)
    assert "\x1b" not in text


def test_json_alone_goes_to_stdout(users: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["explain", f"{users}:mlp", "--json", "-", "--config", "exclude=fc1"]
    assert cli.main(argv) == 0
    report = Report.from_json(capsys.readouterr().out)
    assert [o.refused for o in report.linears] == ["excluded by 'fc1'", ""]
