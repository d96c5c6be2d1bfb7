"""Linears that read one value become one, exactly."""

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
    packed,
    parameter,
    rewritten,
)


def siblings(*widths: int, K: int = 32, bias: tuple[bool, ...] = ()) -> Model:
    """m(x) = [x @ W0^T + b0, x @ W1^T + b1, ...]"""
    biases = bias or (True,) * len(widths)
    parts = {
        f"p{i}": nn.Linear(K, n, bias=b)
        for i, (n, b) in enumerate(zip(widths, biases, strict=True))
    }
    return Model(lambda m, x: [getattr(m, name)(x) for name in parts], **parts)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 32)


@pytest.mark.parametrize("widths", [(32,) * 2, (32,) * 3, (32,) * 5, (48, 16, 16), (1, 7, 33)])
def test_any_number_of_siblings_of_any_widths_become_one(x: Tensor, widths: Any) -> None:
    model = siblings(*widths)
    result = rewritten(model, x)
    assert result.counts == {"stack_siblings + linear": len(widths)}
    assert result.ops()["int8_linear"] == result.ops()["quantize"] == 1
    assert result.ops()["slice"] == len(widths)
    assert [o.N for o in result.report.linears] == list(widths)
    for i, (got, want) in enumerate(zip(result.got, result.want, strict=True)):
        assert_near(got, want, linear_bound(x, model.get_parameter(f"p{i}.weight")))


@pytest.mark.parametrize("bias", [(True, False, True), (False, True, False), (False,) * 3])
def test_stacked_int8_weights_are_bit_identical_to_separate_ones(x: Tensor, bias: Any) -> None:
    model = siblings(32, 16, 8, bias=bias)
    ((*stacked, stacked_bias),) = packed(model, x) if any(bias) else ([*packed(model, x)[0], None],)
    separate = [packed(Model(lambda m, x: m.fc(x), fc=fc), x)[0] for fc in model.children()]
    for i, tensor in enumerate(stacked):
        assert torch.equal(tensor, torch.cat([s[i] for s in separate]))
    if stacked_bias is not None:
        parts = [
            fc.bias if fc.bias is not None else torch.zeros(fc.out_features)
            for fc in model.children()
        ]
        assert torch.equal(stacked_bias, torch.cat(parts))


def test_stacked_results_are_bit_identical_to_separate_ones(x: Tensor) -> None:
    model = siblings(32, 16, 8, bias=(True, False, True))
    for got, fc in zip(rewritten(model, x).got, model.children(), strict=True):
        assert torch.equal(got, rewritten(Model(lambda m, x: m.fc(x), fc=fc), x).got)


def test_no_bias_at_all_stays_none(x: Tensor) -> None:
    assert (
        argument(rewritten(siblings(32, 32, bias=(False,) * 2), x).one("int8_linear"), "bias")
        is None
    )


def test_a_missing_bias_becomes_zeros_of_its_type(x: Tensor) -> None:
    model = siblings(32, 16, bias=(False, True)).bfloat16()
    result = rewritten(model, x.bfloat16(), quantize=False)
    bias = argument(result.one("linear"), "bias")
    assert bias.meta["val"].dtype == torch.bfloat16 and bias.meta["val"].shape == (48,)
    assert torch.equal(result.got[0], result.want[0])


def test_float_siblings_become_one_float_linear(x: Tensor) -> None:
    result = rewritten(siblings(48, 16, 16, bias=(True, False, True)), x, quantize=False)
    assert result.counts == {"stack_siblings": 3}
    assert result.ops()["linear"] == 1
    assert result.report.coverage == 0
    for got, want in zip(result.got, result.want, strict=True):
        torch.testing.assert_close(got, want)


def test_a_linear_without_siblings_says_so_in_float(x: Tensor) -> None:
    result = rewritten(siblings(16), x, quantize=False)
    assert result.refused("linear") == ["quantize=False, and no other linear reads its input"]


def test_keys_and_values_of_a_cross_attention_are_stacked_without_the_query() -> None:
    model = Model(
        lambda m, x, memory: (m.q(x), m.k(memory), m.v(memory)),
        **{name: nn.Linear(32, 32) for name in "qkv"},
    )
    result = rewritten(model, torch.randn(2, 3, 32), torch.randn(2, 7, 32))
    rules = {o.path: o.rules for o in result.report.linears}
    assert rules["q"] == ("linear",)
    assert rules["k"] == rules["v"] == ("stack_siblings", "linear")


def test_siblings_through_equal_views_are_siblings() -> None:
    model = Model(
        lambda m, x: m.a(x.view(10, 32)) + m.b(x.view(10, 32)),
        a=nn.Linear(32, 8),
        b=nn.Linear(32, 8),
    )
    assert rewritten(model, torch.randn(2, 5, 32)).counts == {"stack_siblings + linear": 2}


def test_siblings_of_different_types_are_not_stacked(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            low = m.a(x), m.b(x)
        return *low, m.c(x)

    result = compiled(Model(forward, **{name: nn.Linear(32, 16) for name in "abc"}), x)
    rules = {o.path: o.rules for o in result.report.linears}
    assert rules["a"] == rules["b"] == ("stack_siblings", "linear")
    assert rules["c"] == ("linear",)
    assert [y.dtype for y in result.got] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_an_excluded_sibling_stays_alone(x: Tensor) -> None:
    result = rewritten(siblings(32, 32, 32), x, exclude="p1")
    assert result.counts == {"stack_siblings + linear": 2}
    assert result.refused("linear") == ["excluded by 'p1'"]
    assert torch.equal(result.got[1], result.want[1])


def test_one_sibling_left_by_exclude_is_not_stacked(x: Tensor) -> None:
    assert rewritten(siblings(32, 32, 32), x, exclude=["p0", "p2"]).counts == {"linear": 1}


def test_one_linear_called_twice_on_a_value_is_stacked_with_itself(x: Tensor) -> None:
    fc = nn.Linear(32, 16)
    result = rewritten(Model(lambda m, x: m.fc(x) - 2 * m.fc(x), fc=fc), x)
    assert result.counts == {"stack_siblings + linear": 2}
    assert_near(result.got, result.want, 3 * linear_bound(x, fc.weight))


def test_a_sibling_that_is_written_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k = m.q(x), m.k(x)
        torch.einsum("bij->bji", q).mul_(2)
        return q + k

    q, k = nn.Linear(32, 16), nn.Linear(32, 16)
    result = rewritten(Model(forward, q=q, k=k), x)
    assert result.counts == {"linear": 1, "linear + residual": 1}
    bound = 2 * linear_bound(x, q.weight) + linear_bound(x, k.weight)
    assert_near(result.got, result.want, bound)


def test_a_value_written_between_its_readers_is_refused(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q = m.q(x)
        x.mul_(3)
        return q, m.k(x)

    q, k = nn.Linear(32, 16), nn.Linear(32, 16)
    result = compiled(Model(forward, q=q, k=k), x)
    assert result.counts == {"linear": 2}
    assert_near(result.got[0], result.want[0], linear_bound(x, q.weight))
    assert_near(result.got[1], result.want[1], linear_bound(3 * x, k.weight))


def test_a_sibling_whose_strides_are_read_is_copied(x: Tensor) -> None:
    """as_strided repeats the strides seen when tracing; a slice of a stacked result has others."""

    def forward(m: Any, x: Tensor) -> Tensor:
        windows = m.q(x).view(2, 5, 4, 4).as_strided((2, 4, 32), (80, 16, 1))
        return windows.sum(-1, keepdim=True) + m.k(x)[:, :4]

    q, k = nn.Linear(32, 16), nn.Linear(32, 16)
    result = rewritten(Model(forward, q=q, k=k), x)
    assert result.counts == {"stack_siblings + linear": 2}
    assert result.ops()["clone"] == 1
    a, b = linear_bound(x, q.weight).sum(-1), linear_bound(x, k.weight)[:, :4]
    assert_near(result.got, result.want, (a[:, :4] + a[:, 1:])[..., None] + b)


def test_computed_weights_behind_a_write_are_ready_before_the_stack(x: Tensor) -> None:
    """One weight that the graph writes must not keep the others from moving to the top."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first = F.linear(x, m.counter) + x @ m.a
        m.counter.add_(1)
        return first - x @ m.b

    model = Model(forward, a=parameter(32, 32), b=parameter(32, 32), counter=torch.randn(32, 32))
    result = compiled(model, x)
    assert result.counts == {"stack_siblings + linear": 2}
    assert result.refused("linear") == ["its weight is not fixed: counter is written in place"]
    assert_near(result.got, result.want, linear_bound(x, model.a.T) + linear_bound(x, model.b.T))


# Siblings of siblings ----------------------------------------------------------------------------


def _latent(m: Any, x: Tensor) -> Any:
    """Multi-head latent attention: keys and values of a sibling's result."""
    q, c = m.a(x), m.b(x)
    return q, m.c(c), m.d(c)


def _deep(m: Any, x: Tensor) -> Any:
    a, b = m.a(x), m.b(x)
    c, d = m.c(b), m.d(b)
    return a, c, m.e(d), m.f(d)


def _through_a_view(m: Any, x: Tensor) -> Any:
    a, b = m.a(x).view(10, 32), m.b(x).view(10, 32)
    return m.c(a), m.d(a), m.e(b), m.f(b)


def _behind_a_norm(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    a, b = m.a(h), m.b(h)
    h = m.norm(b)
    return a, m.c(h), m.d(h)


def _both_ways(m: Any, x: Tensor) -> Any:
    """Each group reads a sibling of the other, in the order of the model."""
    a = m.a(x)
    c, d = m.c(a), m.d(a)
    return c, m.b(x), d, m.e(c), m.f(c)


NESTED = {
    f.__name__.strip("_"): f for f in (_latent, _deep, _through_a_view, _behind_a_norm, _both_ways)
}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("name", NESTED)
def test_siblings_may_read_a_sibling(name: str, quantize: bool, x: Tensor) -> None:
    parts = {p: nn.Linear(32, 32) for p in "abcdef"}
    model = Model(NESTED[name], norm=nn.LayerNorm(32), **parts)
    result = compiled(model, x, quantize=quantize)
    stacked = [o for o in result.report.linears if "stack_siblings" in o.rules]
    assert len(stacked) == len(result.report.linears) >= 4
    for got, want in zip(result.got, result.want, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.05 if quantize else 1e-5)


def test_a_norm_whose_gamma_is_a_linear_reads_what_stands_for_it() -> None:
    """It is replaced before the norm's turn comes."""
    a, b = nn.Linear(32, 32), nn.Linear(32, 16)
    model = Model(
        lambda m, x: m.b(F.layer_norm(x, (32,), m.a(m.norm(x[0, 0])))),
        norm=nn.LayerNorm(32),
        a=a,
        b=b,
    )
    result = compiled(model, torch.randn(2, 5, 32))
    assert result.counts == {"norm_linear": 2}
    torch.testing.assert_close(result.got, result.want, rtol=0, atol=0.05)
