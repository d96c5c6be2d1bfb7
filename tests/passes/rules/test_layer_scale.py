"""A layer scale behind an int8 linear folds into its packed weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.graphs import (
    Model,
    assert_near,
    compiled,
    linear_bound,
    packed,
    parameter,
    rewritten,
)

K, N = 32, 24


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


@pytest.fixture
def fc() -> nn.Linear:
    return nn.Linear(K, N)


def scaled(fc: nn.Module, gamma: Tensor) -> Model:
    return Model(lambda m, x: m.fc(x) * m.gamma, fc=fc, gamma=gamma)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize("size", [(N,), (1, N), (1, 1, N)], ids=str)
def test_a_scale_per_channel_folds(size: tuple[int, ...], kind: str, x: Tensor, fc: Any) -> None:
    gamma = parameter(*size) if kind == "parameter" else torch.randn(*size)
    result = rewritten(scaled(fc, gamma), x)
    assert result.counts == {"linear + layer_scale": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * gamma.abs())


@pytest.mark.parametrize("bias", [True, False])
def test_negative_and_zero_scales_fold_exactly(bias: bool, x: Tensor) -> None:
    fc = nn.Linear(K, N, bias=bias)
    gamma = torch.arange(N) / 8 - 1
    assert (gamma == 0).any()
    result = rewritten(scaled(fc, gamma), x)
    assert result.counts == {"linear + layer_scale": 1}
    assert not result.got[..., gamma == 0].any()
    plain = rewritten(Model(lambda m, x: m.fc(x), fc=fc), x)
    torch.testing.assert_close(result.got, plain.got * gamma)


def test_the_fold_leaves_int8_weights_alone(x: Tensor, fc: nn.Linear) -> None:
    gamma = torch.randn(N)
    ((folded, *others),) = packed(scaled(fc, gamma), x)
    ((plain, *before),) = packed(Model(lambda m, x: m.fc(x), fc=fc), x)
    assert torch.equal(folded, plain)
    assert torch.equal(others[0], before[0] * gamma)
    assert torch.equal(others[-1], fc.bias * gamma)


def test_the_scale_may_come_first(x: Tensor, fc: nn.Linear) -> None:
    model = Model(lambda m, x: m.gamma * m.fc(x), fc=fc, gamma=parameter(N))
    assert rewritten(model, x).counts == {"linear + layer_scale": 1}


def test_a_computed_scale_folds(x: Tensor, fc: nn.Linear) -> None:
    gamma = parameter(N)
    model = Model(lambda m, x: m.fc(x) * (1 + m.gamma.tanh()), fc=fc, gamma=gamma)
    result = rewritten(model, x)
    assert result.counts == {"linear + layer_scale": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * (1 + gamma.tanh()).abs())


def test_two_scales_in_a_row_both_fold(x: Tensor, fc: nn.Linear) -> None:
    a, b = parameter(N), parameter(N)
    result = rewritten(Model(lambda m, x: m.fc(x) * m.a * m.b, fc=fc, a=a, b=b), x)
    assert result.counts == {"linear + layer_scale + layer_scale": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * (a * b).abs())


def test_a_scale_after_the_residual_does_not_fold(x: Tensor) -> None:
    """Not in the first rewrite and not in a second one, which finds the residual fused."""
    fc, gamma = nn.Linear(K, K), parameter(K)
    result = rewritten(Model(lambda m, x: (x + m.fc(x)) * m.gamma, fc=fc, gamma=gamma), x)
    assert result.counts == {"linear + residual": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * gamma.abs())


UNFOLDED: dict[str, Any] = {
    "a scalar tensor": lambda m, y: y * m.scalar,
    "a scalar of one dim": lambda m, y: y * m.one,
    "a number": lambda m, y: y * 0.5,
    "a scale per token": lambda m, y: y * m.tokens,
    "a scale per token and channel": lambda m, y: y * m.all,
    "another result": lambda m, y: y * y.sigmoid(),
    "itself": lambda m, y: y * y,
    "a sum": lambda m, y: y + m.gamma,
    "a quotient": lambda m, y: y / m.gamma,
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_other_products_are_left_as_they_are(name: str, x: Tensor, fc: nn.Linear) -> None:
    parts = {
        "scalar": torch.tensor(3.0),
        "one": torch.tensor([3.0]),
        "tokens": torch.rand(5, 1) + 1,
        "all": torch.rand(5, N) + 1,
        "gamma": torch.rand(N) + 1,
    }
    model = Model(lambda m, x: UNFOLDED[name](m, m.fc(x)), fc=fc, **parts)
    result = rewritten(model, x)
    assert result.counts == {"linear": 1}
    bound = linear_bound(x, fc.weight)
    largest = 2 * fc(x).abs().max() + 3 + bound.max()  # |d(y^2)| <= (2 |y| + e) e
    assert_near(result.got, result.want, bound * largest)


def test_a_scale_per_token_does_not_fold_where_tokens_and_channels_are_as_many() -> None:
    fc, gamma, x = nn.Linear(K, N), parameter(N, 1), torch.randn(2, N, K)
    result = rewritten(scaled(fc, gamma), x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * gamma.abs())


def test_a_scale_behind_a_slice_of_stacked_linears_does_not_fold(x: Tensor) -> None:
    a, b, gamma = nn.Linear(K, N), nn.Linear(K, N), parameter(N)
    model = Model(lambda m, x: m.a(x) * m.gamma - m.b(x), a=a, b=b, gamma=gamma)
    result = rewritten(model, x)
    assert result.counts == {"stack_siblings + linear": 2}
    bound = linear_bound(x, a.weight) * gamma.abs() + linear_bound(x, b.weight)
    assert_near(result.got, result.want, bound)


def test_a_linear_that_is_also_read_unscaled_keeps_its_scale_outside(x: Tensor, fc: Any) -> None:
    model = Model(lambda m, x: ((y := m.fc(x)) * m.gamma, y), fc=fc, gamma=parameter(N))
    result = rewritten(model, x)
    assert result.counts == {"linear": 1}
    assert_near(result.got[1], result.want[1], linear_bound(x, fc.weight))


def test_a_scale_of_more_dims_than_the_result_does_not_fold(x: Tensor, fc: nn.Linear) -> None:
    gamma = parameter(1, 1, 1, N)
    result = rewritten(scaled(fc, gamma), x)
    assert result.counts == {"linear": 1}
    assert result.got.shape == (1, 2, 5, N)
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * gamma.abs())


def test_a_product_of_another_type_does_not_fold(x: Tensor) -> None:
    fc, gamma = nn.Linear(K, N).bfloat16(), parameter(N)
    result = rewritten(scaled(fc, gamma), x.bfloat16())
    assert result.counts == {"linear": 1}
    assert result.got.dtype == torch.float32


def test_a_half_scale_folds_in_float32(x: Tensor) -> None:
    fc, gamma = nn.Linear(K, N).bfloat16(), parameter(N).bfloat16()
    result = rewritten(scaled(fc, gamma), x.bfloat16())
    assert result.counts == {"linear + layer_scale": 1}
    bound = linear_bound(x.bfloat16().float(), fc.weight.float()) * gamma.float().abs()
    assert_near(result.got, result.want, bound)


def test_a_scale_that_the_graph_writes_does_not_fold(x: Tensor, fc: nn.Linear) -> None:
    """It is packed before the call, but the call reads it after the write."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.gamma.mul_(2)
        return m.fc(x) * m.gamma

    gamma = torch.randn(N)
    result = compiled(Model(forward, fc=fc, gamma=gamma.clone()), x, calls=3)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * (8 * gamma).abs())


def test_a_computed_scale_from_a_written_buffer_does_not_fold(x: Tensor, fc: nn.Linear) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x) * (m.gamma + 1)
        m.gamma.mul_(2)
        return y

    gamma = torch.randn(N)
    result = compiled(Model(forward, fc=fc, gamma=gamma.clone()), x, calls=3)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, fc.weight) * (4 * gamma + 1).abs())
