"""Run some nodes of a graph on given values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate


def call_target(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def evaluate(
    nodes: Iterable[Node],
    values: dict[Node, Any],
    argument: Callable[[Any], Any] = lambda a: a,
    call: Callable[[Node, tuple[Any, ...], dict[str, Any]], Any] = call_target,
) -> dict[Node, Any]:
    """Call the targets of these nodes in order, and add their results to `values`, which is
    returned.

    values    of everything that the nodes read and do not compute themselves
    argument  replaces arguments that are not nodes
    call      computes the value of a node from those of its arguments
    """

    def value(a: Any) -> Any:
        return values[a] if isinstance(a, Node) else argument(a)

    for node in nodes:
        args, kwargs = map_aggregate((node.args, node.kwargs), value)
        values[node] = call(node, args, kwargs)
    return values
