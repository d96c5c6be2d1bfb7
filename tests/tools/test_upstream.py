"""PyTorch's programs: what differs from eager is a fault, unless it is aot_eager's as well."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from graphquant import backend
from graphquant.ir.graph import aten
from tools.upstream import difference, faults

ONE = torch.arange(6.0).view(2, 3)

OTHERS = [
    ([ONE, ONE], "2 results instead of 1"),
    ([ONE + 1], "Tensor-likes are not close"),
    ([ONE.double()], "torch.float64 instead of .*torch.float32"),
    ([ONE.view(3, 2)], r"\[3, 2\]\), torch.float32 instead of torch.Size\(\[2, 3\]\)"),
    ([ONE.t().contiguous().t()], r"strides \[1, 2\] instead of \[3, 1\]"),
    (RuntimeError("no"), "RuntimeError: no instead of a result"),
]


@pytest.mark.parametrize(("got", "message"), OTHERS, ids=[m for _, m in OTHERS])
def test_what_differs_is_said(got: Any, message: str) -> None:
    assert re.search(message, difference(got, [ONE]))


def test_equal_outcomes_do_not_differ() -> None:
    assert not difference([ONE, None], [ONE.clone(), None])
    assert not difference(RuntimeError("in other"), ValueError("words"))


def test_a_fault_of_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = backend.rewrite

    def broken(captured: Any, config: Any) -> Any:
        for node in captured.gm.graph.nodes:
            if node.target is aten.sin.default:
                node.target = aten.cos.default
        return rewrite(captured, config)

    monkeypatch.setattr(backend, "rewrite", broken)
    found = list(faults(("sine", lambda: torch.sin, (ONE,), {})))
    assert [f.partition(":")[0] for f in found] == ["sine, inner eager", "sine, inner aot_eager"]


def test_what_every_compiler_does_is_no_fault() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_compiling() else x

    assert not list(faults(("compiling", lambda: function, (ONE,), {})))
