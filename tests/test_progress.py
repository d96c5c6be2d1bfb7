"""What is shown on stderr while graphquant works, and that nothing is where it is no terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant import OptionError
from graphquant.ops import cpu, timing
from graphquant.passes.policy import speed
from graphquant.utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Begin = Callable[[], Terminal]


@pytest.fixture(autouse=True)
def _new() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Makes stderr one, from when it is called: pytest sets its own between fixtures and tests."""

    def begin() -> Terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        found = Terminal()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return begin


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 32)


def model() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval()


def compiled(x: Tensor, **options: Any) -> None:
    given = {"inner": "eager", **options}
    torch.compile(model(), backend="graphquant", options=given)(x)


BARS: dict[str, Callable[..., Any]] = {
    "calibrate": lambda x, **given: graphquant.calibrate(model(), [x, x], **given),
    "compare": lambda x, **given: graphquant.compare(model(), [x, x], **given),
    "fit_budget": lambda x, **given: graphquant.fit_budget(model(), [x, x], sqnr=60.0, **given),
}


@pytest.mark.parametrize("name", BARS)
def test_bars_count_batches_on_a_terminal_and_are_quiet_elsewhere(
    name: str, x: Tensor, on_terminal: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal()
    BARS[name](x)
    assert f"{name}: " in terminal.getvalue()
    if name != "fit_budget":
        assert re.search(rf"{name}: 100%.*2/2", terminal.getvalue())
    else:
        assert "compare: 100%" in terminal.getvalue(), "its comparisons are shown as well"
    for stream, given, shown in (
        (io.StringIO(), {}, False),
        (io.StringIO(), {"progress": True}, True),
        (Terminal(), {"progress": False}, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        BARS[name](x, **given)
        assert bool(stream.getvalue()) is shown


def phases(stream: io.StringIO, title: str) -> set[str]:
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    return {m.strip() for m in re.findall(rf"{title}: (.*?)\s+\d:\d\d:\d\d", text)}


@pytest.fixture
def every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is written when it begins; otherwise the display shows where it is now and then."""
    show = progress._Line._show

    def refreshed(line: Any) -> None:
        show(line)
        line._display.refresh()

    monkeypatch.setattr(progress._Line, "_show", refreshed)


@pytest.mark.usefixtures("every_phase")
def test_a_compilation_shows_its_phases_and_erases_them(x: Tensor, on_terminal: Begin) -> None:
    terminal = on_terminal()
    compiled(x)
    found = phases(terminal, "graphquant")
    assert {"capture", "normalize", "rule norm_linear", "packing", "inner='eager'"} <= found
    assert terminal.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the line is erased"
    assert getattr(progress._shown, "line", None) is None
    terminal = on_terminal()
    graphquant.explain(model(), x)
    assert "rule norm_linear" in phases(terminal, "explain")


@pytest.mark.usefixtures("every_phase")
def test_what_is_measured_is_counted(
    x: Tensor, on_terminal: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (why := cpu.missing() or cpu.without_dot()) is not None:
        pytest.skip(why)
    monkeypatch.setattr(timing, "recall", lambda *_: None)
    monkeypatch.setattr(timing, "_store", lambda *_: None)
    monkeypatch.setattr(timing, "_time_on_cpu", lambda found: dict.fromkeys(found, 1.0))
    assert "cpu" in speed.MEASURED
    terminal = on_terminal()
    compiled(x, select="faster")
    assert any(text.endswith(", 1 measured") for text in phases(terminal, "graphquant"))
    assert any(text.endswith("2 measured") for text in phases(terminal, "graphquant"))


def test_the_phase_stays_in_sight_while_it_lasts(on_terminal: Begin) -> None:
    """A long phase that says nothing, such as Inductor's, is shown with its time."""
    terminal = on_terminal()
    with progress.compilation("graphquant", None), progress.phase("packing"):
        for _ in range(100):
            if phases(terminal, "graphquant") == {"packing"}:
                break
            threading.Event().wait(0.05)
    assert phases(terminal, "graphquant") == {"packing"}


def test_no_terminal_no_line(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, given, shown in (
        (io.StringIO(), {}, False),
        (io.StringIO(), {"progress": True}, True),
        (Terminal(), {"progress": False}, False),
        (None, {}, False),  # a program without a console
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        torch._dynamo.reset()
        compiled(x, **given)
        assert stream is None or bool(stream.getvalue()) is shown


def test_a_failure_takes_the_line_away(on_terminal: Begin) -> None:
    on_terminal()
    shown, within = progress.compilation("graphquant", None), progress.phase("packing")
    with pytest.raises(ValueError, match="x"), shown, within:
        raise ValueError("x")
    assert getattr(progress._shown, "line", None) is None
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("rich."):
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.usefixtures("every_phase")
def test_a_phase_in_another_is_shown_until_it_ends(on_terminal: Begin) -> None:
    terminal = on_terminal()
    with progress.compilation("graphquant", None), progress.phase("outer"):
        with progress.phase("inner"):
            assert progress._shown.line._phases == ["outer", "inner"]
        assert progress._shown.line._phases == ["outer"]
    assert phases(terminal, "graphquant") == {"outer", "inner"}


def test_a_compilation_inside_of_another_is_part_of_its_line(
    on_terminal: Begin,
) -> None:
    on_terminal()
    with progress.compilation("outer", None):
        line = progress._shown.line
        with progress.compilation("inner", True):
            assert progress._shown.line is line
        assert progress._shown.line is line


def test_without_a_line_phases_cost_nothing() -> None:
    with progress.phase("packing"):
        progress.measured()
    assert getattr(progress._shown, "line", None) is None


def test_a_real_terminal_is_seen() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert progress.wanted(None) and not progress.wanted(False)
    os.close(ours)


def test_progress_is_a_bool_or_none() -> None:
    for value in (True, False, None):
        assert graphquant.Config(progress=value).progress is value
    with pytest.raises(OptionError, match="progress must be True, False or None, got 'yes'"):
        graphquant.Config(progress="yes")  # type: ignore[arg-type]
