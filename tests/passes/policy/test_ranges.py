"""What the options and a calibration say of activations reaches every quantizer, and the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphquant import OptionError
from graphquant.ops import quantize_weight
from graphquant.passes.policy.ranges import union, within
from tests.passes.graphs import Model, Rewritten, argument, linear_bound, name_of, rewritten
from tests.seen import Seen

K, RANGE = 16, (-1.5, 2.0)
SIZE = (3, 5, K)


def norm_linear() -> nn.Module:
    return Model(lambda m, x: m.fc(m.norm(x)), norm=nn.LayerNorm(K), fc=nn.Linear(K, 8))


def post_norm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h), h

    return Model(forward, norm=nn.LayerNorm(K), fc=nn.Linear(K, 8))


def act_linear() -> nn.Module:
    return Model(lambda m, x: m.fc(F.gelu(x)), fc=nn.Linear(K, 8))


def gated() -> nn.Module:
    return Model(lambda m, x: m.fc(F.silu(x) * (x + 1)), fc=nn.Linear(K, 8))


def linear() -> nn.Module:
    return Model(lambda m, x: m.fc(x), fc=nn.Linear(K, 8))


SITES = {
    "norm_quantize": norm_linear,
    "norm_quantize_keep": post_norm,
    "quantize act": act_linear,
    "quantize gated": gated,
    "quantize": linear,
}


def quantizer(result: Rewritten, site: str) -> Node:
    return result.one(site.split()[0])


def qparams(result: Rewritten, site: str) -> tuple[Any, ...]:
    node = quantizer(result, site)
    return tuple(argument(node, name) for name in ("factor", "low", "high", "clip"))


@pytest.mark.parametrize("op", SITES)
def test_a_static_range_reaches_the_op(op: str) -> None:
    options: Any = {"activation": "static", "calibration": Seen({"fc": RANGE})}
    result = rewritten(SITES[op](), torch.randn(SIZE), **options)
    assert qparams(result, op) == (None, *RANGE, None)
    assert not result.report.notes


@pytest.mark.parametrize("op", SITES)
def test_a_clip_reaches_the_op(op: str) -> None:
    result = rewritten(SITES[op](), torch.randn(SIZE), clip_range=1)
    assert qparams(result, op) == (None, None, None, 1.0)


@pytest.mark.parametrize("op", SITES)
def test_of_a_static_range_what_is_within_the_clip_is_left(op: str) -> None:
    options: Any = {"activation": "static", "calibration": Seen({"fc": RANGE}), "clip_range": 1.75}
    result = rewritten(SITES[op](), torch.randn(SIZE), **options)
    assert qparams(result, op) == (None, -1.5, 1.75, None)


@pytest.mark.parametrize("op", SITES)
def test_without_options_graphs_are_what_they_were(op: str) -> None:
    """A calibration alone changes nothing: dynamic is the default."""
    model, x = SITES[op](), torch.randn(SIZE)
    plain = rewritten(model, x)
    node = quantizer(plain, op)
    schema = len(node.target._schema.arguments)  # type: ignore[union-attr]
    assert len(node.args) == (1 if op == "quantize" else schema - 5)  # without its QParams
    assert len(plain.one("quantize_weight").args) == 1
    known = rewritten(model, x, calibration=Seen({"fc": RANGE}))
    assert [str(n) for n in known.graph.nodes] == [str(n) for n in plain.graph.nodes]
    assert quantizer(known, op).args[3:] == node.args[3:] and not known.report.notes


def siblings() -> nn.Module:
    parts = {name: nn.Linear(K, K) for name in "qkv"}
    return Model(lambda m, x: (m.q(x), m.k(x), m.v(x)), **parts)


def test_siblings_share_the_least_range_that_holds_all_of_theirs() -> None:
    known = Seen({"q": (-1.0, 2.0), "v": (-3.0, 1.0)})  # k has read the same value
    result = rewritten(siblings(), torch.randn(SIZE), activation="static", calibration=known)
    assert result.counts == {"stack_siblings + linear": 3}
    assert qparams(result, "quantize") == (None, -3.0, 2.0, None)
    assert not result.report.notes


def test_linears_that_read_views_of_one_value_share_its_range() -> None:
    """They are not stacked: what they compute has other shapes."""
    model = Model(
        lambda m, x: (m.a(x), m.b(x.reshape(15, K)), m.c(x + 1)),
        **{name: nn.Linear(K, K) for name in "abc"},
    )
    known = Seen({"a": (-1.0, 2.0), "b": (-3.0, 1.0), "c": (-2.0, 3.0)})
    result = rewritten(model, torch.randn(SIZE), activation="static", calibration=known)
    made = [n for n in result.graph.nodes if n.op == "call_function" and name_of(n) == "quantize"]
    ranges = sorted((argument(n, "low"), argument(n, "high")) for n in made)
    assert ranges == [(-3.0, 2.0), (-3.0, 2.0), (-2.0, 3.0)]


def test_a_linear_without_a_range_stays_dynamic_and_the_report_says_so() -> None:
    model = Model(lambda m, x: m.b(m.a(x)), a=nn.Linear(K, K), b=nn.Linear(K, K))
    options: Any = {"activation": "static", "calibration": Seen({"a": RANGE})}
    result = rewritten(model, torch.randn(SIZE), **options)
    made = [n for n in result.graph.nodes if n.op == "call_function" and name_of(n) == "quantize"]
    assert [argument(n, "low") for n in made] == [-1.5, None]
    (note,) = result.report.notes
    assert note == (
        "1 of 2 int8 linears stay dynamic, because the calibration has no range of their inputs: b"
    )
    assert note in str(result.report).replace("\n", " ")


def test_what_stays_in_float_is_not_said_to_be_dynamic() -> None:
    model = Model(lambda m, x: m.b(m.a(x)), a=nn.Linear(K, K), b=nn.Linear(K, K))
    options: Any = {"activation": "static", "calibration": Seen({"a": RANGE}), "exclude": "b"}
    assert not rewritten(model, torch.randn(SIZE), **options).report.notes


@pytest.mark.parametrize("bad", [(2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match=r"calibration.range\('fc'\) is .*, needs two finite num"):
        rewritten(linear(), torch.randn(SIZE), activation="static", calibration=Seen({"fc": bad}))


@pytest.mark.parametrize("op", SITES)
def test_a_range_that_holds_all_values_is_as_near_as_linear_bound_says(op: str) -> None:
    """A row's step is then the tensor's, and linear_bound with that absmax in every row holds."""
    model, x = SITES[op](), torch.randn(SIZE)
    read: list[Tensor] = []
    hook = model.fc.register_forward_pre_hook(lambda _, i: read.append(i[0].detach()))  # type: ignore[operator, union-attr]
    model(x)
    hook.remove()
    (h,) = read
    span = float(h.min()), float(h.max())
    options: Any = {"activation": "static", "calibration": Seen({"fc": span})}
    result = rewritten(model, x, **options)
    got, want, dynamic = result.got, result.want, rewritten(model, x).got
    if op == "norm_quantize_keep":
        torch.testing.assert_close(got[1], want[1])
        got, want, dynamic = got[0], want[0], dynamic[0]
    widest = h.clone()
    widest[..., 0] = h.abs().max()
    weight: Tensor = model.fc.weight.detach()  # type: ignore[union-attr, assignment, operator]
    assert bool(((got - want).abs() <= linear_bound(widest, weight)).all())
    assert not torch.equal(got, dynamic)


def test_mse_reaches_the_packed_weights() -> None:
    model, x = siblings(), torch.randn(SIZE)
    result = rewritten(model, x, weight_scale="mse")
    assert argument(result.one("quantize_weight"), "method") == "mse"
    weights = torch.cat([model.get_submodule(n).weight.detach() for n in "qkv"])  # type: ignore[misc]
    best, plain = quantize_weight(weights, "mse"), quantize_weight(weights)
    assert not torch.equal(best[1], plain[1])
    made = result.captured.gm
    linear = result.one("int8_linear")
    seen: list[Any] = []

    class Look(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is linear.target:
                seen.extend(args[3:6])
            return super().call_function(target, args, kwargs)

    Look(made).run(x)
    assert all(map(torch.equal, seen, best))


def test_ranges_by_hand() -> None:
    assert union([(-1.0, 2.0), (-3.0, 1.0)]) == (-3.0, 2.0)
    assert within((-3.0, 2.0), None) == (-3.0, 2.0)
    assert within((-3.0, 2.0), 2.5) == (-2.5, 2.0)
    assert within((6.0, 9.0), 5.0) == (5.0, 5.0)
