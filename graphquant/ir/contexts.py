"""The contexts that are active at each node: autograd, inference mode, autocast, SDPA backends.

Dynamo records contexts as calls that change torch's global state and compute nothing. The calls in
STATEFUL stay in place (capture/aten.py), so a graph is a sequence of segments with changes of state
between them. A graph with any other such call is not rewritten.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from graphquant._torch import (
    ALLOW_HOOKS,
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    FORBID_HOOKS,
    SDPA_BACKEND,
    SET_GRAD,
    SET_SDPA,
)

APART = "a context, such as autocast, begins or ends between them"

STATEFUL: frozenset[Any] = frozenset(
    {
        SET_GRAD,
        ENTER_AUTOCAST,
        EXIT_AUTOCAST,
        ENTER_INFERENCE,
        EXIT_INFERENCE,
        SET_SDPA,
        SDPA_BACKEND,
        FORBID_HOOKS,
        ALLOW_HOOKS,
    }
)


@dataclass(frozen=True)
class Region:
    """Torch's global state at one node.

    grad        whether autograd is on (without regard to inference mode)
    inference   whether inference mode is on
    autocast    the arguments of the open autocast regions, outer ones first
    sdpa        arguments of the last SET_SDPA: (names of backends, whether their order is a
                priority); None: as outside the graph
    """

    grad: bool = False
    inference: bool = False
    autocast: tuple[tuple[Any, ...], ...] = ()
    sdpa: tuple[tuple[str, ...], bool] | None = None

    @property
    def records(self) -> bool:
        """Does autograd record what is computed here?"""
        return self.grad and not self.inference


def sets_state(node: Node) -> bool:
    """Does this call change torch's global state and compute no value?"""
    return node.op == "call_function" and node.target in STATEFUL


def regions(graph: Graph, grad_enabled: bool = False) -> Iterator[tuple[Node, Region]]:
    """Every node with its Region."""
    now = Region(grad=grad_enabled)
    entered: dict[Node, Any] = {}  # the state to restore at the exit
    for node in graph.nodes:
        yield node, now
        if not sets_state(node):
            continue
        if node.target is SET_GRAD:
            now = replace(now, grad=bool(node.args[0]))
        elif node.target is ENTER_INFERENCE:
            entered[node] = now.grad, now.inference
            on = bool(node.args[0])
            now = replace(now, grad=not on, inference=on)  # as torch's guard does
        elif node.target is EXIT_INFERENCE:
            grad, inference = entered[node.args[0]]
            now = replace(now, grad=grad, inference=inference)
        elif node.target is ENTER_AUTOCAST:
            entered[node] = now.autocast
            now = replace(now, autocast=(*now.autocast, node.args))
        elif node.target is EXIT_AUTOCAST:
            now = replace(now, autocast=entered[node.args[0]])
        elif node.target is SET_SDPA:
            names, *by_priority = node.args
            backends = tuple(str(b.args[0]) for b in names)
            now = replace(now, sdpa=(backends, bool(by_priority and by_priority[0])))


def region_of(node: Node) -> Region:
    return next(region for n, region in regions(node.graph) if n is node)


def are_apart(nodes: Collection[Node], *, autocast: bool) -> bool:
    """Is a context entered or left between the first and the last of these nodes?

    autocast  whether autocast counts: not for our ops, which take their dtype as an argument
    """
    if len(nodes) < 2:
        return False
    first, last = min(nodes), max(nodes)
    targets = STATEFUL if autocast else STATEFUL - {ENTER_AUTOCAST, EXIT_AUTOCAST}
    setters = (n for t in targets for n in first.graph.find_nodes(op="call_function", target=t))
    return any(first < n < last for n in setters)
