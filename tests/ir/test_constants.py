"""What is computed from parameters and from numbers alone is packed; what is not, says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant.ir.constants import Constants
from graphquant.passes.prepack import Literal
from tests.passes.graphs import Model, assert_near, compiled, exported, linear_bound, parameter

K = 32


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


def _reflections(m: Any) -> Tensor:
    """HRA: a product of Householder reflections of unit vectors."""
    u = m.u / m.u.norm(dim=0)
    r = torch.eye(K, device=m.w.device)
    for i in range(m.u.shape[1]):
        r = r @ (torch.eye(K) - 2 * u[:, i : i + 1] @ u[:, i : i + 1].t())
    return m.w @ r


def _cayley(m: Any) -> Tensor:
    """OFT: a rotation of the channels."""
    skew = m.v - m.v.T
    eye = torch.eye(K)
    return m.w @ torch.linalg.solve(eye + skew, eye - skew)


def _written(m: Any) -> Tensor:
    scale = torch.tensor([1.0])
    scale += 2
    return m.w * scale


WEIGHTS: dict[str, Callable[[Any], Tensor]] = {
    "eye": lambda m: m.w + torch.eye(K),
    "eye of two sizes": lambda m: m.w + 2 * torch.eye(K, K),
    "arange": lambda m: m.w * torch.arange(K),
    "arange of a step": lambda m: m.w * torch.arange(1, 2 * K, 2),
    "linspace": lambda m: m.w * torch.linspace(-1, 1, K),
    "full": lambda m: m.w * torch.full((K,), 3.0),
    "zeros and ones": lambda m: torch.cat([m.w * torch.ones(K), torch.zeros(1, K)]),
    "ones_like": lambda m: m.w + torch.ones_like(m.w),
    "a tensor": lambda m: m.w * torch.tensor([2.0]),
    "a tensor of no dims": lambda m: m.w * torch.tensor(2.0),
    "a tensor of bfloat16": lambda m: m.w * torch.tensor([2.0], dtype=torch.bfloat16),
    "a tensor that is written": _written,
    "a triangle": lambda m: m.w.tril() + torch.ones(K, K).triu(1),
    "loha": lambda m: m.w + (m.a @ m.b) * (m.b.T @ m.a.T) * torch.tensor(0.5),
    "hra": _reflections,
    "oft": _cayley,
}


def model(weight: Callable[[Any], Tensor], bias: Callable[[Any], Tensor | None]) -> Model:
    return Model(
        lambda m, x: F.linear(x, weight(m), bias(m)),
        w=parameter(K, K),
        v=torch.nn.Parameter(0.1 * torch.randn(K, K)),
        u=parameter(K, 4),
        a=parameter(K, 4),
        b=parameter(4, K),
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_parameters_and_numbers_is_packed(name: str, x: Tensor) -> None:
    net = model(WEIGHTS[name], lambda m: None)
    result = compiled(net, x, calls=2)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, WEIGHTS[name](net)))


def test_it_is_packed_again_when_a_parameter_changes(x: Tensor) -> None:
    net = model(WEIGHTS["loha"], lambda m: None).eval()
    run = torch.compile(net, backend="graphquant", fullgraph=True, options={"inner": "eager"})
    run(x)
    net.a.mul_(-3)
    assert_near(run(x), net(x), linear_bound(x, WEIGHTS["loha"](net)))


def test_a_bias_of_numbers_alone_keeps_no_linear_in_float(x: Tensor) -> None:
    net = model(lambda m: m.w, lambda m: torch.arange(K) * 0.5)
    result = compiled(net, x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x, net.w))


NO_WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "numbers alone": lambda m, x: torch.eye(K) * 2,
    "a tensor alone": lambda m, x: torch.tensor([[1.0] * K]),
    "random numbers": lambda m, x: m.w * torch.rand(K, K),
    "memory that is not set": lambda m, x: m.w + 0 * torch.empty_like(m.w).fill_(x[0, 0, 0]),
    "an input": lambda m, x: m.w * x.mean(),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_a_weight_of_anything_else_stays_in_float(name: str, x: Tensor) -> None:
    net = Model(lambda m, x: F.linear(x, NO_WEIGHTS[name](m, x)), w=parameter(K, K))
    with torch.random.fork_rng():
        result = compiled(net, x)
    assert result.refused("linear") == ["its weight is not a parameter"]
    if name != "random numbers":
        torch.testing.assert_close(result.got, result.want)


def test_numbers_that_are_written_in_the_graph_are_read_after_the_write(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        e = torch.eye(K)
        e[0] = 2.0
        return F.linear(x, m.w + e)

    net = Model(forward, w=parameter(K, K))
    result = compiled(net, x)
    e = torch.eye(K)
    e[0] = 2.0
    assert_near(result.got, result.want, linear_bound(x, net.w + e))


def test_a_weight_with_one_dim_stays_in_float(x: Tensor) -> None:
    net = Model(lambda m, x: F.linear(x, m.w), w=parameter(K))
    result = compiled(net, x)
    assert result.refused("linear") == ["its weight has 1 dims, not two"]
    torch.testing.assert_close(result.got, result.want)


def test_shared_parts_of_an_expression_are_walked_once() -> None:
    """Else a chain of sixty products with two equal factors takes 2^60 steps."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w
        for _ in range(60):
            w = w * w
        return F.linear(x, w)

    captured = exported(Model(forward, w=parameter(K, K)), torch.randn(2, K))
    constants = Constants(captured.parameters)
    weight = next(n for n in captured.gm.graph.nodes if n.name.startswith("linear")).args[1]
    assert weight in constants
    assert constants.roots_of(weight) == list(captured.parameters)
    assert len(constants.made_from(weight)) == 61


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_literals_are_equal_if_their_values_are(dtype: torch.dtype) -> None:
    value = torch.tensor([[1, 0]]).to(dtype)
    assert Literal.of(value) == Literal.of(value.clone()) != Literal.of(1 - value.int())
    assert Literal.of(value.new_tensor(1)) != Literal.of(value.new_tensor([1]))
    assert hash(Literal.of(value)) == hash(Literal.of(value.clone()))
