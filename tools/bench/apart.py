"""Rows in processes of their own, several at once: compiling keeps one core busy, and takes far
longer than what it is for.

What a process measures to choose between kernels waits for its turn on the GPU. While it times the
variants of its row, all other processes are stopped (SIGSTOP), so that neither the GPU nor a core
is shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphquant.ops import timing
from tools.bench import encoders
from tools.bench.encoders import Limit, Row
from tools.bench.records import LATE, Encoder, Run, load, save
from tools.bench.timing import CpuTimer, Timer

SETTLE = 0.2  # seconds that the GPU has for what stopped processes had begun


@dataclass(frozen=True)
class Task:
    """A row that one process measures."""

    row: Row
    seconds: float
    device: str

    def command(self, file: Path) -> list[str]:
        words = (file, self.device, self.row.layers or 0, self.seconds)
        row = (self.row.model, self.row.batch, *self.row.variants)
        return [sys.executable, "-m", "tools.bench.apart", *map(str, (*words, *row))]


def measure_all(
    tasks: Sequence[Task],
    jobs: int,
    limit: Limit,
    done: Callable[[list[Encoder]], None],
    say: Callable[[str], None] = print,
) -> None:
    """Measure the rows, `jobs` at once. done: gets the records of each row, in order."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        run = functools.partial(_run, Path(folder), limit, say)
        for records in pool.map(run, tasks):
            done(records)


def _run(folder: Path, limit: Limit, say: Callable[[str], None], task: Task) -> list[Encoder]:
    if limit.passed:
        return encoders.failed(task.row, LATE)
    # one thread each: what fills the cores is the number of jobs
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as own:
        file = Path(own, "records.json")
        command = task.command(file)
        with _started(command, environment, folder) as child:
            try:
                _, said = child.communicate(timeout=limit.left)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                return encoders.failed(task.row, LATE)
        lines = said.strip().splitlines() or [f"exit code {child.returncode}"]
        if child.returncode:
            return encoders.failed(task.row, lines[-1])
        for line in lines:
            if line.startswith(f"{task.row.model} x "):
                say(line)
        return load(file)[0].encoders


@contextlib.contextmanager
def _started(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """A process, known to the others by a file in the folder with the number of its group, to which
    its compile workers belong. When it ends, the others go on, whatever it had stopped."""
    with _lock(folder):  # not while another times its variants
        child = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        file = folder / f"{child.pid}.group"
        file.touch()
    try:
        yield child
    finally:
        file.unlink()
        _signal_others(folder, signal.SIGCONT)


def _signal_others(folder: Path, number: signal.Signals) -> None:
    """To every process of the folder but this one."""
    groups = [int(file.stem) for file in folder.glob("*.group")]
    for group in groups:
        if group != os.getpgrp():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(group, number)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def main(argv: Sequence[str]) -> int:
    """One task, in this process."""
    file, device, layers, seconds, model, batch, *variants = argv
    row = Row(model, int(batch), tuple(variants), int(layers) or None)
    timer = Timer() if device == "cuda" else CpuTimer(1)
    folder = Path(file).parent.parent
    with turns(folder) as (gpu, machine):
        records = encoders.measure(row, timer, seconds=float(seconds), gpu=gpu, machine=machine)
    save([Run({}, encoders=records)], Path(file))
    return 0


Turn = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def turns(folder: Path) -> Iterator[tuple[Turn, Turn]]:
    """Two context managers: one for having the GPU alone among the processes of the folder, and one
    for having the whole machine. Whatever Inductor, Triton and graphquant time in this process
    has the GPU alone."""
    from torch._inductor.runtime.benchmarking import benchmarker

    depth = 0

    @contextlib.contextmanager
    def gpu() -> Iterator[None]:
        nonlocal depth
        with contextlib.ExitStack() as held:
            if depth == 0:
                held.enter_context(_lock(folder))
            depth += 1
            try:
                yield
            finally:
                depth -= 1
                if depth == 0 and torch.cuda.is_available():
                    torch.cuda.synchronize()

    @contextlib.contextmanager
    def machine() -> Iterator[None]:
        with gpu():
            _signal_others(folder, signal.SIGSTOP)
            try:
                time.sleep(SETTLE)
                yield
            finally:
                _signal_others(folder, signal.SIGCONT)

    def in_turn(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def one(*args: Any, **kwargs: Any) -> Any:
            with gpu():
                return call(*args, **kwargs)

        return one

    places = [(benchmarker, "benchmark"), (benchmarker, "benchmark_gpu"), (timing, "_time")]
    before = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, call in before:
        setattr(place, name, in_turn(call))
    try:
        yield gpu, machine
    finally:
        for place, name, call in before:
            setattr(place, name, call)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
