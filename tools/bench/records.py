"""What was measured, as JSON; which baseline counts, and which speed-up may be told.

    {"runs": [{"card": ..., "driver": ..., "torch": ..., ..., "date": ..., "command": ...,
               "wrong_ops": [], "encoders": [{...}, ...], "ops": [{...}, ...]}, ...]}

A run is one process on one machine. Speed-ups are ratios within one run, never between two.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import graphquant
from graphquant.cli.doctor import environment, version
from tools.bench.variants import FLOAT

MIN_COSINE = 0.999  # of a variant's output to the float32 model's: under it no speed-up is told
LATE = "not run: the time limit had passed"  # no failure: nothing is known
OUTPUTS = ("--json", "--markdown", "--chart")  # of a command: where to, not what


@dataclass(frozen=True)
class Encoder:
    """One variant of one model at one batch.

    ms, host_ms   median of one call: until the device has finished, and until the call returns
    spread        how far the 10th and 90th percentile of ms are apart, relative to the median
    cosine        of the whole output to that of the same weights in float32; worst_cosine of the
                  worst token
    peak_bytes    the most that one call allocates beyond what stands before it: activations and
                  results; with CUDA graphs the call that records, whose memory the graph keeps
    weight_bytes  parameters, buffers and packed weights
    compile_s     the first call; `cached` if Inductor found compiled code of an earlier process
    layers        what the model was cut to; None: it is whole
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
    host_ms: float | None = None
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
    def row(self) -> tuple[str, int, int | None]:
        """Variants of one row of one run can be compared."""
        return self.model, self.batch, self.layers

    @property
    def right(self) -> bool:
        return self.ms is not None and self.cosine is not None and self.cosine >= MIN_COSINE


@dataclass(frozen=True)
class OpTime:
    """One implementation of one op at one shape.

    us, host_us  median of one call: on the device, inside a CUDA graph, and of an eager call until
                 it returns
    bytes        read and written, at least; of a copy: exactly
    error        linears: ||y - y64|| / ||y64||; quantisers: of the worst value, in steps
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
    def row(self) -> tuple[str, int, int, int, str]:
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

    def baseline(self, row: tuple[Any, ...]) -> Encoder | None:
        """The fastest bfloat16 variant of a row, compiled or not."""
        able = [r for r in self.encoders if r.row == row and r.right and r.variant in FLOAT]
        return min(able, key=lambda r: r.ms or 0.0, default=None)

    def speedup(self, record: Encoder) -> float | None:
        """Over the row's baseline; None where it may not be told."""
        base = self.baseline(record.row)
        if self.wrong_ops or base is None or not record.right:
            return None
        assert base.ms is not None and record.ms is not None  # both are right
        return base.ms / record.ms


@dataclass(frozen=True)
class Line:
    """A record to show, with the run that it is compared within. number: of the run, from 1."""

    record: Any
    run: Run
    number: int

    @property
    def worth(self) -> int:
        """2: a time to compare, 1: a time alone, 0: none."""
        if self.record.failed:
            return 0
        same = [r for r in self.run.records if r.row == self.record.row and not r.failed]
        return 1 + (len(same) > 1)


def header(argv: Sequence[str]) -> dict[str, str]:
    about = environment()
    found = {"card": about["device"], "driver": about["driver"]}
    found |= {name: about[name] for name in ("torch", "triton", "transformers")}
    found["torchao"] = version("torchao")
    found["graphquant"] = graphquant.__version__
    found["python"] = about["python"]
    found["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    found["command"] = _command(argv)
    return found


def _command(argv: Sequence[str]) -> str:
    """What was measured, without where it was written to."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in OUTPUTS:
            next(words, None)
        elif word.partition("=")[0] not in OUTPUTS:
            kept.append(word)
    said = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if _counts(name)]
    return shlex.join([*said, "python", "-m", "tools.bench", *kept])


def _counts(variable: str) -> bool:
    """Does it change what is measured?"""
    ours = variable.startswith(("GRAPHQUANT_", "TORCHINDUCTOR_"))
    return ours and not variable.endswith(("_CACHE_DIR", "_THREADS", "_LOCK"))


def reason(error: BaseException) -> str:
    """An error in one short line, without paths of this machine."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"(/[\w.+-]+){2,}/?", "...", f"{type(error).__name__}: {first}")
    return text if len(text) <= 200 else text[:197] + "..."


# --- JSON ---------------------------------------------------------------------------------------


def short(x: float) -> float:
    """Five digits: more than any clock is good for."""
    return float(f"{x:.5g}")


def save(runs: Iterable[Run], file: Path) -> None:
    data = [
        {
            **run.header,
            "wrong_ops": run.wrong_ops,
            "encoders": [_filled(r) for r in run.encoders],
            "ops": [_filled(r) for r in run.ops],
        }
        for run in runs
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")  # an interrupted run leaves the last whole file
    text = ",\n".join(map(_lines, data))
    new.write_text(f'{{"runs": [\n{text}\n]}}\n')
    new.replace(file)


def load(file: Path) -> list[Run]:
    """Raises ValueError for a file that does not hold runs."""
    try:
        return [_run(d) for d in json.loads(file.read_text())["runs"]]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a file of runs: {type(error).__name__} {error}") from error


def _run(data: dict[str, Any]) -> Run:
    lists = {"wrong_ops", "encoders", "ops"}
    return Run(
        {k: v for k, v in data.items() if k not in lists},
        list(data["wrong_ops"]),
        [Encoder(**r) for r in data["encoders"]],
        [OpTime(**r) for r in data["ops"]],
    )


def _filled(record: Encoder | OpTime) -> dict[str, Any]:
    """Without what is as it would be by itself."""
    usual = {f.name: f.default for f in fields(record)}
    return {k: v for k, v in asdict(record).items() if v != usual[k]}


def _lines(data: dict[str, Any]) -> str:
    """A run with every record on a line of its own, so that a diff is readable."""
    parts = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"   {json.dumps(one)}" for one in value) + "\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return " {\n" + ",\n".join(parts) + "\n }"


# --- several runs -------------------------------------------------------------------------------


def merge(runs: Iterable[Run]) -> list[Run]:
    """Oldest first, each once."""
    kept: list[Run] = []
    for run in runs:
        if run not in kept:
            kept.append(run)
    return sorted(kept, key=lambda r: r.header.get("date", ""))


def latest(runs: Sequence[Run], kind: str) -> list[Line]:
    """Of each (row, variant) the newest record that has numbers, in the order first seen.

    kind: "encoders" or "ops". A failure, or a time that its run has nothing to compare with, is
    shown only where there is nothing better, and what was not run for lack of time not at all.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for number, run in enumerate(runs, 1):
        for record in getattr(run, kind):
            if record.failed == LATE:
                continue
            key = (*record.row, record.detail if kind == "ops" else "", record.variant)
            line = Line(record, run, number)
            if key not in found or line.worth >= found[key].worth:
                found[key] = line
    order: dict[tuple[Any, ...], int] = {}
    for line in found.values():
        order.setdefault(line.record.row, len(order))
    return sorted(found.values(), key=lambda line: order[line.record.row])
