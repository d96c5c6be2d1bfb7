"""Models that accelerate has dispatched: int8 where its hooks allow it, and a reason elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant import Report, UnsupportedInputError, report

accelerate = pytest.importorskip("accelerate", reason="NOT RUN: needs accelerate")
transformers = pytest.importorskip("transformers")
from accelerate.hooks import (  # noqa: E402
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)

CPU = torch.device("cpu")
LAYERS = 10  # more than Dynamo's recompile_limit of 8
LINEARS = 6  # of a layer
PARTS = {"embeddings": "cpu", **{f"encoder.layer.{i}": "cpu" for i in range(LAYERS)}}


@pytest.fixture(autouse=True)
def _new(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[None]:
    if device != "cpu":
        pytest.skip("hooks are the same on a GPU")
    monkeypatch.setattr(report, "_said", set())
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def bert(layers: int = LAYERS) -> Any:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=layers,
        vocab_size=100,
    )
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        return transformers.BertModel(config, add_pooling_layer=False).eval()


def close(got: Any, want: Any) -> bool:
    got, want = got.last_hidden_state, want.last_hidden_state
    return 0 < float((got - want).norm() / want.norm()) < 0.03


def rehook(block: nn.Module) -> None:
    """Leave the block's own hook, which moves what comes in, and none inside of it."""
    remove_hook_from_submodules(block)
    add_hook_to_module(block, AlignDevicesHook(CPU, io_same_device=True))


def test_a_map_to_one_device_has_no_hooks_and_is_int8(ids: Tensor) -> None:
    want = bert(2)(ids)
    model = accelerate.dispatch_model(bert(2), {"": "cpu"})
    found = graphquant.optimize_(model)
    assert close(model(ids), want) and found.coverage == 1.0
    reports: list[Report] = []
    compiled = torch.compile(
        accelerate.dispatch_model(bert(2), {"": "cpu"}),
        backend="graphquant",
        options={"on_report": reports.append},
    )
    assert close(compiled(ids), want) and Report.merge(reports).coverage == 1.0


def test_blocks_with_a_hook_of_their_own_are_int8_each(ids: Tensor) -> None:
    want = bert()(ids)
    model = accelerate.dispatch_model(bert(), PARTS, force_hooks=True)
    found = []
    for block in model.encoder.layer:
        rehook(block)
        found.append(graphquant.optimize_(block))
    assert close(model(ids), want)
    assert [(len(r.linears), r.coverage) for r in found] == [(LINEARS, 1.0)] * LAYERS
    assert isinstance(model.encoder.layer[0]._hf_hook, AlignDevicesHook)
    for block in model.encoder.layer:
        graphquant.restore_(block)
    torch.testing.assert_close(model(ids).last_hidden_state, want.last_hidden_state)


def test_the_hook_of_an_optimized_block_still_runs(ids: Tensor) -> None:
    class Doubles(AlignDevicesHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return super().post_forward(module, output * 2)

    layer, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)).eval(), torch.randn(5, 32)
    want = layer(x) * 2
    add_hook_to_module(layer, Doubles(CPU))
    found = graphquant.optimize_(layer)
    first = layer(x)
    assert found.coverage == 1.0 and 0 < float((first - want).norm() / want.norm()) < 0.03
    assert torch.equal(layer.forward(x), first), "accelerate's forward runs the hook as well"
    torch.testing.assert_close(copy.deepcopy(layer)(x), want)  # a copy is float
    graphquant.restore_(layer)
    torch.testing.assert_close(layer(x), want)


def test_a_hook_may_come_after_optimize_(ids: Tensor) -> None:
    layer, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)).eval(), torch.randn(5, 32)
    want = layer(x)
    found = graphquant.optimize_(layer)
    add_hook_to_module(layer, AlignDevicesHook(CPU))
    assert found.coverage == 0.0
    assert 0 < float((layer(x) - want).norm() / want.norm()) < 0.03
    assert found.coverage == 1.0
    graphquant.restore_(layer)
    torch.testing.assert_close(layer(x), want)


def test_hooks_inside_are_refused_and_the_error_says_what_to_do() -> None:
    parts = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "cpu"}
    model = accelerate.dispatch_model(bert(2), parts, force_hooks=True)
    with pytest.raises(UnsupportedInputError, match=r"such as embeddings.*without the hooks"):
        graphquant.optimize_(model)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    on_host = accelerate.cpu_offload(bert(2), CPU)
    on_disk = accelerate.disk_offload(bert(2), tmp_path, CPU)
    for model in (on_host, on_disk, on_disk.encoder.layer[0]):
        with pytest.raises(UnsupportedInputError, match="load weights for every call"):
            graphquant.optimize_(model)
    linear = on_disk.encoder.layer[0].output.dense  # its own hook loads its weight
    with pytest.raises(UnsupportedInputError, match="load weights for every call"):
        graphquant.optimize_(linear)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_torch_compile_of_a_dispatched_model_says_why_it_is_float(
    where: str, ids: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch gives up on accelerate's hooks after 8 modules: results are right, and told."""
    parts = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": where}
    want = bert(2)(ids)
    model = accelerate.dispatch_model(
        bert(2), parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    reports: list[Report] = []
    options = {"on_report": reports.append}
    got = torch.compile(model, backend="graphquant", options=options)(ids)
    error = (got.last_hidden_state - want.last_hidden_state).norm()
    assert error < 0.03 * want.last_hidden_state.norm()
    merged = Report.merge(reports)
    assert len(merged.linears) < 2 * LINEARS
    assert any("hooks of accelerate" in note for note in merged.notes)
    told = [r for r in caplog.records if "hooks of accelerate" in r.getMessage()]
    assert [r.levelname for r in told if r.levelname == "WARNING"] == ["WARNING"], "once"
