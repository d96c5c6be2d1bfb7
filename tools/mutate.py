"""Do the tests notice faults? Each mutant of `tools.mutants` is made in a copy of the tree.

    python -m tools.mutate                     # all, two at a time; exit code 1 if one lives
    python -m tools.mutate packed numerics     # those of files whose names hold one of these words
    python -m tools.mutate --list              # without running them; stale ones are an error

torch is imported once: the tests of a mutant run in a forked process, whose `graphquant` and
`tests` are those of the copy.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
NEEDED = ("graphquant", "tests", "tools", "pyproject.toml", "docs", "README.md", "constraints.txt")
FAILED = (1, 2)  # pytest's exit codes: tests failed; they could not even be collected


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of files' names, or of what is broken")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one mutant")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--control", action="store_true", help="first the same tests, unchanged")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if _named(m, args.words)]
    usable = [m for m in chosen if _applies(m)]
    for m in chosen:
        if m not in usable:
            print(f"STALE     {_shown(m)}")
        elif args.list:
            print(f"          {_shown(m)}")
    stale = len(chosen) - len(usable)
    if args.list:
        print(f"{len(chosen)} mutants, {stale} stale")
        return int(bool(stale))
    controls = [_control(t) for t in dict.fromkeys(m.tests for m in usable)] * args.control
    codes = run([*controls, *usable], args.jobs, args.timeout)
    red = [m for m in controls if codes[m]]
    living = [m for m in usable if not _killed(codes[m])]
    print(
        f"{len(usable) - len(living)} of {len(chosen)} killed, {len(living)} living, {stale} stale"
        + f"; {len(red)} of {len(controls)} tests red without them" * args.control
    )
    return int(bool(living or red or stale or not chosen))


def _control(tests: str) -> Mutant:
    return Mutant("", "", "", "nothing", tests)


def _killed(code: int) -> bool:
    """A negative one: a crash, or no end within the time."""
    return code in FAILED or code < 0


def _named(m: Mutant, words: Sequence[str]) -> bool:
    return not words or any(word in f"{m.file}: {m.breaks}" for word in words)


def _applies(m: Mutant) -> bool:
    return (ROOT / "graphquant" / m.file).read_text().count(m.old) == 1


def _shown(m: Mutant) -> str:
    if not m.file:
        return f"unchanged: {m.tests}"
    old, new = (" ".join(text.split()) for text in (m.old, m.new))
    return f"{m.file}: {m.breaks}: {old!r} -> {new!r}"


def run(mutants: Sequence[Mutant], jobs: int, timeout: int) -> dict[Mutant, int]:
    """The exit code of each one's tests."""
    _warm()
    codes, waiting = dict[Mutant, int](), list(mutants)
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            copy = Path(tempfile.mkdtemp(prefix="mutant-"))
            running[_start(mutant, copy)] = (mutant, copy, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            for child, (_, _, begun) in running.items():
                if time.monotonic() - begun > timeout:
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.1)
            continue
        mutant, copy, begun = running.pop(pid)
        code = codes[mutant] = os.waitstatus_to_exitcode(status)
        good = _killed(code) if mutant.file else not code
        verdict = (
            ("killed" if good else "SURVIVED") if mutant.file else ("green" if good else "RED")
        )
        took = f"{time.monotonic() - begun:.0f} s, exit code {code}"
        print(f"{verdict:9} {_shown(mutant)} ({took})", flush=True)
        if not good and code:
            print((copy / "log").read_text()[-3000:])
        shutil.rmtree(copy, ignore_errors=True)
    return codes


def _warm() -> None:
    """Import what takes seconds, and nothing of the tree."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; see tests/conftest.py
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.distributed

    torch.set_num_threads(1)  # a pool of threads would not be there in a forked process
    assert not any(name.partition(".")[0] == "graphquant" for name in sys.modules)


def _start(mutant: Mutant, copy: Path) -> int:
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    if mutant.file:
        file = copy / "graphquant" / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        code = _test(mutant, copy)
    finally:
        os._exit(code)


def _test(mutant: Mutant, copy: Path) -> int:
    """In a process of its own: pytest's exit code."""
    log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(copy / "inductor")
    sys.path[:] = [str(copy), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tools", "tests")]:
        del sys.modules[name]
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    return int(pytest.main([*options, *shlex.split(mutant.tests)]))


if __name__ == "__main__":
    sys.exit(main())
