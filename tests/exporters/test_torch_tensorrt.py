"""inner="torch_tensorrt": by a stand-in for Torch-TensorRT's backend, and by the real one's dry run
where it can be imported."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import graphquant
from graphquant import OptionError
from tests.exporters.test_tensorrt import DIM, Layer
from tests.seen import seen
from tests.small import FAR, NEAR, Mlp, error, int8, seeded

REAL = importlib.util.find_spec("torch_tensorrt") is not None
needs_real = pytest.mark.skipif(not REAL, reason="NOT RUN: needs Torch-TensorRT and ModelOpt")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GraphModule, list[Any], Any]]:
    """What the backend is called with. It runs the graph as it stands."""
    made: list[tuple[GraphModule, list[Any], Any]] = []

    def backend(gm: GraphModule, inputs: list[Any], *, options: dict[str, Any]) -> Any:
        made.append((gm, inputs, options))
        return gm.forward

    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    monkeypatch.setitem(registry._COMPILER_FNS, "torch_tensorrt", backend)
    monkeypatch.setitem(registry._BACKENDS, "torch_tensorrt", None)
    return made


def test_the_backend_gets_the_rewritten_graph_and_the_options(calls: list[Any]) -> None:
    model, x = seeded(Mlp).eval(), torch.randn(4, 64)
    run = int8(model, inner="torch_tensorrt", tensorrt={"min_block_size": 1})
    want = int8(model)(x)
    torch._dynamo.reset()
    assert torch.equal(run(x), want)
    ((gm, inputs, options),) = calls
    assert options == {"min_block_size": 1}
    assert len(gm.graph.find_nodes(op="placeholder")) == len(inputs)
    ours = [n for n in gm.graph.nodes if str(n.target).startswith("graphquant.int8_linear")]
    assert len(ours) == 2
    assert all(n.args[3].op == "placeholder" for n in ours)  # wq: no constant of the graph


def test_weights_that_change_are_followed(calls: list[Any]) -> None:
    model, x = seeded(Mlp).eval(), torch.randn(4, 64)
    run = int8(model, inner="torch_tensorrt")
    before = run(x)
    model.load_state_dict(seeded(Mlp, seed=1).state_dict())
    assert error(run(x), model(x)) < NEAR
    assert error(before, model(x)) > FAR
    assert len(calls) == 1


def test_without_torch_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    run = int8(seeded(Mlp).eval(), inner="torch_tensorrt")
    with pytest.raises(
        BackendCompilerFailed,
        match=r'MissingPackageError.*\n?.*pip install "graphquant\[tensorrt\]"',
    ):
        run(torch.randn(4, 64))


@pytest.mark.parametrize("options", [{"tensorrt": True}, {"inner": "tensorrt"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="tensorrt"):
        graphquant.explain(seeded(Mlp).eval(), torch.randn(4, 64), options=options)


def test_an_export_has_no_use_for_them() -> None:
    with pytest.raises(OptionError, match=r"tensorrt is an option of torch\.compile"):
        graphquant.export(seeded(Mlp).eval(), (torch.randn(4, 64),), tensorrt={})


def _encoder() -> tuple[nn.Module, Tensor]:
    on = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 7, DIM, generator=torch.Generator().manual_seed(1))
    return seeded(lambda: nn.Sequential(Layer(), Layer())).eval().to(on), x.to(on)


def _engines(compiled: nn.Module) -> int:
    return sum("_run_on_acc" in name for name, _ in compiled.named_children())


@needs_real
def test_torch_tensorrt_takes_a_program_with_nodes_whole() -> None:
    import torch_tensorrt

    model, x = _encoder()
    options: dict[str, Any] = {"activation": "static", "calibration": seen(model, x)}
    program = graphquant.tensorrt.qdq(graphquant.export(model, (x,), **options))
    for least in (1, 5):
        dry = torch_tensorrt.dynamo.compile(
            program, arg_inputs=[x], dryrun=True, min_block_size=least
        )
        assert _engines(dry) == 1
        (engine,) = (m for n, m in dry.named_children() if "_run_on_acc" in n)
        weights = [
            n
            for n in engine.graph.nodes
            if str(n.target) == "tensorrt.quantize_op.default" and n.args[0].op == "get_attr"
        ]
        # Torch-TensorRT folds constants: these it must not, or the products would be in float
        assert len(weights) == 12


@needs_real
def test_torch_tensorrt_leaves_our_ops_to_torch() -> None:
    import torch_tensorrt

    model, x = _encoder()
    program = graphquant.export(model, (x,))
    dry = torch_tensorrt.dynamo.compile(program, arg_inputs=[x], dryrun=True, min_block_size=1)
    ours = [
        n.target
        for name, part in dry.named_children()
        if "_run_on_acc" in name
        for n in part.graph.nodes
        if str(n.target).startswith("graphquant.")
    ]
    assert not ours and _engines(dry) > 1
    options = {"dryrun": True, "min_block_size": 1, "pass_through_build_failures": True}
    run = int8(model, inner="torch_tensorrt", tensorrt=options)
    want = int8(model)(x)
    torch._dynamo.reset()
    assert error(run(x), want) < 1e-2  # a rounding that falls the other way, at most


@needs_real
@pytest.mark.cuda
def test_an_engine_computes_what_torchs_nodes_do() -> None:
    import torch_tensorrt

    model, x = _encoder()
    options: dict[str, Any] = {"activation": "static", "calibration": seen(model, x)}
    program = graphquant.export(model, (x,), **options)
    engine = torch_tensorrt.dynamo.compile(graphquant.tensorrt.qdq(program), arg_inputs=[x])
    assert error(engine(x), graphquant.tensorrt.qdq(program, ops="torch").module()(x)) < NEAR
