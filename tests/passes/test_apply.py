"""The engine catches a rule that breaks its contract, and keeps the graph honest for the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from graphquant import Config, RuleError
from graphquant.ir.graph import LINEAR, aten
from graphquant.passes import pipeline
from graphquant.passes.pipeline import rewrite
from graphquant.passes.rule import Edit, Refuse, Rewrite, View
from graphquant.passes.rules.linear import AnyLinear, LinearSite
from tests.passes.graphs import Model, compiled, exported, name_of, rewritten

K = 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


def model() -> Model:
    return Model(lambda m, x: m.fc(x.sin()).cos(), fc=nn.Linear(K, K))


class SaysTrue(AnyLinear):
    name = "says_true"

    def check(self, view: View, site: LinearSite) -> Any:
        return True


class SaysFalse(AnyLinear):
    name = "says_false"

    def check(self, view: View, site: LinearSite) -> Any:
        return False


class SaysWhy(AnyLinear):
    name = "says_why"

    def check(self, view: View, site: LinearSite) -> Any:
        return "because"


class OtherShape(AnyLinear):
    name = "other_shape"

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        (y,), product = super().rewrite(edit, site)
        return Rewrite((edit.call(aten.transpose.int, y, 0, 1),), product)


class OtherType(AnyLinear):
    name = "other_type"

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        (y,), product = super().rewrite(edit, site)
        return Rewrite((edit.call(aten.to.dtype, y, torch.float16),), product)


class TwoLinears(AnyLinear):
    name = "two_linears"

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        linear = site.linear
        again = edit.call(LINEAR, linear.x, linear.weight, linear.bias)
        (y,), product = super().rewrite(edit, site)
        return Rewrite((edit.call(aten.add.Tensor, y, again),), product)


class NoLinear(AnyLinear):
    name = "no_linear"

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        return Rewrite((edit.call(aten.neg.default, site.linear.x),))


class LeavesItAlive(AnyLinear):
    """It says that it replaces an input of the graph, which nothing can: one that nobody reads."""

    name = "leaves_it_alive"

    def sites(self, view: View) -> Any:
        given = view.graph.find_nodes(op="placeholder")[-1]
        for site in super().sites(view):
            yield LinearSite((*site.outputs, given), site.subjects, (), site.linear)

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        (y,), product = super().rewrite(edit, site)
        return Rewrite((y, y), product)


BROKEN = [
    (SaysTrue(), r"says_true.check returned True; it must return None or a Refuse"),
    (SaysFalse(), r"says_false.check returned False; it must return None or a Refuse"),
    (SaysWhy(), r"says_why.check returned 'because'; it must return None or a Refuse"),
    (OtherShape(), r"other_shape turned linear \(\(2, 5, 16\), .* into \(\(5, 2, 16\)"),
    (OtherType(), r"other_type turned linear .*torch.float32, .* into .*torch.float16"),
    (TwoLinears(), r"two_linears made 2 linears of one site, not one"),
    (NoLinear(), r"no_linear made 0 linears of one site, not one"),
    (LeavesItAlive(), r"leaves_it_alive left what it replaced alive: args_1"),
]


@pytest.mark.parametrize(("rule", "message"), BROKEN, ids=lambda v: getattr(v, "name", ""))
def test_a_broken_rule_is_caught(
    rule: Any, message: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (rule,))
    model = Model(lambda m, x, unread: m.fc(x.sin()).cos(), fc=nn.Linear(K, K))
    captured = exported(model, x, x.clone())
    with pytest.raises(RuleError, match=message):
        rewrite(captured, Config())


def test_a_broken_rule_is_no_silent_fall_back_to_float(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (OtherShape(),))
    with pytest.raises(BackendCompilerFailed, match="RuleError: other_shape turned linear"):
        compiled(model(), x)


class Declines(AnyLinear):
    name = "declines"

    def check(self, view: View, site: LinearSite) -> Refuse:
        return Refuse("not today", site.linear.node)


class AlsoDeclines(Declines):
    name = "also_declines"

    def check(self, view: View, site: LinearSite) -> Refuse:
        return Refuse("nor tomorrow", site.linear.node)


def test_every_reason_is_on_record_and_in_the_log(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (Declines(), AlsoDeclines()))
    with caplog.at_level(logging.DEBUG, logger="graphquant.passes.apply"):
        result = rewritten(model(), x)
    assert result.refused("linear") == ["not today; nor tomorrow"]
    assert "declines refused linear: not today" in caplog.messages
    assert torch.equal(result.got, result.want)


def test_what_a_rule_did_later_outweighs_what_another_refused(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (Declines(), AnyLinear()))
    result = rewritten(model(), x)
    assert result.counts == {"linear": 1} and not result.report.refused


class MovesItsInput(AnyLinear):
    name = "moves_its_input"

    def sites(self, view: View) -> Any:
        for site in super().sites(view):
            yield LinearSite(site.outputs, site.subjects, (site.linear.x,), site.linear)


def test_what_is_written_is_refused_by_the_engine_itself(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.sin()
        y = m.fc(h)
        torch.einsum("bij->bji", h).mul_(2)
        return y + h

    monkeypatch.setattr(pipeline, "INT8_RULES", (MovesItsInput(),))
    result = rewritten(Model(forward, fc=nn.Linear(K, K)), x)
    assert result.refused("linear") == ["the result of sin is written in place"]
    assert torch.equal(result.got, result.want)


def test_new_nodes_say_which_rule_made_them_and_where_they_come_from(x: Tensor) -> None:
    block = Model(lambda m, x: m.fc(F.gelu(m.norm(x))), norm=nn.LayerNorm(K), fc=nn.Linear(K, K))
    result = rewritten(Model(lambda m, x: m.block(x), block=block), x)
    made = [n for n in result.graph.nodes if "graphquant" in n.meta]
    assert {"quantize", "quantize_weight", "int8_linear"} <= {name_of(n) for n in made}
    for node in made:
        assert node.meta["graphquant"] == "act_linear"
        assert [path for path, _ in node.meta["nn_module_stack"].values()][-1].endswith("block.fc")
        assert "stack_trace" in node.meta


def test_weights_stand_before_everything_that_runs(x: Tensor) -> None:
    """Wherever the linear stands, what is packed for it needs no activation to be there."""
    model = Model(
        lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(K, K), b=nn.Linear(K, K, bias=False)
    )
    nodes = [name_of(n) for n in rewritten(model, x).graph.nodes if n.op == "call_function"]
    assert nodes.index("quantize") > max(i for i, n in enumerate(nodes) if n == "quantize_weight")


def test_new_values_in_an_autocast_region_have_the_types_of_a_real_run(x: Tensor) -> None:
    """Siblings in a region are stacked with a float linear first: its result is half precision."""

    def forward(m: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            low = m.a(x), m.b(x)
            with torch.autocast("cpu", enabled=False):
                full = m.c(x), m.d(x)
        return *low, *full

    fcs = {name: nn.Linear(K, K) for name in "abcd"}
    result = compiled(Model(forward, **fcs), x)
    assert result.counts == {"stack_siblings + linear": 4}
    assert [y.dtype for y in result.got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    for got, want in zip(result.got, result.want, strict=True):
        assert got.dtype == want.dtype
        assert (got.float() - want.float()).norm() < 0.02 * want.float().norm()


def test_every_linear_norm_and_activation_has_an_outcome(x: Tensor) -> None:
    model = Model(
        lambda m, x: F.gelu(m.norm(m.fc(F.relu(x)))).tanh(),
        norm=nn.LayerNorm(K),
        fc=nn.Linear(K, K),
    )
    result = rewritten(model, x)
    kinds = [(o.kind, bool(o.rules), o.refused) for o in result.report.outcomes]
    assert kinds == [
        ("activation", True, ""),
        ("linear", True, ""),
        ("norm", False, "read by gelu"),
        ("activation", False, "read by tanh"),
    ]


class Late(AnyLinear):
    """Reads what the model computes behind the linear's reader."""

    name = "late"

    def rewrite(self, edit: Edit, site: LinearSite) -> Rewrite:
        linear = site.linear
        later = next(n for n in linear.node.graph.nodes if n.name == "cos")
        x = edit.call(aten.add.Tensor, linear.x, later)
        return Rewrite((edit.call(LINEAR, x, linear.weight, linear.bias),))


def test_a_rewrite_that_would_stand_behind_a_reader_is_refused(
    monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (Late(),))
    result = rewritten(Model(lambda m, x: m.fc(x).sin() + x.cos(), fc=nn.Linear(K, K)), x)
    (why,) = result.refused("linear")
    assert why.startswith("sin reads linear before the rewrite's inputs")
    torch.testing.assert_close(result.got, result.want)
