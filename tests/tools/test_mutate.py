"""The table of faults is well-formed, and the tool says which entries are stale."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from tools import mutate
from tools.mutants import MUTANTS, Mutant


def test_there_are_many_and_each_is_another() -> None:
    assert len(set(MUTANTS)) == len(MUTANTS) >= 60
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.breaks}")
def test_a_mutant_names_a_file_and_its_tests(mutant: Mutant) -> None:
    assert mutant.old != mutant.new and mutant.breaks
    assert (mutate.ROOT / "graphquant" / mutant.file).is_file()
    files = [a for a in shlex.split(mutant.tests) if a.startswith("tests/")]
    assert files and all((mutate.ROOT / file).is_file() for file in files)


def test_a_stale_mutant_is_named_and_an_error(monkeypatch: Any, capsys: Any) -> None:
    """Its text is gone, or stands there more than once."""
    fresh = Mutant("errors.py", "class GraphquantError(", "class Other(", "a name", "tests")
    gone, often = fresh._replace(old="no such text"), fresh._replace(old="class ")
    monkeypatch.setattr(mutate, "MUTANTS", (fresh,))
    assert mutate.main(["--list"]) == 0
    assert "1 mutants, 0 stale" in capsys.readouterr().out
    for stale in (gone, often):
        monkeypatch.setattr(mutate, "MUTANTS", (fresh, stale))
        assert mutate.main(["--list"]) == 1
        assert f"STALE     {mutate._shown(stale)}" in capsys.readouterr().out


def test_words_choose_by_file_and_by_what_breaks() -> None:
    m = Mutant("ops/runtime/cache.py", "a", "b", "tampered files", "tests")
    chosen = [
        words for words in ([], ["cache"], ["tampered"], ["x", "ops/"]) if mutate._named(m, words)
    ]
    assert len(chosen) == 4 and not mutate._named(m, ["packed"])


def test_what_fails_or_crashes_is_killed_and_what_cannot_run_is_not() -> None:
    assert all(map(mutate._killed, (1, 2, -9, -11)))
    assert not any(map(mutate._killed, (0, 3, 4, 5, 99)))
