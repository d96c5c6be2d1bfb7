"""What is shown on stderr while graphquant works: bars over batches, phases of a compilation.

`progress` is True to show it, False not to, and None, the default everywhere, to show it if stderr
is a terminal. What is shown of a compilation is erased at its end.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress
    from tqdm import tqdm

_shown = threading.local()  # .line: the _Line of this thread's compilation


def wanted(progress: bool | None) -> bool:
    """Is something to be shown?"""
    if progress is None:
        return sys.stderr is not None and sys.stderr.isatty()
    return progress


def bar(
    title: str, unit: str, progress: bool | None, batches: Any = None, total: int | None = None
) -> tqdm[Any]:
    """A bar, over these batches or to be updated."""
    from tqdm import tqdm

    return tqdm(batches, title, total, unit=unit, disable=not wanted(progress))


def length(batches: Iterable[Any]) -> int | None:
    """How many there are, if that is known."""
    return len(batches) if isinstance(batches, Sized) else None


class _Line:
    """One line with the phase of a compilation, and how long it has taken so far."""

    def __init__(self, title: str, display: Progress) -> None:
        self._display = display
        self._title = title
        self._phases: list[str] = []
        self._measured = 0
        self._task = display.add_task(title, total=None)

    def enter(self, phase: str) -> None:
        self._phases.append(phase)
        self._show()

    def leave(self) -> None:
        self._phases.pop()
        self._show()

    def measured(self) -> None:
        self._measured += 1
        self._show()

    def _show(self) -> None:
        phase = f": {self._phases[-1]}" if self._phases else ""
        counted = f", {self._measured} measured" if self._measured else ""
        self._display.update(self._task, description=f"{self._title}{phase}{counted}")


@contextmanager
def compilation(title: str, progress: bool | None) -> Iterator[None]:
    """Context of a compilation of this thread, whose phases are shown. One inside of another is
    part of it."""
    if getattr(_shown, "line", None) is not None or not wanted(progress):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # What the model and other libraries print goes where it always goes.
    display = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,  # of a thread that runs beside what is measured
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with display:
        _shown.line = _Line(title, display)
        try:
            yield
        finally:
            _shown.line = None


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Context of a phase, such as "packing", of the compilation that this thread shows, if any."""
    line: _Line | None = getattr(_shown, "line", None)
    if line is None:
        yield
        return
    line.enter(name)
    try:
        yield
    finally:
        line.leave()


def measured() -> None:
    """Something was timed: a count in the line of the compilation, if one is shown."""
    line: _Line | None = getattr(_shown, "line", None)
    if line is not None:
        line.measured()
