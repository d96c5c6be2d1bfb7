"""A linear that no fusion took quantizes its input; one that must not be touched says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.ops.int8_linear.op import MAX_K
from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    linear_bound,
    parameter,
    rewritten,
)


def alone(fc: nn.Module) -> Model:
    return Model(lambda m, x: m.fc(x), fc=fc)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K", [1, 7, 16, 33, 96])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3, 2), (0, 5)], ids=str)
def test_any_linear_is_quantized(lead: tuple[int, ...], K: int, bias: bool) -> None:
    fc, x = nn.Linear(K, 24, bias=bias), torch.randn(*lead, K)
    result = rewritten(alone(fc), x)
    assert result.counts == {"linear": 1}
    assert result.ops() == {"quantize": 1, "getitem": 6, "quantize_weight": 1, "int8_linear": 1}
    assert (argument(result.one("int8_linear"), "bias") is not None) == bias
    bound = linear_bound(x, fc.weight)
    assert_near(result.got, result.want, bound * (1 if K >= 16 else 3))  # few terms hardly cancel


def test_rows_of_zeros_give_the_bias_exactly() -> None:
    fc = nn.Linear(32, 24)
    result = rewritten(alone(fc), torch.zeros(3, 32))
    assert torch.equal(result.got, fc.bias.expand(3, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_kept(dtype: torch.dtype) -> None:
    fc, x = nn.Linear(40, 24).to(dtype), torch.randn(4, 40, dtype=dtype)
    result = rewritten(alone(fc), x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(x.float(), fc.weight.float()))


def test_a_tied_weight_is_quantized_for_each_of_its_linears() -> None:
    fc, x = nn.Linear(32, 32), torch.randn(4, 32)
    result = rewritten(Model(lambda m, x: m.fc(m.fc(x).sin()), fc=fc), x)
    assert result.counts == {"linear": 2}
    assert [o.path for o in result.report.linears] == ["fc", "fc"]


def test_an_input_that_is_also_returned_is_quantized_beside() -> None:
    x = torch.randn(4, 32)
    result = rewritten(Model(lambda m, x: (m.fc(h := x.sin()), h), fc=nn.Linear(32, 16)), x)
    assert result.counts == {"linear": 1}
    torch.testing.assert_close(result.got[1], result.want[1])


class Half(nn.Module):
    """Weight and bias may be given by the caller instead of by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(8, 16), parameter(8)

    def forward(self, x: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
        w = self.weight if weight is None else weight
        return F.linear(x, w, self.bias if bias is None else bias)


REFUSED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "its weight is an argument": (
        Half,
        (torch.ones(2, 16), torch.ones(8, 16)),
        "its weight is not a parameter",
    ),
    "its bias is an argument": (
        Half,
        (torch.ones(2, 16), None, torch.ones(8)),
        "its bias is not a parameter",
    ),
    "doubles": (
        lambda: alone(nn.Linear(16, 8).double()),
        (torch.ones(2, 16, dtype=torch.float64),),
        "computes in float64",
    ),
    "K too large": (
        lambda: alone(nn.Linear(MAX_K + 1, 1)),
        (torch.ones(1, MAX_K + 1),),
        f"K={MAX_K + 1}, N=1: int8 needs 1 <= K <= {MAX_K} and N >= 1",
    ),
    "no output": (
        lambda: alone(nn.Linear(16, 0)),
        (torch.ones(2, 16),),
        f"K=16, N=0: int8 needs 1 <= K <= {MAX_K} and N >= 1",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", REFUSED)
def test_a_linear_is_refused_when(name: str) -> None:
    make, args, why = REFUSED[name]
    result = rewritten(make(), *args)
    assert result.refused("linear") == [why]
    assert result.counts == {} and result.report.coverage == 0
    assert torch.equal(result.got, result.want)


@pytest.mark.parametrize(
    ("options", "taken", "why"),
    [
        ({"exclude": "a.*"}, "b", "excluded by 'a.*'"),
        ({"exclude": ["nothing", "re:a.[0-9]"]}, "b", "excluded by 're:a.[0-9]'"),
        ({"include": ["b"]}, "b", "not matched by include"),
        ({"include": "a*"}, "a.0", "not matched by include"),
    ],
)
def test_include_and_exclude_choose_by_path(options: Any, taken: str, why: str) -> None:
    model = Model(lambda m, x: m.b(m.a(x)), a=nn.Sequential(nn.Linear(16, 16)), b=nn.Linear(16, 16))
    result = rewritten(model, torch.randn(2, 16), **options)
    assert [o.path for o in result.report.linears if o.int8] == [taken]
    assert result.refused("linear") == [why]


def test_without_quantize_nothing_is_int8() -> None:
    model = Model(lambda m, x: m.fc(F.gelu(m.norm(x))), norm=nn.LayerNorm(16), fc=nn.Linear(16, 8))
    result = rewritten(model, torch.randn(2, 16), quantize=False)
    assert result.refused("norm") == result.refused("activation") == ["quantize=False"]
    assert torch.equal(result.got, result.want)
