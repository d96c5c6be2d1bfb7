"""CONTRIBUTING says what a new rule or activation touches: here are two that touch no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from graphquant.ir.graph import LINEAR, aten, is_call, only_user
from graphquant.ops import cpu, quantize
from graphquant.ops.numerics import ACTIVATIONS, Activation
from graphquant.ops.qparams import DYNAMIC
from graphquant.passes import pipeline
from graphquant.passes.rule import Edit, Linear, Refuse, Rewrite, Site, View, linears
from tests.docs.pages import ROOT, rows
from tests.passes.graphs import Model, assert_near, linear_bound, rewritten

PAGE = "CONTRIBUTING.md"


def touched(what: str) -> list[str]:
    """The files that the page's table names for a new rule, op, activation or kernel."""
    (cell,) = [row[1] for row in rows(PAGE) if row[0] == what and len(row) == 2]
    return [word for word in re.findall(r"`([^`]+)`", cell) if "/" in word or "." in word]


@dataclass(frozen=True)
class NegatedSite(Site):
    linear: Linear


class Negated:
    """-(x W^T + b)  ->  x (-W)^T + (-b): a rule that is one class."""

    name = "negated"

    def sites(self, view: View) -> Iterator[NegatedSite]:
        for linear in linears(view):
            user = only_user(linear.node)
            if is_call(user, aten.neg.default):
                yield NegatedSite((user,), (linear.node,), (), linear)

    def check(self, view: View, site: NegatedSite) -> Refuse | None:
        if site.linear.bias is None:
            return Refuse("it has no bias", site.linear.node)
        return None

    def rewrite(self, edit: Edit, site: NegatedSite) -> Rewrite:
        x, weight, bias = site.linear.x, site.linear.weight, site.linear.bias
        y = edit.call(LINEAR, x, *(edit.fold(aten.neg.default, w) for w in (weight, bias)))
        return Rewrite((y,))


def negative(**kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(lambda m, x: -m.fc(x), fc=nn.Linear(32, 24, **kwargs))


@pytest.fixture
def _with_negated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (Negated(), *pipeline.INT8_RULES))


@pytest.mark.usefixtures("_with_negated")
def test_a_new_rule_is_a_class_and_a_line_in_the_order() -> None:
    model, x = negative(), torch.randn(5, 32)
    result = rewritten(model, x)
    assert result.counts == {"negated + linear": 1}
    assert result.ops()["neg"] == 2  # of the weight and the bias, not of the result
    assert result.one("int8_linear").users.keys() == {result.graph.output_node()}
    assert_near(result.got, result.want, linear_bound(x, model.fc.weight))


@pytest.mark.usefixtures("_with_negated")
def test_why_a_new_rule_refuses_is_in_the_report_of_every_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "INT8_RULES", (Negated(),))
    x = torch.randn(5, 32)
    with torch.inference_mode():
        applied = graphquant.explain(negative().eval(), x)
        refused = graphquant.explain(negative(bias=False).eval(), x)
    assert [o.rules for o in applied.linears] == [("negated",)]
    assert "negated" in str(applied)
    assert refused.reasons() == {"it has no bias": 1}


@pytest.mark.usefixtures("_with_negated")
def test_compare_and_export_know_a_new_rule() -> None:
    model, x = negative().eval(), torch.randn(64, 32)
    report = graphquant.compare(model, [x])
    assert report.worst is not None and report.worst.outcome.rules == ("negated", "linear")
    assert report.worst.local.sqnr > 35
    with torch.no_grad():
        got = graphquant.export(model, (x,)).module()(x)
        assert_near(got, model(x), linear_bound(x, model.fc.weight))


def test_without_its_line_the_rule_does_nothing() -> None:
    assert rewritten(negative(), torch.randn(5, 32)).counts == {"linear": 1}


def swish3(x: Tensor) -> Tensor:
    return x * torch.sigmoid(3.0 * x)


def test_a_new_activation_is_recognized_and_computed_from_its_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.fc(swish3(x)), fc=nn.Linear(32, 24))
    gated = Model(lambda m, x: m.fc(swish3(x) * x.cos()), fc=nn.Linear(32, 24))
    x = torch.randn(5, 32)
    assert rewritten(model, x).counts == {"linear": 1}, "an activation that nobody knows"
    entry = Activation(swish3, lambda op, x: op.Mul(x, op.Sigmoid(op.Mul(x, 3.0))))
    monkeypatch.setitem(ACTIVATIONS, "swish3", entry)
    for one, read in ((model, swish3(x)), (gated, swish3(x) * x.cos())):
        result = rewritten(one, x)
        assert result.counts == {"act_linear": 1}
        assert_near(result.got, result.want, linear_bound(read, one.fc.weight))
    assert quantize.cpu_refusal(x, None, "swish3", *DYNAMIC) is not None  # the reference did


def test_every_activation_has_its_branch_in_cpp() -> None:
    if (why := cpu.missing()) is not None:
        pytest.skip(why)
    assert cpu.library().module.activations == [*ACTIVATIONS]


@pytest.mark.parametrize("what", ["rule", "op", "activation", "kernel"])
def test_the_files_that_the_table_names_exist(what: str) -> None:
    for name in touched(what):
        places = (ROOT / name, ROOT / "graphquant" / name)
        assert any(place.exists() for place in places), f"{PAGE} names {name}"


def test_the_table_names_every_file_that_knows_each_activation() -> None:
    """A file that names every activation needs a line for a new one."""
    named = {
        str(path.relative_to(ROOT / "graphquant"))
        for path in (ROOT / "graphquant").rglob("*")
        if path.suffix in (".py", ".h", ".cuh")
        if all(f'"{name}"' in path.read_text() for name in ACTIVATIONS)
    }
    assert named == {n for n in touched("activation") if not n.startswith(("docs/", "tests/"))}
