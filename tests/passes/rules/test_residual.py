"""A residual behind an int8 linear is added in its epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    compiled,
    linear_bound,
    parameter,
    rewritten,
)

K = 32


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


@pytest.fixture
def fc() -> nn.Linear:
    return nn.Linear(K, K)


FUSED: dict[str, Any] = {
    "residual first": lambda m, x: x + m.fc(x),
    "residual last": lambda m, x: m.fc(x) + x,
    "alpha of one": lambda m, x: torch.add(x, m.fc(x), alpha=1),
    "in place on the linear": lambda m, x: m.fc(x).add_(x),
    "reshape in between": lambda m, x: x + m.fc(x.view(10, K)).view(2, 5, K),
    "two reshapes in between": lambda m, x: x + m.fc(x.view(10, K)).view(5, 2, K).view(2, 5, K),
    "of rows only": lambda m, x: x.view(10, K) + m.fc(x).view(10, K),
    "whole table of parameters": lambda m, x: m.fc(x) + m.table,
}


@pytest.mark.parametrize("name", FUSED)
def test_a_residual_is_added_in_the_epilogue(name: str, x: Tensor, fc: nn.Linear) -> None:
    model = Model(lambda m, x: FUSED[name](m, x), fc=fc, table=parameter(2, 5, K))
    result = rewritten(model, x)
    assert result.counts == {"linear + residual": 1}
    assert "add" not in result.ops()
    assert argument(result.one("int8_linear"), "residual") is not None
    bound = linear_bound(x, fc.weight).view(result.want.shape)
    assert_near(result.got, result.want, bound)


def test_the_residual_may_be_the_result_of_another_linear(x: Tensor) -> None:
    a, b = nn.Linear(K, K), nn.Linear(K, K)
    result = rewritten(Model(lambda m, x: m.a(x) + m.b(x.sin()), a=a, b=b), x)
    assert result.counts == {"linear": 1, "linear + residual": 1}
    assert_near(
        result.got, result.want, linear_bound(x, a.weight) + linear_bound(x.sin(), b.weight)
    )


def test_parallel_branches_are_added_one_after_the_other(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return x + m.attn(h.sin()) + m.mlp(F.gelu(h))

    parts = {"attn": nn.Linear(K, K), "mlp": nn.Linear(K, K)}
    result = rewritten(Model(forward, norm=nn.LayerNorm(K), **parts), x)
    assert result.counts == {"linear + residual": 1, "act_linear + residual": 1}
    assert "add" not in result.ops()
    h = F.layer_norm(x, (K,))
    bound = linear_bound(h.sin(), parts["attn"].weight) + linear_bound(
        F.gelu(h), parts["mlp"].weight
    )
    assert_near(result.got, result.want, bound)


def test_a_block_that_writes_its_own_stream_is_fused(x: Tensor) -> None:
    """x += f(x) on a value that is the model's own; the first one, on its input, stays."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.sin()
        x += m.a(x)
        x += m.b(x)
        return x

    result = rewritten(Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, K)), x)
    assert result.counts == {"linear + residual": 2}


def test_a_stream_that_is_the_callers_is_written_as_before(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x += m.fc(x)
        return x.sin()

    given, twin = x.clone(), x.clone()
    model = Model(forward, fc=fc)
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    assert_near(run(given), model(twin), linear_bound(x, fc.weight))
    assert_near(given, twin, linear_bound(x, fc.weight))
    assert not torch.equal(given, x)


PLAIN: dict[str, Any] = {
    "alpha of two": (lambda m, x: torch.add(x, m.fc(x), alpha=2), 2),
    "a difference": (lambda m, x: x - m.fc(x), 1),
    "a number": (lambda m, x: m.fc(x) + 1.5, 1),
    "twice the same result": (lambda m, x: (y := m.fc(x)) + y, 2),
    "twice the same in two shapes": (lambda m, x: (y := m.fc(x)) + y.view(2, 5, K), 2),
    "result also returned": (lambda m, x: x + (y := m.fc(x)) + y.sin(), 2),
    "transposed in between": (lambda m, x: x.transpose(0, 1) + m.fc(x).transpose(0, 1), 1),
    "rows cut in between": (lambda m, x: x.view(2, 10, 16) + m.fc(x).view(2, 10, 16), 1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_other_sums_are_left_as_they_are(name: str, x: Tensor, fc: nn.Linear) -> None:
    forward, times = PLAIN[name]
    result = rewritten(Model(forward, fc=fc), x)
    assert result.counts == {"linear": 1}
    bound = times * linear_bound(x, fc.weight)
    if name == "transposed in between":
        bound = bound.transpose(0, 1)
    assert_near(result.got, result.want, bound.reshape(result.want.shape))


REFUSED: dict[str, Any] = {
    "a row for all tokens": (
        lambda m, x: m.fc(x) + m.row,
        "the residual is broadcast from (32,)",
    ),
    "positions for all samples": (
        lambda m, x: m.fc(x) + m.positions,
        "the residual is broadcast from (1, 5, 32)",
    ),
    "a linear of one token for all": (
        lambda m, x: x + m.fc(x[:, :1]),
        "the linear's result is broadcast from (2, 1, 32)",
    ),
    "a linear of one row for all": (
        lambda m, x: x + m.fc(x[0, 0]),
        "the linear's result is broadcast from (32,)",
    ),
    "a linear seen as one row for all": (
        lambda m, x: x + m.fc(x[:, 0]).view(2, 1, 32),
        "the linear's result is broadcast from (2, 1, 32)",
    ),
    "another type": (
        lambda m, x: x.double() + m.fc(x),
        "the sum mixes torch.float32 and torch.float64",
    ),
    "integers": (
        lambda m, x: m.fc(x) + (x > 0).long(),
        "the sum mixes torch.float32 and torch.int64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_residual_is_refused_with_a_reason(
    name: str, x: Tensor, fc: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    forward, why = REFUSED[name]
    model = Model(forward, fc=fc, row=parameter(K), positions=parameter(1, 5, K))
    with caplog.at_level("DEBUG", logger="graphquant.passes.apply"):
        result = rewritten(model, x)
    assert any(
        r.message.startswith("residual refused") and why in r.message for r in caplog.records
    )
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight).max())


def test_a_mixed_sum_under_autocast_is_refused(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x + m.fc(x)

    result = compiled(Model(forward, fc=fc), x)
    assert result.counts == {"linear": 1}
    rounding = 2**-7 * (x.abs() @ fc.weight.abs().T + 1)
    assert_near(result.got, result.want, linear_bound(x, fc.weight) + rounding)


def test_the_sum_is_rounded_once_in_half_types(x: Tensor) -> None:
    """More exact than the model's own: no rounding of the linear before the sum."""
    fc, x = nn.Linear(K, K).bfloat16(), (100 * x).bfloat16()
    with torch.no_grad():
        fc.weight.zero_()
    result = rewritten(Model(lambda m, x: x + m.fc(x), fc=fc), x)
    assert result.counts == {"linear + residual": 1}
    assert torch.equal(result.got, (x.float() + fc.bias.float()).bfloat16())


def test_a_sum_that_is_written_later_is_right(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        total = x + m.fc(x)
        rows = total.view(10, K)
        rows.mul_(2)
        return total, rows

    result = rewritten(Model(forward, fc=fc), x)
    bound = 2 * linear_bound(x, fc.weight)
    assert_near(result.got[0], result.want[0], bound)
    assert torch.equal(result.got[1], result.got[0].view(10, K))


def test_a_residual_that_is_written_later_is_read_before(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = x.sin()
        total = h.view(10, K) + m.fc(h).view(10, K)
        h.view(-1).zero_()
        return total, h

    result = rewritten(Model(forward, fc=fc), x)
    assert_near(result.got[0], result.want[0], linear_bound(x.sin(), fc.weight).view(10, K))
    assert not result.got[1].any()


def test_a_reshape_of_dynamic_sizes_moves_onto_the_residual(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        B, S, D = x.shape
        return x + m.fc(x.reshape(B * S, D)).view(B, S, D)

    any_size = torch.export.Dim.DYNAMIC
    model = Model(forward, fc=fc)
    result = rewritten(model, x, sizes={"args": ({0: any_size, 1: any_size},)})
    assert result.counts == {"linear + residual": 1}
    other = torch.randn(3, 7, K)
    assert_near(result.captured.gm(other), model(other), linear_bound(other, fc.weight))


def _class_token(m: Any, x: Tensor) -> Any:
    """CaiT: an expanded token stands in a list, and is the residual."""
    token = m.token.expand(2, -1, -1)
    return token + m.fc(torch.cat([token, x], 1)[:, :1]), None


def _stacked_token(m: Any, x: Tensor) -> Any:
    token = m.token.expand(2, 1, 32)
    return token + m.fc(torch.stack([x, token.expand(2, 5, 32)])[0, :, :1]), token * 2


def _returned_token(m: Any, x: Tensor) -> Any:
    token = m.token.expand(2, 1, 32)
    return token, token + m.fc(x[:, :1])


@pytest.mark.parametrize("forward", [_class_token, _stacked_token, _returned_token])
def test_a_learned_residual_may_stand_in_a_list_as_well(forward: Any) -> None:
    """Whoever reads it first: it becomes an input of the graph for the linear."""
    x, fc = torch.randn(2, 5, 32), nn.Linear(32, 32)
    result = compiled(Model(forward, token=nn.Parameter(torch.randn(1, 1, 32)), fc=fc), x)
    assert result.counts == {"linear + residual": 1}
    got, want = ([v for v in values if v is not None] for values in (result.got, result.want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
