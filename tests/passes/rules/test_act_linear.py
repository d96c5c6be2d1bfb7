"""An activation in front of a linear, gated or not, quantizes on its way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.ops.numerics import ACTIVATIONS
from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    compiled,
    linear_bound,
    parameter,
    rewritten,
)

K, N = 40, 24

# As models write them; test_recognize.py has the other spellings.
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K) * 2


@pytest.fixture
def up() -> Tensor:
    return torch.randn(3, 5, K)


def test_the_table_above_is_complete() -> None:
    assert list(ACTS) == list(ACTIVATIONS)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_before_a_linear_is_fused(act: str, x: Tensor) -> None:
    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: m.fc(ACTS[act](x)), fc=fc), x)
    assert result.counts == {"act_linear": 1}
    assert result.ops() == {"quantize": 1, "getitem": 6, "quantize_weight": 1, "int8_linear": 1}
    assert argument(result.one("quantize"), "act") == act
    assert argument(result.one("quantize"), "up") is None
    assert not result.report.refused
    assert_near(result.got, result.want, linear_bound(ACTS[act](x), fc.weight))


@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "up first"])
@pytest.mark.parametrize("act", ACTS)
def test_every_gated_activation_is_fused(act: str, gate_first: bool, x: Tensor, up: Tensor) -> None:
    def product(x: Tensor, up: Tensor) -> Tensor:
        return ACTS[act](x) * up if gate_first else up * ACTS[act](x)

    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x, up: m.fc(product(x, up)), fc=fc), x, up)
    assert result.counts == {"act_linear": 1}
    made = result.one("quantize")
    assert argument(made, "act") == act
    assert [argument(made, a).name for a in ("x", "up")] == ["args_0", "args_1"]
    assert not result.report.refused
    assert_near(result.got, result.want, linear_bound(product(x, up), fc.weight))


@pytest.mark.parametrize("packed", [True, False], ids=["one linear in halves", "two linears"])
def test_gate_and_up_are_read_from_one_linear(packed: bool, x: Tensor) -> None:
    def halves(m: Any, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1) if packed else (m.gate(x), m.up(x))
        return m.fc(F.silu(gate) * up)

    parts = {"both": nn.Linear(K, 64)} if packed else {n: nn.Linear(K, 32) for n in ("gate", "up")}
    result = rewritten(Model(halves, fc=nn.Linear(32, N), **parts), x)
    first = {"linear": 1} if packed else {"stack_siblings + linear": 2}
    assert result.counts == {**first, "act_linear": 1}
    assert result.ops()["int8_linear"] == 2 and result.ops()["quantize"] == 2


def test_a_product_of_a_value_with_its_own_activation_is_gated(x: Tensor) -> None:
    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: m.fc(F.gelu(x) * x), fc=fc), x)
    made = result.one("quantize")
    assert argument(made, "x") is argument(made, "up")
    assert_near(result.got, result.want, linear_bound(F.gelu(x) * x, fc.weight))


def test_one_of_two_activations_is_the_gate(x: Tensor, up: Tensor) -> None:
    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x, y: m.fc(F.silu(x) * F.gelu(y)), fc=fc), x, up)
    assert result.counts == {"act_linear": 1}
    assert result.refused("activation") == ["read by mul"]
    assert_near(result.got, result.want, linear_bound(F.silu(x) * F.gelu(up), fc.weight))


@pytest.mark.parametrize("gated", [False, True])
def test_views_of_whole_rows_move_in_front(gated: bool, x: Tensor, up: Tensor) -> None:
    def seen(x: Tensor, up: Tensor) -> Tensor:
        y = F.gelu(x) * up if gated else F.gelu(x)
        return y.transpose(0, 1).reshape(15, K)

    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x, up: m.fc(seen(x, up)), fc=fc), x, up)
    assert result.counts == {"act_linear": 1}
    assert_near(result.got, result.want, linear_bound(seen(x, up), fc.weight))


def test_views_that_cut_rows_leave_the_activation_in_float(x: Tensor) -> None:
    fc = nn.Linear(K // 2, N)
    model = Model(lambda m, x: m.fc(F.gelu(x).unflatten(-1, (2, K // 2))), fc=fc)
    result = rewritten(model, x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == ["read by unflatten"]


TWICE = "its result is read by {}; fusing would compute it twice"


def test_an_activation_that_is_also_returned_is_refused(x: Tensor) -> None:
    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: (m.fc(h := F.gelu(x)), h), fc=fc), x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [TWICE.format("linear, the output")]
    torch.testing.assert_close(result.got[1], result.want[1])


def test_an_activation_read_by_a_linear_that_stays_float_is_refused(x: Tensor) -> None:
    parts = {"a": nn.Linear(K, N), "b": nn.Linear(K, N)}
    result = rewritten(Model(lambda m, x: m.a(h := F.gelu(x)) + m.b(h), **parts), x, exclude="b")
    assert result.counts == {"linear + residual": 1}
    assert result.refused("activation") == [TWICE.format("linear")]


def test_an_activation_read_through_another_view_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = F.gelu(x)
        return m.fc(h.flatten(0, 1)), h.transpose(0, 1)

    result = rewritten(Model(forward, fc=nn.Linear(K, N)), x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [TWICE.format("flatten, transpose")]


def test_a_gated_product_that_is_also_returned_is_refused(x: Tensor, up: Tensor) -> None:
    model = Model(lambda m, x, up: (m.fc(h := F.silu(x) * up), h), fc=nn.Linear(K, N))
    result = rewritten(model, x, up)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [TWICE.format("linear, the output")]


def test_a_gate_whose_activation_is_also_returned_is_refused(x: Tensor, up: Tensor) -> None:
    model = Model(lambda m, x, up: (m.fc((g := F.silu(x)) * up), g), fc=nn.Linear(K, N))
    result = rewritten(model, x, up)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [TWICE.format("mul, the output")]


def test_two_linears_on_one_activation_are_fused_as_siblings(x: Tensor) -> None:
    parts = {"a": nn.Linear(K, N), "b": nn.Linear(K, N)}
    result = rewritten(Model(lambda m, x: m.a(h := F.gelu(x)) - m.b(h), **parts), x)
    assert result.counts == {"stack_siblings + act_linear": 2}


def test_an_activation_in_place_on_its_own_value_is_fused(x: Tensor) -> None:
    parts = {"a": nn.Linear(K, N), "b": nn.Linear(N, N)}
    result = rewritten(Model(lambda m, x: m.b(F.relu(m.a(x), inplace=True)), **parts), x)
    assert result.counts == {"linear": 1, "act_linear": 1}


def test_an_activation_written_after_the_linear_read_it_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(F.gelu(x))
        x.zero_()
        return y

    fc = nn.Linear(K, N)
    result = compiled(Model(forward, fc=fc), x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(F.gelu(x), fc.weight))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda m, u: u > 0, "it reads bool; the ops take float16, bfloat16 and float32"),
        (lambda m, u: (u > 0).int(), "it reads int32; the ops take float16, bfloat16 and float32"),
        (lambda m, u: m.scale, "read by mul"),
        (lambda m, u: u[:, :1], "read by mul"),
        (lambda m, u: 2, "read by mul"),
    ],
    ids=["bool mask", "int mask", "parameter of one row", "broadcast up", "number"],
)
def test_products_that_are_no_gate_are_refused(
    other: Callable[[Any, Tensor], Any], why: str, x: Tensor, up: Tensor
) -> None:
    fc = nn.Linear(K, N)
    model = Model(lambda m, x, u: m.fc(F.relu(x) * other(m, u)), fc=fc, scale=parameter(K))
    result = rewritten(model, x, up)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [why]
    assert_near(result.got, result.want, linear_bound(F.relu(x) * other(model, up), fc.weight))


def test_a_whole_tensor_of_parameters_may_be_the_up(x: Tensor) -> None:
    fc, scale = nn.Linear(K, N), parameter(3, 5, K)
    result = rewritten(Model(lambda m, x: m.fc(F.relu(x) * m.scale), fc=fc, scale=scale), x)
    assert result.counts == {"act_linear": 1}
    assert_near(result.got, result.want, linear_bound(F.relu(x) * scale, fc.weight))


def test_an_activation_of_doubles_is_refused(x: Tensor) -> None:
    fc = nn.Linear(K, N)
    result = rewritten(Model(lambda m, x: m.fc(F.gelu(x).float()), fc=fc), x.double())
    assert result.counts == {"linear": 1}
    why = "it reads float64; the ops take float16, bfloat16 and float32"
    assert result.refused("activation") == [why]


def test_casts_around_a_half_precision_gate_are_seen_through(x: Tensor, up: Tensor) -> None:
    def product(x: Tensor, up: Tensor) -> Tensor:
        return F.silu(x.float()).bfloat16() * up

    x, up = x.bfloat16(), up.bfloat16()
    fc = nn.Linear(K, N).bfloat16()
    result = rewritten(Model(lambda m, x, up: m.fc(product(x, up)), fc=fc), x, up)
    assert result.counts == {"act_linear": 1}
    assert argument(result.one("quantize"), "x").name == "args_0"
    h = product(x, up).float()
    rounding = 2**-7 * (h.abs() @ fc.weight.float().abs().T + 1)
    assert_near(result.got, result.want, linear_bound(h, fc.weight) + rounding)


def test_an_activation_that_no_linear_reads_is_refused(x: Tensor) -> None:
    result = rewritten(Model(lambda m, x: F.gelu(m.fc(x)), fc=nn.Linear(K, N)), x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == ["read by the output"]


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
FINE = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize("low", NARROW)
def test_a_float8_cast_behind_an_activation_is_kept(low: torch.dtype) -> None:
    """Its steps are coarser than int8's."""
    x, fc = torch.randn(4, 32), nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(F.gelu(x).to(low).float()), norm=nn.LayerNorm(32), fc=fc)
    result = compiled(model, x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(F.gelu(x).to(low).float(), fc.weight))


@pytest.mark.parametrize("low", FINE)
def test_a_cast_behind_an_activation_that_hardly_rounds_is_none(low: torch.dtype) -> None:
    x, fc = torch.randn(4, 32), nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(F.gelu(x).to(low).float()), norm=nn.LayerNorm(32), fc=fc)
    result = compiled(model, x)
    assert result.counts == {"act_linear": 1}
    h = F.gelu(x)
    slack = 2**-8 * (h.abs() @ fc.weight.abs().T)  # bfloat16's half step
    assert_near(result.got, result.want, linear_bound(h, fc.weight) + slack)


def test_a_cast_behind_an_activation_that_may_overflow_is_kept() -> None:
    x, fc = torch.rand(4, 32) * 1e6 + 1e5, nn.Linear(32, 8)
    model = Model(lambda m, x: m.fc(F.gelu(x).half().float()), norm=nn.LayerNorm(32), fc=fc)
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    result = compiled(model, x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == [
        "between them is a cast to torch.float16, which may overflow"
    ]
    assert not result.want.isfinite().any() and not result.got.isfinite().any()


def test_a_cast_back_to_the_half_type_behind_an_activation_is_none() -> None:
    x, fc = torch.randn(4, 32).half(), nn.Linear(32, 8).half()
    model = Model(lambda m, x: m.fc(F.gelu(x.float()).half()), norm=nn.LayerNorm(32), fc=fc)
    assert compiled(model, x).counts == {"act_linear": 1}


def test_a_product_or_a_square_may_overflow_a_half_type_where_its_factors_do_not() -> None:
    x, fc = 300 * torch.randn(4, 32).half(), nn.Linear(32, 8).half()
    squared = Model(lambda m, x: m.fc((F.relu(x.float()) ** 2).half()), fc=fc)
    gated = Model(lambda m, x: m.fc((F.silu(x.float()) * x).half()), fc=fc)
    for model in (squared, gated):
        result = compiled(model, x)
        assert result.counts == {"linear": 1}
        assert torch.equal(result.got.isfinite(), result.want.isfinite())


def test_an_activation_of_a_number_is_on_record() -> None:
    fc = nn.Linear(32, 8)
    x = torch.randn(4, 32)
    result = compiled(Model(lambda m, x: m.fc(x) * F.relu(x.sum()) + F.silu(x.mean()), fc=fc), x)
    assert result.counts == {"linear": 1}
    assert result.refused("activation") == ["read by mul", "read by add"]
    torch.testing.assert_close(result.got, result.want, rtol=0.05, atol=0.5)
