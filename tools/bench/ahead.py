"""Compilation ahead of the measurements, in several processes, for the caches on disk.

One compilation keeps one core busy, and those of a whole table would take far longer than what they
are for. What a compilation measures itself, to choose between kernels, waits for its turn: one
process at a time has the GPU for that.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphquant.ops import timing
from tools.bench.encoders import Limit, Row, compiling
from tools.bench.models import MODELS, build, inputs
from tools.bench.packages import PACKAGES
from tools.bench.records import LATE, reason
from tools.bench.variants import MissingError, prepare, settings_kept

# Minutes each: they come first, so that none of them is left for the end.
SLOW = ("torchao-int8", "torchao-fp8", "bf16-max-autotune", "bf16-max-autotune-graphs")


@dataclass(frozen=True)
class Task:
    """What one process compiles."""

    model: str
    batch: int
    variant: str
    layers: int | None
    device: str

    @property
    def row(self) -> tuple[str, int]:
        return self.model, self.batch

    @property
    def command(self) -> list[str]:
        words = (self.model, self.batch, self.variant, self.layers or 0, self.device)
        return [sys.executable, "-m", "tools.bench.ahead", *map(str, words)]


def tasks(rows: Sequence[Row], layers: int | None, device: str) -> list[Task]:
    found = [Task(r.model, r.batch, v, layers, device) for r in rows for v in r.variants]
    at_once = ("eager", *PACKAGES)  # AOTInductor's caches do not hold what another process compiled
    compiled = (t for t in dict.fromkeys(found) if t.variant not in at_once)
    return sorted(compiled, key=lambda t: t.variant not in SLOW)


def compile_all(
    todo: Sequence[Task], jobs: int, limit: Limit, say: Callable[[str], None] = print
) -> dict[Task, str]:
    """Run the tasks, `jobs` at once. Those that failed or did not come to an end, and why: what was
    not begun may still be compiled by the measurement.

    What a task leaves is on disk alone: TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, as usual.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        shared = {"GRAPHQUANT_BENCH_LOCK": str(Path(folder, "lock"))}
        environment = {**os.environ, **shared, "TORCHINDUCTOR_COMPILE_THREADS": threads}
        run = functools.partial(_run, environment, limit, say)
        answers = zip(todo, pool.map(run, todo), strict=True)
        return {task: why for task, why in answers if why}


def _run(environment: dict[str, str], limit: Limit, say: Callable[[str], None], task: Task) -> str:
    """Empty if all is well."""
    if limit.passed:
        say(f"{task.model} x {task.batch} {task.variant}: not compiled ahead")
        return ""
    try:
        child = subprocess.run(
            task.command, env=environment, capture_output=True, text=True, timeout=limit.left
        )
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        why = lines[-1] if child.returncode else ""
    except subprocess.TimeoutExpired:
        why = LATE
    say(f"{task.model} x {task.batch} {task.variant}: {why or 'compiled ahead'}")
    return why


def main(argv: Sequence[str]) -> int:
    """One task, in this process."""
    name, batch, variant, layers, device = argv
    model = MODELS[name].cut(int(layers) or None)
    try:
        with taking_turns(Path(os.environ["GRAPHQUANT_BENCH_LOCK"])) as alone:
            with alone():
                net, kwargs = build(model, device), inputs(model, int(batch), device)
            with compiling(), settings_kept():
                prepared = prepare(variant, net)
                prepared.run(**prepared.given(kwargs))
    except MissingError as error:
        print(error, file=sys.stderr)
        return 0  # the benchmark says so itself
    except Exception as error:  # noqa: BLE001 - told in one line
        print(reason(error), file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def taking_turns(lock: Path) -> Iterator[Callable[[], Any]]:
    """Whatever Inductor, Triton and graphquant time in this process has the GPU for itself, among
    all processes with the same lock file. Yields a context manager that does the same."""
    from torch._inductor.runtime.benchmarking import benchmarker

    depth = 0

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        nonlocal depth
        depth += 1
        if depth == 1:
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if depth == 1:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                fcntl.flock(file, fcntl.LOCK_UN)
            depth -= 1

    def in_turn(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def one(*args: Any, **kwargs: Any) -> Any:
            with alone():
                return call(*args, **kwargs)

        return one

    places = [(benchmarker, "benchmark"), (benchmarker, "benchmark_gpu"), (timing, "_time")]
    before = [(place, name, getattr(place, name)) for place, name in places]
    with open(lock, "w") as file:
        for place, name, call in before:
            setattr(place, name, in_turn(call))
        try:
            yield alone
        finally:
            for place, name, call in before:
                setattr(place, name, call)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
