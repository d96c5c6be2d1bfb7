"""torch's own table of compile times has a line for each part of graphquant."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.utils import compilation_time_metrics, compile_times

from graphquant.backend import graphquant


def test_every_part_of_a_compilation_has_a_time() -> None:
    before = {name: len(seconds) for name, seconds in compilation_time_metrics.items()}
    options = {"inner": "eager"}
    with torch.inference_mode():
        torch.compile(nn.Linear(8, 8).eval(), backend=graphquant, options=options)(torch.ones(2, 8))
    table = compile_times()
    assert isinstance(table, str)
    for part in ("capture", "normalize", "recognize", "rule linear", "prepack", "packing"):
        name = f"graphquant: {part}"
        assert len(compilation_time_metrics[name]) == before.get(name, 0) + 1
        assert name in table
