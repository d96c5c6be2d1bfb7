"""When graphquant itself fails, the graph runs in float and says so; under GRAPHQUANT_STRICT=1 it
raises, which is how all other tests run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import graphquant
from graphquant import GraphquantError, OptionError, Report
from graphquant import backend as backend_module
from graphquant.capture import aten
from graphquant.errors import KernelBuildError, MissingPackageError, UnsupportedInputError
from graphquant.exporters import program
from graphquant.ops import define
from graphquant.ops.runtime import launch
from graphquant.passes import editor, eligibility, pipeline
from graphquant.passes.pipeline import FLOAT_RULES, INT8_RULES
from graphquant.passes.policy.accuracy import AccuracyGate
from graphquant.passes.prepack import Recipe
from tests.small import NEAR, Mlp, again, error, int8, seeded


@pytest.fixture(autouse=True)
def _lenient(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    monkeypatch.delenv("GRAPHQUANT_STRICT")


@pytest.fixture
def model(device: str) -> nn.Module:
    module: nn.Module = seeded(Mlp).to(device).eval()
    return module


class Injected(Exception):
    pass


def fails(*args: Any, **kwargs: Any) -> Any:
    raise Injected("on purpose")


def patched(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, fails)


# Every pass of `rewrite`, every method of every rule, and what follows them.
REWRITE = {
    **{
        name: patched(pipeline, name)
        for name in (
            "normalize",
            "drop_empty_masks",
            "limit_rows",
            "recognize",
            "needs_gradient",
            "written_in_place",
            "enter_all",
            "apply",
            "choose_kernels",
            "merge_equal_views",
            "_gates",
            "_replaced_names",
            "notes_of",
        )
    },
    **{
        f"{rule.name}.{method}": patched(type(rule), method)
        for rule in INT8_RULES
        for method in ("sites", "check", "rewrite")
        if method == "sites" or rule.name in ("norm_linear", "act_linear")
    },
    "Editor.int8_linear": patched(editor.Editor, "int8_linear"),
    "AccuracyGate": patched(AccuracyGate, "__call__"),
    "Editor.smooth": patched(editor.Editor, "smooth"),
}
PASSES = {
    "from_dynamo": patched(backend_module, "from_dynamo"),
    **REWRITE,
    "choose_attention": patched(backend_module, "choose_attention"),
    "prepack": patched(backend_module, "prepack"),
    "Recipe.compute": patched(Recipe, "compute"),
    "build_kernels": patched(backend_module, "build_kernels"),
}


@pytest.mark.parametrize("name", PASSES)
def test_graph_on_which_a_pass_fails_runs_in_float(
    name: str,
    model: nn.Module,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    PASSES[name](monkeypatch)
    if name == "choose_kernels":  # nothing is timed with select="always", as on CUDA in tests
        monkeypatch.delenv("GRAPHQUANT_SELECT", raising=False)
    reports: list[Report] = []
    assert torch.equal(int8(model, reports)(x), model(x))  # not merely near: nothing is left of us
    (report,) = reports
    assert [(o.path, o.M, o.N, o.K) for o in report.linears] == [
        ("fc1", 8, 96, 64),
        ("fc2", 8, 64, 96),
    ]
    assert report.coverage == 0
    assert all("failed: Injected: on purpose (" in o.refused for o in report.linears)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "failed: Injected: on purpose" in warnings[0] and "GRAPHQUANT_STRICT" in warnings[0]


@pytest.mark.parametrize("name", ["from_dynamo", "recognize", "linear.sites", "Recipe.compute"])
def test_strict_raises_what_failed(
    name: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    PASSES[name](monkeypatch)
    monkeypatch.setenv("GRAPHQUANT_STRICT", "1")
    with pytest.raises(BackendCompilerFailed) as seen:
        int8(model)(x)
    assert isinstance(seen.value.inner_exception, Injected)


@pytest.mark.parametrize("rule", FLOAT_RULES, ids=lambda rule: rule.name)
def test_failure_of_a_float_rule_leaves_the_graph_as_it_is(
    rule: Any, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rule), "sites", fails)
    reports: list[Report] = []
    assert torch.equal(int8(model, reports, quantize=False)(x), model(x))
    assert f"rule {rule.name} failed" in reports[0].notes[0]


def test_message_names_the_pass_and_the_line(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Report] = []
    monkeypatch.setattr("graphquant.passes.rules.norm_linear.NormLinear.check", lambda *_: 3)
    int8(model, reports)(x)
    (note,) = reports[0].notes
    assert note.startswith("a graph was left in float: rule norm_linear failed: RuleError: ")
    assert "(passes/apply.py:" in note
    assert "please report it" in note


class Half(nn.Module):
    """Two graphs, of which one has a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()
        return self.mlp(x)


def test_other_graphs_of_the_model_stay_int8(
    device: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(Half).to(device)
    monkeypatch.setattr("graphquant.passes.rules.norm_linear.NormLinear.rewrite", fails)
    reports: list[Report] = []
    assert error(int8(model, reports)(x), model(x)) < NEAR
    assert [r.coverage for r in reports] == [1, 0]


def test_inner_compiler_that_fails_on_our_graph_gets_the_model_s_own(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also Inductor's errors: what it makes of a rewritten graph is ours to answer for."""
    compile_graph, seen = backend_module.compile_graph, []

    def first_fails(gm: Any, inputs: Any, config: Any) -> Any:
        seen.append(gm)
        return compile_graph(gm, inputs, config) if len(seen) == 2 else fails()

    monkeypatch.setattr(backend_module, "compile_graph", first_fails)
    reports: list[Report] = []
    assert torch.equal(int8(model, reports)(x), model(x))
    assert len(seen) == 2 and "inner='eager' failed" in reports[0].notes[0]


def test_inner_compiler_that_fails_on_the_model_itself_raises(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "compile_graph", fails)
    with pytest.raises(BackendCompilerFailed) as seen:
        int8(model)(x)
    assert isinstance(seen.value.inner_exception, Injected)


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_model_too_large_to_be_packed_runs_in_float(
    kind: type[Exception], model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, packed = Recipe.compute, []

    def second_fails(self: Recipe, roots: Any) -> list[Tensor]:
        if packed:
            raise kind("no more")
        packed.append(self)
        return compute(self, roots)

    monkeypatch.setattr(Recipe, "compute", second_fails)
    reports: list[Report] = []
    run = int8(model, reports)
    assert torch.equal(run(x), model(x))
    (note,) = reports[0].notes
    assert f"packing failed: {kind.__name__}: no more" in note
    assert "With more free memory it would be int8" in note
    monkeypatch.undo()
    torch._dynamo.reset()
    assert error(int8(model, reports)(x), model(x)) < NEAR  # what was packed is whole, and of use
    assert reports[-1].coverage == 1


def test_error_in_packing_at_a_call_raises_and_the_next_call_packs_again(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = int8(model)
    run(x)
    model.load_state_dict(seeded(Mlp, 1).state_dict())
    monkeypatch.setattr(Recipe, "compute", fails)
    with pytest.raises(Injected):
        run(x)
    monkeypatch.undo()
    assert error(run(x), again(model)(x)) < NEAR


def test_pack_that_was_written_in_part_is_not_used(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its weights look unchanged by then: it is `refresh` that had it written."""
    run = int8(model)
    run(x)
    compute, written = Recipe.compute, []

    class Stuck(Tensor):
        """Nothing can be copied from it."""

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.copy_:
                raise MemoryError
            return super().__torch_function__(func, types, args, kwargs or {})

    def last_is_stuck(self: Recipe, roots: Any) -> list[Tensor]:
        *others, last = compute(self, roots)
        written.append(self)
        return [*(torch.zeros_like(t) for t in others), last.as_subclass(Stuck)]

    monkeypatch.setattr(Recipe, "compute", last_is_stuck)
    graphquant.refresh()
    with pytest.raises(MemoryError):
        run(x)
    assert written
    monkeypatch.undo()
    for _ in range(2):
        assert error(run(x), model(x)) < NEAR


def test_graph_that_failed_half_way_through_the_capture_is_as_dynamo_gave_it(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retracing a checkpoint leaves something on its body for a while."""
    seen = []

    def looked_at(gm: Any, inputs: Any, config: Any) -> Any:
        seen.extend(m.meta for m in gm.modules() if isinstance(m, torch.fx.GraphModule))
        return gm.forward

    def fails_at_the_end(gm: Any, *inputs: Any) -> Any:
        retrace(gm, *inputs)
        fails()

    retrace = aten._retrace
    monkeypatch.setattr(aten, "_retrace", fails_at_the_end)
    monkeypatch.setattr(backend_module, "compile_graph", looked_at)
    run = int8(lambda x: checkpoint(model, x, use_reentrant=False))
    assert torch.equal(run(x), model(x))
    assert len(seen) == 2 and not any(aten._POLICY in meta for meta in seen)


# What the user asked for --------------------------------------------------------------------------


def test_mistakes_in_what_was_asked_for_raise(model: nn.Module, x: Tensor) -> None:
    with pytest.raises((OptionError, BackendCompilerFailed), match="unknown option"):
        torch.compile(model, backend="graphquant", options={"quantise": True})(x)


def test_missing_package_raises(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackendCompilerFailed) as seen:
        int8(model, inner="torch_tensorrt")(x)
    assert isinstance(seen.value.inner_exception, MissingPackageError)


def test_error_of_on_report_raises(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(BackendCompilerFailed, match="on purpose"):
        int8(model, on_report=fails)(x)


# The other entries --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normalize", "norm_linear.rewrite", "notes_of"])
def test_explain_tells_what_failed(
    name: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    REWRITE[name](monkeypatch)
    report = graphquant.explain(model, x)
    assert [o.path for o in report.linears] == ["fc1", "fc2"] and report.coverage == 0
    assert "failed: Injected: on purpose" in report.notes[0]


def test_optimize_runs_in_float_and_says_so(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = model(x)
    monkeypatch.setattr(pipeline, "recognize", fails)
    report = graphquant.optimize_(model, inner="eager")
    assert torch.equal(model(x), want)
    assert report.coverage == 0 and "recognize failed" in report.notes[0]


@pytest.mark.parametrize("entry", ["compare", "fit_budget", "export", "calibrate"])
def test_entries_that_promise_more_raise_and_name_the_pass(
    entry: str, model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Callable[[], object]] = {
        "compare": lambda: graphquant.compare(model, [x]),
        "fit_budget": lambda: graphquant.fit_budget(model, [x], sqnr=80.0, progress=False),
        "export": lambda: graphquant.export(model, (x,)),
        "calibrate": lambda: graphquant.calibrate(model, [x], progress=False),
    }
    for target in ("passes.pipeline", "calibration.observed"):
        monkeypatch.setattr(f"graphquant.{target}.normalize", fails)
    named = "compare" if entry == "fit_budget" else entry  # with which it begins
    with pytest.raises(
        GraphquantError, match=rf"^{named}: .* failed: Injected: on purpose"
    ) as seen:
        calls[entry]()
    assert not isinstance(seen.value, OptionError)


def test_export_raises_if_packing_fails(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "prepack", fails)
    with pytest.raises(GraphquantError, match=r"^export: packing failed: Injected"):
        graphquant.export(model, (x,))


# What a machine lacks -----------------------------------------------------------------------------


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(launch, "native", launch.native.__wrapped__)


def test_without_triton_the_launcher_says_so(no_triton: None) -> None:
    with pytest.raises(graphquant.UnsupportedInputError, match="need triton, which is not inst"):
        launch.native()


def _no_triton() -> Any:
    raise UnsupportedInputError("graphquant's CUDA kernels need triton, which is not installed")


def _no_compiler() -> Any:
    raise KernelBuildError("graphquant's CUDA kernels need a C compiler")


def _no_driver() -> Any:
    raise OSError("libcuda.so.1 was not found: is the NVIDIA driver installed?")


@pytest.mark.parametrize(
    ("native", "said"),
    [
        (_no_triton, "need triton"),
        (_no_compiler, "need a C compiler"),
        (_no_driver, "is the NVIDIA driver installed"),
    ],
)
def test_machine_says_what_it_lacks(
    native: Callable[[], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(define, "load_kernels", lambda: None)
    monkeypatch.setattr(define, "native", native)
    why = define.missing.__wrapped__()
    assert why is not None and said in why


def test_machine_without_kernels_runs_in_float_with_that_reason(
    x: Tensor, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph where Triton is not installed. (Here the CPU is said to be like that.)"""
    monkeypatch.setattr(eligibility, "no_kernels", lambda device: "triton is not installed")
    reports: list[Report] = []
    assert torch.equal(int8(model, reports)(x), model(x))
    assert reports[0].reasons() == {"triton is not installed": 2}
