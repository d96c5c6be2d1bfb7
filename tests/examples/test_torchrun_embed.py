"""examples/torchrun_embed.py on two processes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch.distributed.run

from tests.processes import ROOT

pytestmark = pytest.mark.slow  # two processes with real weights


def test_two_processes_embed_what_one_does(example: object) -> None:
    script = ROOT / "examples" / "torchrun_embed.py"
    words = ["--standalone", "--nproc-per-node", "2", script, "--device", "cpu"]
    options = ["--inner", "eager", "--copies", "1", "--batch", "16"]
    command = [sys.executable, "-m", torch.distributed.run.__name__, *words, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.match(r"(\d+) of \1 linears in int8", done.stdout), done.stdout
    rates = re.findall(r"^(\d) process(?:es)? +([\d,]+) sentences/s$", done.stdout, re.MULTILINE)
    (_, alone), (_, together) = ((int(n), float(v.replace(",", ""))) for n, v in rates)
    assert [n for n, _ in rates] == ["1", "2"]
    found = re.search(r"^ratio +([\d.]+),", done.stdout, re.MULTILINE)
    assert found is not None and float(found[1]) == pytest.approx(together / alone, rel=0.05)
    found = re.search(r"^difference +([\d.e+-]+) of an embedding", done.stdout, re.MULTILINE)
    assert found is not None and float(found[1]) < 1e-3
