"""The CPU tests on several versions of torch and transformers: a row each in docs/compatibility.md.

    python -m tools.versions                              # three of each, without slow tests
    python -m tools.versions --torch 2.13 --transformers 5.22 5.23 -- tests/test_models.py
    TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" python -m tools.versions

One virtual environment for each torch, in build/versions; transformers is replaced in it. Rows of
versions that are not asked for stay as they are; those that never ran say so.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FOLDER = ROOT / "build" / "versions"
TORCH = ("2.11", "2.12", "2.13")
# The interpreter runs our kernels on the CPU. CPU builds of torch do not bring the Triton they fit.
TRITON = {"2.11": "triton==3.6.*", "2.12": "triton>=3.6,<3.7.1", "2.13": "triton==3.7.1"}
HEAD = "| torch | transformers | Python | passed | failed | skipped | tests | date |\n"
NOT_RUN = "not run"


class Row(NamedTuple):
    torch: str
    transformers: str
    python: str = ""
    passed: str = NOT_RUN
    failed: str = ""
    skipped: str = ""
    tests: str = ""
    date: str = ""

    @property
    def minors(self) -> tuple[str, str]:
        return minor(self.torch), minor(self.transformers)

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |\n"


def minor(version: str) -> str:
    """2.13.0+cpu -> 2.13"""
    return ".".join(version.split(".")[:2])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="MINOR")
    parser.add_argument("--transformers", nargs="+", metavar="MINOR", help="default: the last 3")
    parser.add_argument("--extras", default="test,demo,docs", help="of pyproject.toml")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    args = parser.parse_args(argv)
    wanted = args.transformers or last_minors("transformers", 3)
    rows = [Row(torch, transformers) for torch in args.torch for transformers in wanted]
    write([*rows, *read()])  # what is known counts more than that it shall run
    red = 0
    for torch in args.torch:
        python = made(torch, args.extras)
        for transformers in wanted:
            pip(python, f"transformers=={transformers}.*", f"torch=={version(python, 'torch')}")
            row = tested(python, args.pytest or ["-m", "not slow"])
            red += row.failed != "0"
            print(row, end="", flush=True)
            write([*read(), row])
    return int(bool(red))


def last_minors(package: str, count: int) -> list[str]:
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    known = done.stdout.partition("Available versions: ")[2].partition("\n")[0]
    return list(dict.fromkeys(map(minor, known.split(", "))))[:count]


def made(torch: str, extras: str) -> str:
    """The Python of an environment with this torch, graphquant and what its tests need."""
    folder = FOLDER / f"torch-{torch}"
    python = str(folder / "bin" / "python")
    if not (folder / "made").exists():
        venv.create(folder, clear=True, with_pip=True)
        (folder / "made").touch()
    pip(python, *shlex.split(os.environ.get("TORCH_ARGS", "")), f"torch=={torch}.*")
    pip(python, "-e", f"{ROOT}[{extras}]", TRITON.get(torch, "triton"), f"torch=={torch}.*")
    return python


def pip(python: str, *args: str) -> None:
    quiet = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*quiet, *args], check=True)


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def tested(python: str, arguments: Sequence[str]) -> Row:
    torch, transformers = version(python, "torch"), version(python, "transformers")
    report = FOLDER / f"torch-{torch}-transformers-{transformers}.xml"
    report.unlink(missing_ok=True)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, *arguments], cwd=ROOT, env=env)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tests, today = f"`{shlex.join(arguments)}`", datetime.date.today().isoformat()
    return Row(torch, transformers, python, *map(str, counted(report)), tests, today)


def counted(report: Path) -> tuple[int, int, int]:
    """Passed, failed, skipped; a run that came to no end is one that failed."""
    if not report.exists():
        return 0, 1, 0
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    tests, failures, errors, skipped = (sum(int(s.get(n, 0)) for s in suites) for n in names)
    return tests - failures - errors - skipped, failures + errors, skipped


def read() -> list[Row]:
    text = PAGE.read_text() if PAGE.exists() else ""
    lines = text.partition(HEAD)[2].splitlines()[1:]
    cells = ([c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|")
    return [Row(*row) for row in cells]


def write(rows: Sequence[Row]) -> None:
    """Of several rows of one combination the last counts."""
    text, head, rest = PAGE.read_text().partition(HEAD)
    tail = "".join(line for line in rest.splitlines(keepends=True) if line[:1] != "|")
    kept = sorted({row.minors: row for row in rows}.values(), key=lambda r: _order(r.minors))
    rule = "|---" * len(Row._fields) + "|\n"
    PAGE.write_text(f"{text}{head or HEAD}{rule}{''.join(map(str, kept))}{tail}")


def _order(minors: tuple[str, str]) -> list[list[int]]:
    return [[int(n) for n in one.split(".")] for one in minors]


if __name__ == "__main__":
    sys.exit(main())
