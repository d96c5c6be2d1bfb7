"""Code that runs in a process of its own, as a server that loads a file does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import graphquant

ROOT = Path(graphquant.__file__).parents[1]
WITHOUT = """
import sys
sys.modules["graphquant"] = sys.modules["transformers"] = None  # importing one is an error
"""


def in_a_new_process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`code` with these words in sys.argv[1:]; it can import graphquant."""
    words = [sys.executable, "-c", code, *map(str, args)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
