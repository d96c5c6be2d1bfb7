"""visualize.tree: nothing is lost or changes places, what was kept stands beside itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from graphquant.visualize.lines import Line, Row
from graphquant.visualize.tree import Module, tree

Item = Module | Row


def line(node: str, path: str = "") -> Line:
    return Line(node=node, names=(node,), op="op", call="op()", path=path)


def rows(items: Sequence[Item]) -> list[Row]:
    return [r for item in items for r in ([item] if isinstance(item, Row) else item.rows())]


def modules(items: Sequence[Item]) -> Iterator[Module]:
    for item in items:
        if isinstance(item, Module):
            yield item
            yield from modules(item.items)


def outline(items: Sequence[Item]) -> list[object]:
    """Names of modules and nodes, for a test to read."""
    return [
        (item.name, outline(item.items))
        if isinstance(item, Module)
        else tuple(side.node if side else None for side in (item.before, item.after))
        for item in items
    ]


names = st.sampled_from(["", "a", "a.b", "a.b.c", "a.c", "b", "layers.0", "layers.0.a", "layers.1"])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Line], list[Line]]:
    """Some lines are kept, some go, some are new."""
    old = [line(f"n{i}", draw(names)) for i in range(draw(st.integers(0, 12)))]
    kept = [one for one in old if draw(st.booleans())]
    for i in range(draw(st.integers(0, 5))):
        kept.insert(draw(st.integers(0, len(kept))), line(f"new{i}", draw(names)))
    return old, kept


@given(graphs())
def test_every_line_of_both_sides_has_one_row_in_order(
    sides: tuple[list[Line], list[Line]],
) -> None:
    before, after = sides
    found = rows(tree(before, after))
    assert [row.before for row in found if row.before] == before
    assert [row.after for row in found if row.after] == after
    assert all(row.before or row.after for row in found)


@given(graphs())
def test_a_module_holds_its_own_lines_alone(sides: tuple[list[Line], list[Line]]) -> None:
    for module in modules(tree(*sides)):
        assert module.path == module.name or module.path.endswith(f".{module.name}")
        for row in module.rows():
            for one in filter(None, (row.before, row.after)):
                assert f"{one.path}.".startswith(f"{module.path}.")


@given(graphs())
def test_a_graph_beside_itself_is_the_same_in_every_row(
    sides: tuple[list[Line], list[Line]],
) -> None:
    assert {row.kind for row in rows(tree(sides[0], sides[0]))} <= {"same"}


def test_a_module_meets_itself_though_its_lines_are_all_new() -> None:
    before = [
        line("norm", "m.norm"),
        line("q", "m.attn.q"),
        line("view", "m.attn"),
        line("add", "m"),
    ]
    after = [
        line("xq", "m.attn.q"),
        line("q8", "m.attn.q"),
        line("view", "m.attn"),
        line("sum", "m"),
    ]
    assert outline(tree(before, after)) == [
        (
            "m",
            [
                ("norm", [("norm", None)]),
                ("attn", [("q", [("q", "xq"), (None, "q8")]), ("view", "view")]),
                ("add", "sum"),
            ],
        )
    ]


def test_a_module_that_only_calls_another_stands_in_one_name_with_it() -> None:
    lines = [line("x"), line("a", "encoder.layers.0.fc"), line("b", "encoder.layers.1.fc")]
    assert outline(tree(lines)) == [
        ("x", None),
        ("encoder.layers", [("0.fc", [("a", None)]), ("1.fc", [("b", None)])]),
    ]


def test_a_module_that_is_called_again_has_two_places() -> None:
    lines = [line("a", "m.drop"), line("b", "m"), line("c", "m.drop")]
    assert outline(tree(lines)) == [
        ("m", [("drop", [("a", None)]), ("b", None), ("drop", [("c", None)])])
    ]
