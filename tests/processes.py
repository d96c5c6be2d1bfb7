"""Code that runs in a process of its own, as a server that loads a file does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import graphquant

TIMEOUT = 300  # seconds
ROOT = Path(graphquant.__file__).parents[1]
WITHOUT = """
import sys
sys.modules["graphquant"] = sys.modules["transformers"] = None  # importing one is an error
"""


def in_a_new_process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`code` with these words in sys.argv[1:]; it can import graphquant."""
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        words, capture_output=True, text=True, env=_environment(), timeout=TIMEOUT
    )


def in_a_group(words: Sequence[object], size: int) -> None:
    """Run `python *words rank` for each rank, all at once. Raises AssertionError, with what it
    wrote, for a process that fails; then the others are ended, as they would wait for it."""
    command = [sys.executable, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    every = [
        subprocess.Popen([*command, str(rank)], env=_environment(), **pipes)  # type: ignore[call-overload]
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        ends = [pool.submit(_end, process) for process in every]
        try:
            for end in as_completed(ends):
                code, written = end.result()
                assert code == 0, written
        finally:
            for process in every:
                process.kill()


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    written, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, written


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
