"""Modules on int8 levels, what can be asked about them, and the small helpers."""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant.calibration.modelopt.quantizer import QuantizedLinear, Quantizer, quantize_linears_
from graphquant.calibration.utils import (
    export_torch_mode,
    is_quantized,
    is_quantized_column_parallel_linear,
    is_quantized_linear,
    is_quantized_row_parallel_linear,
    is_torch_export_mode,
    replace_function,
    representative_weight_quantizer,
    update_quant_cfg_with_kv_cache_quant,
    weight_attr_names,
)
from graphquant.capture.aten import from_dynamo
from graphquant.config import Config
from graphquant.ops.numerics import quantize_symmetric
from graphquant.passes.pipeline import rewrite
from tests.small import Mlp, error, int8, seeded

# Quantized modules ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_quantized_model_computes_what_the_backend_does() -> None:
    """Both round the same values to the same levels: what differs is the order of float sums, by
    which now and then a value falls on the other side of a half."""
    model, x = seeded(Mlp).eval(), torch.randn(30, 64)
    want = int8(model)(x)
    fake = copy.deepcopy(model)
    assert quantize_linears_(fake) == 2
    assert error(fake(x), want) < 0.1 * error(want, model(x))
    assert fake.fc1.weight_quantizer._amax.shape == (96, 1)
    assert fake.state_dict().keys() >= model.state_dict().keys()


@torch.no_grad()
def test_a_calibration_makes_inputs_static() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(30, 64)
    calibration = graphquant.calibrate(model, [x], progress=False)
    fc1, fc2 = model.fc1, model.fc2
    assert quantize_linears_(model, calibration) == 2
    for path, old in (("fc1", fc1), ("fc2", fc2)):
        quantized = model.get_submodule(path)
        low, high = calibration.range(path) or (0.0, 0.0)
        assert float(quantized.input_quantizer._amax) == max(-low, high)
        assert quantized.weight is old.weight and quantized.bias is old.bias
        assert not quantized.training


def test_a_module_in_two_places_stays_one_and_subclasses_stay() -> None:
    shared = nn.Linear(4, 4)
    mha = nn.MultiheadAttention(8, 2)
    model = nn.ModuleList([shared, nn.Sequential(shared), mha])
    assert quantize_linears_(model) == 1
    assert model[0] is model[1][0] and isinstance(model[0], QuantizedLinear)
    assert not is_quantized(mha)


@pytest.mark.parametrize("shape", [(), (6, 1), (1, 5), (6, 5)])
def test_levels_are_steps_of_amax(shape: tuple[int, ...]) -> None:
    x = torch.randn(6, 5)
    amax = torch.rand(shape) + 0.5
    y = Quantizer(amax)(x)
    step = (amax / 127).double()
    want = (x.double() / step).round().clamp(-127, 127) * step
    # a value at a half step may fall to the other side
    assert ((y - want).abs() < 1e-6).double().mean() > 0.95
    assert ((y - want).abs() <= step * 1.001).all() and (y.abs() <= amax * 1.00001).all()


def test_a_quantizer_without_amax_is_dynamic_and_a_disabled_one_does_nothing() -> None:
    x = torch.randn(6, 50) * torch.logspace(-3, 3, 6)[:, None]
    quantizer = Quantizer()
    assert ((quantizer(x) - x).abs().amax(1) <= (x.amax(1) - x.amin(1)) / 254 * 0.5001).all()
    assert quantizer(x.half()).dtype == torch.float16
    quantizer._disabled = True
    assert quantizer(x) is x
    assert Quantizer(torch.tensor(0.0))(x).abs().max() <= 1e-20


def test_amaxes_stay_float32_and_are_saved_and_loaded() -> None:
    value = torch.tensor(70000.0)  # too large for float16
    quantizer = Quantizer(value)
    held = quantizer._amax
    assert quantizer.half()._amax is held and held.dtype == torch.float32
    for assign in (False, True):
        fresh = Quantizer()
        fresh.load_state_dict(quantizer.state_dict(), assign=assign)
        assert torch.equal(fresh._amax, value) and fresh._amax is not value
    meta = Quantizer(value).to("meta")
    assert meta._amax.is_meta
    meta.load_state_dict(quantizer.state_dict())
    assert float(meta._amax) == 70000


# Export -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("amax", [torch.tensor(2.0), torch.rand(6, 1) + 0.5])
def test_for_export_a_quantizer_is_one_op_with_the_same_levels(amax: Tensor) -> None:
    x, quantizer = torch.randn(6, 50), Quantizer(amax)
    with export_torch_mode():
        program = torch.export.export(quantizer, (x,))
        y = quantizer(x)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert sum("fake_quantize" in t for t in targets) == 1
    assert not any("round" in t for t in targets)
    assert ((y - quantizer(x)).abs() > 1e-6).float().mean() < 0.01
    assert ((y - x).abs() <= amax / 127 * 0.501).logical_or(x.abs() > amax).all()


def test_an_amax_over_two_dims_has_no_export() -> None:
    with export_torch_mode(), pytest.raises(ValueError, match="one dim may be wide"):
        Quantizer(torch.ones(2, 3))(torch.ones(2, 3))


def test_export_mode_nests_and_ends_with_an_exception() -> None:
    with export_torch_mode():
        with pytest.raises(KeyError), export_torch_mode():
            raise KeyError
        assert is_torch_export_mode()
    assert not is_torch_export_mode()


def test_export_mode_is_of_one_thread_and_one_task() -> None:
    seen = []
    with export_torch_mode():
        thread = threading.Thread(target=lambda: seen.append(is_torch_export_mode()))
        thread.start()
        thread.join()

    async def exporting(entered: asyncio.Event, left: asyncio.Event) -> None:
        with export_torch_mode():
            entered.set()
            await left.wait()

    async def both() -> None:
        entered, left = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(exporting(entered, left))
        await entered.wait()
        seen.append(is_torch_export_mode())
        left.set()
        await task

    asyncio.run(both())
    assert seen == [False, False]


# Introspection ----------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A quantizer of another library: known by its attribute."""

    def __init__(self, disabled: bool = False) -> None:
        super().__init__()
        self._disabled = disabled


def test_what_holds_a_quantizer_is_quantized() -> None:
    linear = QuantizedLinear.of(nn.Linear(4, 3))
    assert is_quantized(linear) and is_quantized(nn.Sequential(nn.ReLU(), linear))
    assert is_quantized(Foreign(disabled=True)) and is_quantized(nn.ModuleList([Foreign()]))
    assert not is_quantized(nn.Linear(4, 3)) and not is_quantized(nn.Sequential())


def test_a_graph_with_int8_products_is_quantized() -> None:
    graphs: list[Any] = []

    def keep(gm: Any, inputs: list[Any]) -> Any:
        captured = from_dynamo(gm, inputs)
        assert captured is not None
        graphs.append(captured)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(seeded(Mlp).eval(), backend=keep)(torch.randn(3, 64))
    (captured,) = graphs
    assert not is_quantized(captured.gm)
    rewrite(captured, Config(inner="eager"))
    assert is_quantized(captured.gm)


def test_quantized_linears() -> None:
    linear = QuantizedLinear.of(nn.Linear(4, 3))
    assert is_quantized_linear(linear) and not is_quantized_linear(nn.Linear(4, 3))
    assert not is_quantized_column_parallel_linear(linear)
    linear._is_column_parallel = True
    assert is_quantized_column_parallel_linear(linear)
    assert not is_quantized_row_parallel_linear(linear)
    linear._is_row_parallel = 1
    assert is_quantized_row_parallel_linear(linear)

    table = nn.Embedding(4, 3)
    table.weight_quantizer = table.input_quantizer = Foreign()
    conv = nn.Conv1d(4, 3, 1)
    conv.weight_quantizer = conv.input_quantizer = Foreign()
    row = QuantizedLinear.of(nn.Linear(4, 3))
    row.input_quantizer = nn.Sequential(Foreign())  # type: ignore[assignment]
    no_weight_quantizer = nn.Linear(4, 3)
    no_weight_quantizer.input_quantizer = Foreign()
    for other in (table, conv, row, no_weight_quantizer):
        assert not is_quantized_linear(other)
    grouped = nn.Module()
    grouped.weight0 = nn.Parameter(torch.ones(3, 4))
    grouped.weight_quantizer = grouped.input_quantizer = Foreign()
    assert is_quantized_linear(grouped)
    del grouped.weight0
    assert not is_quantized_linear(grouped)


def test_the_quantizer_that_stands_for_a_weight() -> None:
    one, two = Foreign(), Foreign()
    m = nn.Module()
    assert representative_weight_quantizer(m) is None
    m.weight_quantizer = one
    assert representative_weight_quantizer(m) is one
    m.up_weight_quantizers = nn.ModuleList([two, one])
    assert representative_weight_quantizer(m, "up") is two
    m.down_weight_quantizer = nn.Sequential(one, two)
    assert representative_weight_quantizer(m, "down") is m.down_weight_quantizer
    m.gate_weight_quantizer = nn.ModuleList([one])
    assert representative_weight_quantizer(m, "gate") is one
    for wrong in (nn.ModuleList(), nn.ModuleList([nn.ReLU()]), nn.ReLU(), nn.Sequential(), None):
        m.other_weight_quantizers = wrong
        assert representative_weight_quantizer(m, "other") is None
    m.odd_weight_quantizer = 3
    assert representative_weight_quantizer(m, "odd") is None


def test_the_names_of_quantized_weights() -> None:
    m = nn.Module()
    m.up, m.plain, m.down = (nn.Parameter(torch.ones(2)) for _ in range(3))
    m.also_down = m.down
    m.weight = nn.Parameter(torch.ones(2))
    m.child = QuantizedLinear.of(nn.Linear(2, 2))
    assert list(weight_attr_names(m)) == []
    for name in ("up_", "down_", "also_down_", ""):
        setattr(m, f"{name}weight_quantizer", Foreign())
    assert list(weight_attr_names(m)) == ["weight", "up", "down"]
    m.weight = None
    assert list(weight_attr_names(m)) == ["up", "down"]
    assert list(weight_attr_names(m.child)) == ["weight"]
    free = nn.Module()
    free.weight, free.weight_quantizer = torch.ones(2), Foreign()  # no parameter
    assert list(weight_attr_names(free)) == ["weight"]


# Helpers ----------------------------------------------------------------------------------------


def test_a_function_is_replaced_and_can_call_the_old_one() -> None:
    package = SimpleNamespace(f=lambda x: x + 1)
    old = package.f
    with replace_function(package, "f", lambda x: 10 * package._f(x)):
        assert package.f(1) == 20
        with replace_function(package, "f", lambda x: -package._f(x)):
            assert package.f(1) == -2 and package._f is old
        assert package.f(1) == 20 and package._f is old
    assert vars(package) == {"f": old}


def test_after_an_exception_everything_is_as_before() -> None:
    package = SimpleNamespace(f=1, kept="mine")
    with pytest.raises(ZeroDivisionError), replace_function(package, "f", 0, "kept"):  # type: ignore[arg-type]
        package.kept /= package.f
    assert vars(package) == {"f": 1, "kept": "mine"}
    with pytest.raises(AttributeError), replace_function(package, "g", print):
        pass
    assert vars(package) == {"f": 1, "kept": "mine"}


def test_what_was_inherited_is_inherited_again() -> None:
    class Base:
        @staticmethod
        def f() -> str:
            return "base"

    class Derived(Base):
        pass

    with replace_function(Derived, "f", lambda: "new"):
        assert Derived.f() == "new" and Base.f() == "base"
    assert "f" not in vars(Derived) and "_f" not in vars(Derived)
    with replace_function(Base, "f", lambda: "new"):
        pass
    assert isinstance(vars(Base)["f"], staticmethod) and Derived().f() == "base"


ENTRY = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}}
OFF = {"quantizer_name": "*", "enable": False}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, [OFF, ENTRY]),
        ({"quant_cfg": None, "algorithm": None}, [OFF, ENTRY]),
        ({"quant_cfg": [], "algorithm": ""}, [OFF, ENTRY]),
        ({"quant_cfg": [{"a": [1]}], "algorithm": "max"}, [{"a": [1]}, ENTRY]),
    ],
)
def test_configurations_are_merged_in_a_copy(config: Any, want: Any) -> None:
    before, entries = copy.deepcopy(config), [copy.deepcopy(ENTRY)]
    merged = update_quant_cfg_with_kv_cache_quant(config, entries)
    assert merged["quant_cfg"] == want and merged["algorithm"] == "max"
    merged["quant_cfg"][-1]["cfg"]["num_bits"] = 4
    for entry in merged["quant_cfg"]:
        entry.setdefault("a", []).append(2)
    assert config == before and entries == [ENTRY]


def test_another_algorithm_stays() -> None:
    given = {"quant_cfg": [OFF], "algorithm": {"method": "smoothquant"}, "extra": math.pi}
    merged = update_quant_cfg_with_kv_cache_quant(given, [ENTRY])
    assert merged["algorithm"] == {"method": "smoothquant"} and merged["extra"] == math.pi


def test_quantizers_use_the_levels_of_the_ops() -> None:
    x, amax = torch.randn(4, 32), torch.rand(4, 1) + 1
    xq, scale = quantize_symmetric(x, amax)
    assert torch.equal(Quantizer(amax)(x), xq * scale)
