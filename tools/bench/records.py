"""What was measured, as JSON; which baseline counts, and which speed-up may be told.

    {"runs": [{"card": ..., "driver": ..., "torch": ..., ..., "date": ..., "command": ...,
               "wrong_ops": [], "encoders": [{...}, ...], "ops": [{...}, ...]}, ...]}

A run is one process on one machine. Speed-ups are ratios within one run, never between two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from graphquant.cli.doctor import environment
from graphquant.ops import cpu
from graphquant.ops.runtime.device import processor
from graphquant.utils import serialization
from tools.bench.variants import FLOAT

MIN_COSINE = 0.999  # of a variant's output to the float32 model's: under it no speed-up is told
LATE = "not run: the time limit had passed"  # no failure: nothing is known
SKIPPED = "skipped: "  # what a variant needs is not there: no failure either
PROCESSOR, ISA = "processor", "instruction set"  # in the header of a run on a CPU
OUTPUTS = ("--json", "--markdown", "--chart")  # of a command: where to, not what


@dataclass(frozen=True)
class Encoder:
    """One variant of one model at one batch.

    ms, host_ms   median of one call: until the device has finished, and until the call returns; on
                  a CPU ms is the minimum
    cpu_ms        on a CPU: the minimum of the processor's time in all threads
    back_to_back_ms  median per call of calls that start without waiting for the one before; None on
                  a CPU
    spread        how far the 10th and 90th percentile of ms are apart, relative to the median
    cosine        of the whole output to that of the same weights in float32; worst_cosine of the
                  worst token
    peak_bytes    the most that one call allocates beyond what stands before it: activations and
                  results; with CUDA graphs the call that records, whose memory the graph keeps
    weight_bytes  parameters, buffers and packed weights
    compile_s     the first call; `cached` if Inductor found compiled code of an earlier process
    layers        what the model was cut to; None: it is whole
    threads       of the CPU; None: it ran on a GPU
    linears, int8 how many linears graphquant saw, and how many run in int8
    failed        why there are no numbers
    """

    model: str
    batch: int
    tokens: int
    variant: str
    ms: float | None = None
    cosine: float | None = None
    peak_bytes: int | None = None
    compile_s: float | None = None
    layers: int | None = None
    threads: int | None = None
    host_ms: float | None = None
    cpu_ms: float | None = None
    back_to_back_ms: float | None = None
    spread: float | None = None
    calls: int | None = None
    worst_cosine: float | None = None
    weight_bytes: int | None = None
    cached: bool | None = None
    linears: int | None = None
    int8: int | None = None
    coverage: float | None = None
    failed: str = ""

    @property
    def row(self) -> tuple[Any, ...]:
        """Variants of one row of one run can be compared."""
        return self.model, self.batch, self.layers, self.threads

    @property
    def right(self) -> bool:
        return self.ms is not None and self.cosine is not None and self.cosine >= MIN_COSINE


@dataclass(frozen=True)
class OpTime:
    """One implementation of one op at one shape.

    us, host_us  median of one call: on the device, inside a CUDA graph, and of an eager call until
                 it returns
    bytes        read and written, at least; of a copy: exactly
    error        linears: ||y - y64|| / ||y64||; quantizers: of the worst value, in steps
    N            0 for ops on rows
    detail       what else the op was told: bias, residual, the activation, the norm
    """

    op: str
    M: int
    N: int
    K: int
    variant: str
    us: float | None = None
    detail: str = ""
    host_us: float | None = None
    bytes: int | None = None
    error: float | None = None
    failed: str = ""

    @property
    def row(self) -> tuple[Any, ...]:
        return self.op, self.M, self.N, self.K, "" if self.N else self.detail

    @property
    def tops(self) -> float | None:
        return 2e-6 * self.M * self.N * self.K / self.us if self.us and self.N else None


@dataclass
class Run:
    """wrong_ops: what the check of the ops found; speed-ups are told only if it found nothing."""

    header: dict[str, str]
    wrong_ops: list[str] = field(default_factory=list)
    encoders: list[Encoder] = field(default_factory=list)
    ops: list[OpTime] = field(default_factory=list)

    @property
    def records(self) -> list[Encoder | OpTime]:
        return [*self.encoders, *self.ops]

    @property
    def machine(self) -> str:
        """The processor and its instruction set, of a run on a CPU; else empty."""
        return ", ".join(self.header[k] for k in (PROCESSOR, ISA) if k in self.header)

    def baseline(self, row: tuple[Any, ...], clock: str = "ms") -> Encoder | None:
        """The fastest float variant of a row, compiled or not. clock: a time of Encoder."""
        able = [r for r in self.encoders if r.row == row and r.right and r.variant in FLOAT]
        timed = [r for r in able if getattr(r, clock) is not None]
        return min(timed, key=lambda r: float(getattr(r, clock)), default=None)

    def speedup(self, record: Encoder, clock: str = "ms") -> float | None:
        """Over the row's baseline; None where it may not be told."""
        base = self.baseline(record.row, clock)
        if self.wrong_ops or base is None or not record.right or getattr(record, clock) is None:
            return None
        return float(getattr(base, clock) / getattr(record, clock))


@dataclass(frozen=True)
class Line:
    """A record to show, with the run that it is compared within. number: of the run, from 1."""

    record: Any
    run: Run
    number: int

    @property
    def worth(self) -> int:
        """2: a time to compare, 1: a time alone, 0: none."""
        same = [r for r in self.run.records if r.row == self.record.row and not r.failed]
        return 0 if self.record.failed else 1 + (len(same) > 1)


def header(argv: Sequence[str], *, on_cpu: bool = False) -> dict[str, str]:
    """On what, with what, when and how: without where the results were written to."""
    own = ("onnxruntime", "openvino", "nncf") if on_cpu else ("triton",)
    about = environment(packages := ("torch", *own, "transformers", "torchao"))
    names = (*packages, "graphquant", "python")
    outputs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OUTPUTS:
        outputs.add_argument(name)
    _, kept = outputs.parse_known_args(argv)
    said = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if _counts(name)]
    command = shlex.join([*said, "python", "-m", "tools.bench", *kept])
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    where = {"card": about["device"], "driver": about["driver"]}
    if on_cpu:
        where = {PROCESSOR: processor(), ISA: cpu.missing() or cpu.library().isa.name}
    return {**where, **{n: about[n] for n in names}, "date": date, "command": command}


def _counts(variable: str) -> bool:
    """Does it change what is measured?"""
    ours = variable.startswith(("GRAPHQUANT_", "TORCHINDUCTOR_", "ONEDNN_", "ATEN_CPU_"))
    return ours and not variable.endswith(("_CACHE_DIR", "_THREADS", "_LOCK"))


def reason(error: BaseException) -> str:
    """An error in one short line, without paths of this machine."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"(/[\w.+-]+){2,}/?", "...", f"{type(error).__name__}: {first}")
    return text if len(text) <= 200 else text[:197] + "..."


def short(x: float) -> float:
    """Five digits: more than any clock is good for."""
    return float(f"{x:.5g}")


# --- JSON ---------------------------------------------------------------------------------------


def save(runs: Iterable[Run], file: Path) -> None:
    text = ",\n".join(map(_text, runs))
    file.parent.mkdir(parents=True, exist_ok=True)
    serialization.write(file, f'{{"runs": [\n{text}\n]}}\n'.encode())


def _text(run: Run) -> str:
    """Every record on a line of its own, so that a diff is readable; without default values."""
    parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in run.header.items()]
    parts.append(f'  "wrong_ops": {json.dumps(run.wrong_ops)}')
    for kind in ("encoders", "ops"):
        lines = [json.dumps(_set(record)) for record in getattr(run, kind)]
        body = ",\n".join(f"   {line}" for line in lines)
        parts.append(f'  "{kind}": ' + (f"[\n{body}\n  ]" if lines else "[]"))
    return " {\n" + ",\n".join(parts) + "\n }"


def _set(record: Encoder | OpTime) -> dict[str, Any]:
    usual = {f.name: f.default for f in fields(record)}
    return {k: v for k, v in asdict(record).items() if v != usual[k]}


def load(file: Path) -> list[Run]:
    """Raises ValueError for a file that does not hold runs."""
    try:
        return [_run(d) for d in json.loads(file.read_text())["runs"]]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a file of runs: {type(error).__name__} {error}") from error


def _run(data: dict[str, Any]) -> Run:
    wrong, encoders, ops = (data.pop(name) for name in ("wrong_ops", "encoders", "ops"))
    return Run(data, list(wrong), [Encoder(**r) for r in encoders], [OpTime(**r) for r in ops])


# --- several runs -------------------------------------------------------------------------------


def merge(runs: Iterable[Run]) -> list[Run]:
    """Oldest first, each once."""
    kept: list[Run] = []
    for run in runs:
        kept += [run] * (run not in kept)
    return sorted(kept, key=lambda r: r.header.get("date", ""))


def latest(runs: Sequence[Run], kind: str) -> list[Line]:
    """Of each (row, variant) the newest record that has numbers, in the order first seen.

    kind: "encoders" or "ops". A failure, or a time that its run has nothing to compare with, is
    shown only where there is nothing better, and what was not run at all, for lack of time or of a
    package, never. Processors are kept apart.
    """
    found: dict[tuple[Any, ...], dict[tuple[str, str], Line]] = {}
    for number, run in enumerate(runs, 1):
        tried = (r for r in getattr(run, kind) if not r.failed.startswith((LATE, SKIPPED)))
        for record in tried:
            line, row = Line(record, run, number), found.setdefault((run.machine, *record.row), {})
            key = record.variant, getattr(record, "detail", "")
            if key not in row or line.worth >= row[key].worth:
                row[key] = line
    return [line for row in found.values() for line in row.values()]
