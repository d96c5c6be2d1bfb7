"""What this machine is, and whether the tests pass on it.

    python -m tools.check           the tests on the CPU; kernels run in Triton's interpreter
    python -m tools.check --gpu     the tests on an NVIDIA GPU
    python -m tools.check --fast    without the tests that take minutes

The exit code is 0 if all is well, 3 if --gpu found no GPU (or no test ran on it), else pytest's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from graphquant.cli.doctor import environment
from tools.versions import ROOT, counted

NOTHING_CHECKED = 3
PYTEST_FOUND_NONE = 5


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU")
    p.add_argument("--fast", action="store_true", help="leave out the slow tests")
    p.add_argument("-k", dest="chosen", metavar="EXPR", help="pytest's -k")
    p.add_argument("-n", dest="jobs", type=int, default=1, metavar="N", help="pytest-xdist's -n")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    args = p.parse_args(argv)

    about = environment()
    print("\n".join(f"{name:13} {value}" for name, value in about.items()), flush=True)
    device = "cuda" if args.gpu else "cpu"
    start, code, counts = time.perf_counter(), NOTHING_CHECKED, (0, 0, 0)
    if args.gpu and not torch.cuda.is_available():
        _shout("torch sees no NVIDIA GPU here")
    else:
        code, counts = run_tests(device, args.chosen, args.fast, args.jobs)
        if args.gpu and not sum(counts[:2]) and code in (0, PYTEST_FOUND_NONE):
            code = NOTHING_CHECKED
            _shout("no test ran")
    if args.json:
        summary = dict(zip(("passed", "failed", "skipped"), counts, strict=True))
        facts = {"environment": about, "device": device, "exit_code": code, **summary}
        facts["seconds"] = time.perf_counter() - start
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return code


def run_tests(
    device: str, chosen: str | None, fast: bool, jobs: int
) -> tuple[int, tuple[int, int, int]]:
    """pytest in a process of its own: its exit code, and (passed, failed, skipped)."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--device", device]
    command += ["-k", chosen] if chosen else []
    command += ["-m", "not slow"] if fast else []
    command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    variables = dict(os.environ)
    if jobs > 1:  # threads and compile processes of each worker would fight for the cores
        variables.setdefault("OMP_NUM_THREADS", "1")
        variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    print("$", *command, flush=True)
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        done = subprocess.run([*command, f"--junitxml={results}"], cwd=ROOT, env=variables)
        return done.returncode, counted(results)


def _shout(why: str) -> None:
    bar = "!" * 72
    print(f"{bar}\n!!  NOTHING WAS CHECKED ON A GPU: {why}\n{bar}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
