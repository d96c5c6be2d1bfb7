"""Many spellings become one, and no number changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.capture.aten import from_dynamo
from graphquant.ir.captured import Captured
from graphquant.passes.normalize import normalize
from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    compiled,
    exported,
    honest,
    linear_bound,
    name_of,
    parameter,
    rewritten,
    spec,
)

K = 24


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


def normalized(model: nn.Module, *args: Any) -> list[str]:
    """The calls that are left, in order. The graph gives what the model gives."""
    captured = exported(model, *args)
    want, before = model(*[a.clone() for a in args]), spec(captured.gm.graph)
    normalize(captured)
    honest(captured)
    assert spec(captured.gm.graph) == before
    captured.gm.recompile()
    got = captured.gm(*[a.clone() for a in args])
    torch.testing.assert_close(got, want)
    return [name_of(n) for n in captured.gm.graph.nodes if n.op == "call_function"]


def from_compile(call: Any, *args: Any) -> Captured:
    """What the backend sees, normalized."""
    seen: list[Captured] = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        captured = from_dynamo(gm, inputs)
        assert captured is not None
        normalize(captured)
        seen.append(captured)
        return gm.forward

    torch.compile(call, backend=backend, fullgraph=True)(*args)
    return seen[0]


def calls(captured: Captured) -> Counter[str]:
    return Counter(name_of(n) for n in captured.gm.graph.nodes if n.op == "call_function")


# No-ops ------------------------------------------------------------------------------------------

NO_OPS: dict[str, Any] = {
    "cast to the same type": lambda x: x.to(torch.float32),
    "type_as of the same type": lambda x: x.type_as(x),
    "float of a float": lambda x: x.float(),
    "cast to the same device": lambda x: x.to("cpu", torch.float32),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "channel dropout in eval": lambda x: F.dropout1d(x, 0.5, training=False),
    "alpha dropout in eval": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "detach": lambda x: x.detach(),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_does_nothing_goes(name: str, x: Tensor) -> None:
    assert normalized(Model(lambda m, x: NO_OPS[name](x.sin()).cos()).eval(), x) == ["sin", "cos"]


KEPT: dict[str, tuple[Any, str]] = {
    "cast to another type": (lambda x: x.to(torch.bfloat16), "to"),
    "cast to an integer": (lambda x: x.to(torch.int32), "to"),
    "a copy": (lambda x: x.to(torch.float32, copy=True), "to"),
    "a clone": (lambda x: x.clone(), "clone"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_something_stays(name: str, x: Tensor) -> None:
    keep, op = KEPT[name]
    assert normalized(Model(lambda m, x: keep(x.sin()).cos()).eval(), x) == ["sin", op, "cos"]


def test_dropout_in_training_stays(x: Tensor) -> None:
    captured = exported(Model(lambda m, x: m.drop(x.sin()), drop=nn.Dropout(0.5)).train(), x)
    normalize(captured)
    assert "dropout" in calls(captured)


def test_assertions_on_metadata_go(x: Tensor) -> None:
    model = Model(lambda m, x: m.fc(x.to(torch.bfloat16)), fc=nn.Linear(K, 8).bfloat16()).eval()
    captured = exported(model, x)
    assert "_assert_tensor_metadata" in calls(captured)
    normalize(captured)
    assert calls(captured) == {"to": 1, "linear": 1}


def test_detach_stays_where_a_gradient_may_flow(x: Tensor) -> None:
    fc = nn.Linear(K, K)

    def forward(x: Tensor) -> Tensor:
        return fc(x).detach() * x

    with torch.enable_grad():
        assert calls(from_compile(forward, x.requires_grad_()))["detach"] == 1
    x = x.detach()
    torch._dynamo.reset()
    for p in fc.parameters():
        p.requires_grad_(False)
    assert calls(from_compile(forward, x))["detach"] == 0


# In place ----------------------------------------------------------------------------------------


def _chain(m: Any, x: Tensor) -> Tensor:
    y = x.sin()
    y += x
    y *= 2
    y.div_(3.0)
    return F.gelu(y.sub_(x)).sigmoid_()


def test_in_place_ops_on_a_value_of_ones_own_become_plain(x: Tensor) -> None:
    assert normalized(Model(_chain), x) == ["sin", "add", "mul", "div", "sub", "gelu", "sigmoid"]


def test_readers_before_a_write_still_read_the_old_value(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x.sin()
        early = y * 3
        y += 1
        return early, y, y * 3

    assert normalized(Model(forward), x) == ["sin", "mul", "add", "mul"]


def _through_a_view(m: Any, x: Tensor) -> Any:
    y = x.sin()
    rows = y.view(10, K)
    y += 1
    return y, rows


def _a_view_is_written(m: Any, x: Tensor) -> Any:
    y = x.sin()
    y[:, 0].mul_(0.0)
    return y * 2


def _the_input(m: Any, x: Tensor) -> Any:
    x += 1
    return x * 2


def _a_chunk(m: Any, x: Tensor) -> Any:
    y = x.sin()
    a, b = y.chunk(2, -1)
    a += b
    return y


def _an_undeclared_view(m: Any, x: Tensor) -> Any:
    y = x.sin()
    torch.einsum("bij->bji", y).mul_(2)  # its schema says nothing of an alias
    return y


def _a_broader_type(m: Any, x: Tensor) -> Any:
    y = x.bfloat16().sin()
    y += x  # stays bfloat16; the sum would be float32
    return y * 2


OF_ITS_OWN = [_through_a_view, _a_view_is_written, _a_chunk, _a_broader_type]


@pytest.mark.parametrize("forward", OF_ITS_OWN)
def test_writes_through_views_of_what_the_graph_made_become_plain(forward: Any, x: Tensor) -> None:
    assert not [c for c in normalized(Model(forward), x) if c.endswith("_")]


ALIASED = [_the_input, _an_undeclared_view]


@pytest.mark.parametrize("forward", ALIASED)
def test_writes_to_inputs_and_through_other_views_stay(forward: Any, x: Tensor) -> None:
    kept = [c for c in normalized(Model(forward), x) if c.endswith("_")]
    assert len(kept) == 1


@pytest.mark.parametrize("forward", [*OF_ITS_OWN, *ALIASED, _chain])
def test_in_place_ops_give_what_eager_gives_through_the_backend(forward: Any, x: Tensor) -> None:
    def model(m: Any, x: Tensor) -> Any:
        x = m.fc(x)
        return forward(m, x.view(2, 5, K) if forward is _the_input else x), x

    fc = nn.Linear(K, K)
    result = compiled(Model(model, fc=fc), x)
    plain = compiled(Model(model, fc=fc), x, quantize=False)
    assert result.report.coverage == 1.0
    for got, want in zip(
        torch.utils._pytree.tree_leaves(plain.got),
        torch.utils._pytree.tree_leaves(plain.want),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    bound = 4 * linear_bound(x, fc.weight) + (2**-5 if forward is _a_broader_type else 0)
    assert_near(result.got[1], result.want[1], bound)


def test_a_constant_of_the_forward_is_not_written_from_call_to_call(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        c = torch.tensor(1.0)
        c += 1
        return m.fc(x) * c

    fc = nn.Linear(K, 8)
    result = compiled(Model(forward, fc=fc), x, calls=3)
    assert_near(result.got, result.want, 2 * linear_bound(x, fc.weight))


# Views -------------------------------------------------------------------------------------------


def test_equal_views_of_one_value_become_one(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x.view(10, K) + x.view(10, K), x.view(5, 2, K), x.transpose(0, 1), x.transpose(0, 1)

    assert normalized(Model(forward), x) == ["view", "add", "view", "transpose"]


def test_equal_clones_stay_two(x: Tensor) -> None:
    assert normalized(Model(lambda m, x: (x.clone(), x.clone())), x) == ["clone", "clone"]


def test_copies_of_a_value_at_different_times_stay_two(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x.sin()
        before = y.transpose(0, 1).contiguous()
        y[0].mul_(2)
        return before, y.transpose(0, 1).contiguous()

    assert normalized(Model(forward), x).count("contiguous") == 2


def test_a_copy_that_is_written_is_not_shared(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        a = x.transpose(0, 1).reshape(10, K)
        a.mul_(2)
        return m.fc(a) - m.fc(x.transpose(0, 1).reshape(10, K))

    fc = nn.Linear(K, 8)
    result = compiled(Model(forward, fc=fc), x)
    rows = x.transpose(0, 1).reshape(10, K)
    assert_near(result.got, result.want, 3 * linear_bound(rows, fc.weight))


# Linears -----------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's: weight [K, N]."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.weight, self.bias, self.N = parameter(K, N), parameter(N), N

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.N)


PRODUCTS: dict[str, Any] = {
    "x @ w": lambda m, x: x @ m.w,
    "x @ w.T": lambda m, x: x @ m.wt.T,
    "x @ w.t()": lambda m, x: x @ m.wt.t(),
    "mm": lambda m, x: torch.mm(x.view(10, K), m.w).view(2, 5, 8),
    "addmm": lambda m, x: torch.addmm(m.b, x.view(10, K), m.w).view(2, 5, 8),
    "x @ w + b": lambda m, x: x @ m.w + m.b,
    "einsum": lambda m, x: torch.matmul(x, m.w),
    "computed": lambda m, x: x @ (m.w * 2).to(torch.float32),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_parameter_is_a_linear(name: str, x: Tensor) -> None:
    model = Model(PRODUCTS[name], w=parameter(K, 8), wt=parameter(8, K), b=parameter(8))
    assert normalized(model, x).count("linear") == 1
    result = rewritten(model, x)
    assert result.report.coverage == 1.0
    weight = {"x @ w.T": model.wt, "x @ w.t()": model.wt, "computed": 2 * model.w.T}
    assert_near(result.got, result.want, linear_bound(x, weight.get(name, model.w.T)))


def test_a_conv1d_of_gpt2_is_fused_like_a_linear(x: Tensor) -> None:
    conv = Conv1D(K, 8)
    result = rewritten(Model(lambda m, x: m.conv(m.norm(x)), norm=nn.LayerNorm(K), conv=conv), x)
    assert result.counts == {"norm_linear": 1}
    assert result.report.linears[0].path == "conv"
    assert_near(result.got, result.want, linear_bound(F.layer_norm(x, (K,)), conv.weight.T))


NO_LINEARS: dict[str, Any] = {
    "two activations": lambda m, x: x @ x.transpose(1, 2),
    "a vector": lambda m, x: x @ m.v,
    "a batch of matrices": lambda m, x: x @ m.batch,
    "a parameter on the left": lambda m, x: m.left @ x,
    "parameters alone": lambda m, x: x + (m.left @ m.left)[0, 0],
    "one row, no token": lambda m, x: x[0, 0] @ m.w,
    "integers": lambda m, x: (x > 0).long() @ m.w.long(),
    "a bias that is an activation": lambda m, x: torch.addmm(
        x.view(10, K)[:, :8], x.view(10, K), m.w
    ),
}


@pytest.mark.parametrize("name", NO_LINEARS)
def test_other_products_are_no_linears(name: str, x: Tensor) -> None:
    parts = {"w": parameter(K, 8), "v": parameter(K), "batch": parameter(2, K, 8)}
    model = Model(NO_LINEARS[name], left=parameter(5, 5), **parts)
    assert "linear" not in normalized(model, x)
    assert not rewritten(model, x).report.linears


# Weights that are computed -----------------------------------------------------------------------

COMPUTED: dict[str, Any] = {
    "cast": lambda m, x: F.linear(x, m.low.float()),
    "split": lambda m, x: F.linear(x, m.both.chunk(2)[1]),
    "tied transposed": lambda m, x: F.linear(F.linear(x, m.w), m.w.t()),
    "weight norm": lambda m, x: F.linear(x, m.w * m.g / m.w.norm(dim=1, keepdim=True)),
    "low rank": lambda m, x: F.linear(x, m.w + m.a @ m.b),
    "bias sliced": lambda m, x: F.linear(x, m.w, m.bias[4:12]),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_computed_from_parameters_is_packed(name: str, x: Tensor) -> None:
    parts = {
        "low": parameter(8, K).bfloat16(),
        "both": parameter(16, K),
        "w": parameter(8, K),
        "g": parameter(8, 1),
        "a": parameter(8, 2),
        "b": parameter(2, K),
        "bias": parameter(16),
    }
    model = Model(COMPUTED[name], **parts)
    result = rewritten(model, x)
    assert result.report.coverage == 1.0
    again = compiled(model, x)
    torch.testing.assert_close(again.got, result.got)
    assert_near(result.got, result.want, 0.05 * float(result.want.abs().max()))


def test_computed_weights_stand_before_the_first_linear(x: Tensor) -> None:
    model = Model(
        lambda m, x: F.linear(F.linear(x, m.a.float()).sin(), m.b.float()),
        a=parameter(8, K).bfloat16(),
        b=parameter(8, 8).bfloat16(),
    )
    assert normalized(model, x) == ["to", "to", "linear", "sin", "linear"]


@pytest.mark.parametrize(
    "noise",
    [
        lambda m: torch.rand_like(m.w),
        lambda m: m.w + torch.randn_like(m.w),
        lambda m: F.dropout(m.w, 0.5, training=True),
        lambda m: torch.bernoulli(m.w.sigmoid()),
        lambda m: torch.empty_like(m.w).normal_(),
    ],
    ids=["rand_like", "plus noise", "dropout", "bernoulli", "normal_"],
)
def test_a_random_weight_is_no_constant(noise: Any, x: Tensor) -> None:
    result = rewritten(Model(lambda m, x: F.linear(x, noise(m)), w=parameter(8, K)), x)
    assert result.refused("linear") == ["its weight is not a parameter"]
    graph = result.captured.gm
    assert not torch.equal(graph(x), graph(x))


def test_a_weight_that_holds_activations_is_no_constant(x: Tensor) -> None:
    """A copy of a parameter, into which a part of the input is written."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = torch.zeros_like(m.w)
        w.add_(m.w)
        w[0] = x[0, 0]
        return F.linear(x, w)

    result = compiled(Model(forward, w=parameter(8, K)), x)
    assert result.counts == {}
    assert result.refused("linear") == ["its weight is not a parameter"]
    torch.testing.assert_close(result.got, result.want)


def test_a_computed_bias_is_read_with_the_weight(x: Tensor) -> None:
    model = Model(lambda m, x: F.linear(x, m.w, -m.b), w=parameter(8, K), b=parameter(8))
    result = rewritten(model, x)
    assert name_of(argument(result.one("int8_linear"), "bias")) == "neg"
    assert_near(result.got, result.want, linear_bound(x, model.w))
