"""visualize.lines: every operation stands once, in order, and looking changes nothing."""

from __future__ import annotations

import pytest

from graphquant.config import Config
from graphquant.visualize import Inspected, align, inspect
from tests import zoo


@pytest.fixture(scope="module")
def vit() -> dict[str, Inspected]:
    """The model as torch.compile and as torch.export capture it."""
    entry = zoo.load("vit")
    args, kwargs = entry.inputs(2)
    routes = {"compile": False, "export": True}
    found = {
        name: inspect(entry.build("sdpa"), args, kwargs, export=export)
        for name, export in routes.items()
    }
    assert all(len(graphs) == 1 for graphs in found.values())
    return {name: graphs[0] for name, graphs in found.items()}


def test_both_capture_routes_find_the_same(vit: dict[str, Inspected]) -> None:
    compiled, exported = vit["compile"].report, vit["export"].report
    assert compiled.counts() == exported.counts()
    assert compiled.reasons() == exported.reasons()


@pytest.mark.parametrize("route", ["compile", "export"])
def test_every_line_stands_in_one_row_in_order(vit: dict[str, Inspected], route: str) -> None:
    one = vit[route]
    rows = align(one.before, one.after)
    assert [row.before for row in rows if row.before] == list(one.before)
    assert [row.after for row in rows if row.after] == list(one.after)
    kept = {line.node for line in one.before} & {line.node for line in one.after}
    assert {row.before.node for row in rows if row.kind != "replaced" and row.before} == kept


@pytest.mark.parametrize("route", ["compile", "export"])
def test_lines_read_lines_above_them(vit: dict[str, Inspected], route: str) -> None:
    for side in (vit[route].before, vit[route].after):
        above: set[str] = set()
        for line in side:
            assert above.issuperset(line.reads), line.text
            above.add(line.node)
        names = [name for line in side for name in line.names if name != "_"]
        assert len(names) == len(set(names))


def test_the_model_is_not_changed_by_looking() -> None:
    entry = zoo.load("timm_block")
    model, (args, kwargs) = entry.build("sdpa"), entry.inputs(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inspect(model, args, kwargs, Config())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
