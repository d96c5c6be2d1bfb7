"""The notes on int8 on a CPU or a GPU: none where it is fast, and why where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import graphquant
from graphquant import report
from graphquant.ops import cpu, define
from graphquant.ops.int8_linear import onednn
from graphquant.ops.numerics import ACTIVATIONS, Activation
from graphquant.ops.runtime import chips
from graphquant.ops.runtime.device import GpuProperties
from graphquant.passes import notes
from graphquant.passes.policy import speed
from tests.passes.graphs import Model, compiled

NO_COMPILER = "graphquant's CPU kernels need a C++ compiler: none was found"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 32)


@pytest.fixture(autouse=True)
def _new(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device != "cpu":
        pytest.skip("on a CPU")
    monkeypatch.setattr(report, "_said", set())


@pytest.fixture
def with_dot() -> None:
    if (why := cpu.without_dot()) is not None:
        pytest.skip(why)


def no_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = cpu.InstructionSet("avx2", (), (), has_dot=False)
    library = cpu.Library(isa, cpu.library().module)
    monkeypatch.setattr(cpu, "library", lambda: library)


def model() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)).eval()


def logged(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [r.levelname for r in caplog.records if words in r.getMessage()]


@pytest.mark.usefixtures("with_dot")
def test_where_int8_is_fast_there_is_no_note(x: Tensor) -> None:
    found = compiled(model(), x).report
    assert found.coverage == 1.0 and not found.notes


@pytest.mark.usefixtures("with_dot")
def test_what_select_always_asks_for_is_noted_without_a_dot_product(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_dot(monkeypatch)
    found = compiled(model(), x, select="always").report
    assert found.coverage == 1.0
    (note,) = found.notes
    assert note.startswith(cpu.NO_DOT) and "select='always'" in note
    assert logged(caplog, cpu.NO_DOT) == ["WARNING"]
    left = compiled(model(), x, quantize=False).report
    assert not left.notes


@pytest.mark.usefixtures("with_dot")
@pytest.mark.parametrize("entry", ["compile", "explain", "export"])
def test_without_a_dot_product_every_linear_stays_float_and_one_note_says_so(
    entry: str, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_dot(monkeypatch)
    with caplog.at_level("INFO", logger="graphquant"), torch.inference_mode():
        for _ in range(2):
            if entry == "compile":
                found = compiled(model(), x, select="faster").report
            elif entry == "explain":
                found = graphquant.explain(model(), x, options={"select": "faster"})
            else:
                reports: list[graphquant.Report] = []
                with torch.inference_mode(False), torch.no_grad():
                    graphquant.export(model(), (x,), select="faster", on_report=reports.append)
                (found,) = reports
    assert found.coverage == 0.0 and found.reasons() == {cpu.NO_DOT: 2}
    assert found.notes == (f"{cpu.NO_DOT}: every linear stays float",)
    levels = logged(caplog, "every linear stays float")
    assert levels == ([] if entry == "explain" else ["WARNING", "INFO"])  # once in a process


@pytest.mark.parametrize("exact", [True, False])
def test_without_kernels_the_note_says_why_and_what_computes_int8(
    exact: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: NO_COMPILER)
    monkeypatch.setattr(onednn, "missing", lambda: None if exact else "it saturates")
    found = compiled(model(), x, select="always", inner="eager").report
    assert found.coverage == 1.0
    by = "oneDNN and PyTorch's operators" if exact else "PyTorch's operators"
    assert found.notes == (f"int8 on this CPU is left to {by}: {NO_COMPILER}",)
    assert logged(caplog, NO_COMPILER) == ["WARNING"]


def test_what_is_measured_to_be_slower_without_kernels_is_noted_as_well(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "times", lambda *_: {"float": 1.0, "int8": 2.0})
    found = compiled(model(), x, select="faster").report
    assert found.coverage == 0.0 and (cpu.without_dot() or not found.notes)
    monkeypatch.setattr(cpu, "missing", lambda: NO_COMPILER)
    monkeypatch.setattr(onednn, "missing", lambda: None)
    torch._dynamo.reset()
    found = compiled(model(), x, select="faster").report
    assert found.coverage == 0.0 and [NO_COMPILER in n for n in found.notes] == [True]


def test_without_kernels_and_without_exact_products_every_linear_stays_float(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "missing", lambda: NO_COMPILER)
    monkeypatch.setattr(onednn, "missing", lambda: "it saturates")
    found = compiled(model(), x, select="faster").report
    (note,) = found.notes
    assert found.coverage == 0.0 and "every linear stays float" in note and NO_COMPILER in note


@pytest.mark.usefixtures("with_dot")
def test_a_call_that_the_kernel_refuses_is_noted_with_its_reason(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swish3(x: Tensor) -> Tensor:
        return x * torch.sigmoid(3.0 * x)

    onnx: Any = None
    monkeypatch.setitem(ACTIVATIONS, "swish3", Activation(swish3, onnx))
    two = Model(lambda m, x: m.b(swish3(m.a(swish3(x)))), a=nn.Linear(32, 24), b=nn.Linear(24, 8))
    found = compiled(two.eval(), x).report
    assert found.counts() == {"act_linear": 2}
    assert found.notes == (
        "2 of the calls of quantize are computed by PyTorch's operators: graphquant's CPU kernels "
        "have no swish3",
    )


@pytest.mark.usefixtures("with_dot")
def test_without_a_dot_product_siblings_are_still_stacked(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_dot(monkeypatch)
    siblings = Model(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(32, 8), b=nn.Linear(32, 8))
    found = compiled(siblings, x, select="faster").report
    assert found.counts() == {"stack_siblings": 2} and found.coverage == 0.0


@pytest.mark.parametrize(
    ("sm", "said"),
    [
        (90, ()),
        (103, ("1/30 of fp8's and 1/15 of bfloat16's throughput: int8 is rarely", "never run on")),
        (120, ("compile for sm_120, but were never run on such a GPU",)),
        (110, ("never compiled for sm_110, nor run",)),
    ],
)
def test_what_is_known_of_a_gpu_is_noted(
    sm: int, said: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is on a GPU that is not there: tensors are fake, and so are its properties."""
    with FakeTensorMode():
        x, w = torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")
        gm = make_fx(lambda x, w: nn.functional.linear(x, w), pre_dispatch=True)(x, w)
    assert not list(notes._gpu_notes(gm.graph)), "a graph for another machine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(notes, "gpu_properties", lambda device: GpuProperties(sm, 132, 232_448))
    found = list(notes._gpu_notes(gm.graph))
    assert len(found) == len(said)
    assert all(words in note for words, note in zip(said, found, strict=True))
    assert all(isinstance(n, report.Quiet) == ("never" in n) for n in found)


def test_a_gpu_that_is_too_old_is_refused_with_that_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda:0")
    assert chips.too_old(device) is None, "without a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(define, "missing", lambda: None)
    for sm in (75, 80):
        found = GpuProperties(sm, 40, 65_536)
        monkeypatch.setattr(chips, "gpu_properties", lambda device, found=found: found)
        why = "the GPU is sm_75, graphquant's kernels need sm_80 or later" if sm == 75 else None
        assert define.no_kernels(device) == why
        assert define.no_kernels(torch.device("cpu")) is None
