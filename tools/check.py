"""What this machine is, and whether the tests pass on it.

    python -m tools.check           the tests on the CPU; kernels run in Triton's interpreter
    python -m tools.check --gpu     the tests on an NVIDIA GPU
    python -m tools.check --fast    without the tests that take minutes

The exit code is 0 if all is well, 3 if --gpu found no GPU (or no test ran on it), else pytest's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "hypothesis")
NOTHING_CHECKED = 3
PYTEST_FOUND_NONE = 5


@dataclass
class Summary:
    """What was run where, and how it went."""

    environment: dict[str, str]
    device: str  # "cpu" or "cuda"
    exit_code: int
    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def checked(self) -> bool:
        return self.passed + self.failed + self.errors > 0

    def __str__(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.errors} errors, "
        counts += f"{self.skipped} skipped in {self.seconds:.0f} s on {self.device}"
        bad = [f"FAILED {name}" for name in self.failures]
        verdict = "all is well" if self.exit_code == 0 else f"exit code {self.exit_code}"
        return "\n".join([*bad, f"{counts}: {verdict}"])


def environment() -> dict[str, str]:
    """Versions, processor and GPU, for a bug report."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: version(name) for name in PACKAGES}
    found["processor"] = f"{_processor()}, {os.cpu_count()} threads"
    found["device"] = _device()
    found["driver"] = _driver()
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in names if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found (no nvidia-smi)"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True)
    answer = asked.stdout.strip().splitlines()
    return answer[0] if asked.returncode == 0 and answer else "nvidia-smi does not answer"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_tests(device: str, chosen: str | None, fast: bool, jobs: int) -> Summary:
    """Run pytest in a process of its own and count what it says."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "tests", "-q", f"--junitxml={results}"]
        command += ["--device", device]
        command += ["-k", chosen] if chosen else []
        command += ["-m", "not slow"] if fast else []
        command += ["-n", str(jobs)] if jobs > 1 else []
        variables = dict(os.environ)
        if jobs > 1:  # workers with a thread per core each would fight for the cores
            variables.setdefault("OMP_NUM_THREADS", "1")
        print("$", *command, flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
        seconds = time.perf_counter() - start
        return _count(results, Summary(environment(), device, code, seconds=seconds))


def _count(results: Path, summary: Summary) -> Summary:
    if not results.exists():
        return summary
    for case in ET.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
        if "failure" in kinds:
            summary.failed += 1
            summary.failures.append(name)
        elif "error" in kinds:
            summary.errors += 1
            summary.failures.append(name)
        elif "skipped" in kinds:
            summary.skipped += 1
        else:
            summary.passed += 1
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.check", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU")
    p.add_argument("--fast", action="store_true", help="leave out the slow tests")
    p.add_argument("-k", dest="chosen", metavar="EXPR", help="pytest's -k")
    p.add_argument("-n", dest="jobs", type=int, default=1, metavar="N", help="pytest-xdist's -n")
    p.add_argument("--json", metavar="FILE", help="write the summary there")
    args = p.parse_args(argv)

    about = environment()
    for name, value in about.items():
        print(f"{name:13} {value}")
    if args.gpu and not has_gpu():
        summary = Summary(about, "cuda", NOTHING_CHECKED)
        _shout("torch sees no NVIDIA GPU here")
    else:
        device = "cuda" if args.gpu else "cpu"
        summary = run_tests(device, args.chosen, args.fast, args.jobs)
        if args.gpu and not summary.checked and summary.exit_code in (0, PYTEST_FOUND_NONE):
            summary.exit_code = NOTHING_CHECKED
            _shout("no test ran")
        print()
        print(summary)
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary.exit_code


def _shout(why: str) -> None:
    bar = "!" * 72
    print(f"{bar}\n!!  NOTHING WAS CHECKED ON A GPU: {why}\n{bar}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
