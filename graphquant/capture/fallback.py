"""Fallback to float: runs Dynamo's graph unchanged, with a report that says why."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from graphquant.capture.sources import linears_of
from graphquant.config import strict
from graphquant.errors import CaptureError
from graphquant.failure import NEVER_CAUGHT, what_failed, what_to_do
from graphquant.ir.graph import hint
from graphquant.report import Outcome, Report


def with_fallback(
    gm: GraphModule, attempt: Callable[[], tuple[Report, Callable[..., Any]]]
) -> tuple[Report, Callable[..., Any] | None]:
    """attempt(), or (report of the failure, None) if graphquant fails.

    `attempt` must not change Dynamo's graph. Nothing of a failed attempt is kept alive: it may have
    run out of memory.
    """
    try:
        return attempt()
    except CaptureError as why:
        return left_in_float(gm, why), None
    except NEVER_CAUGHT:
        raise
    except Exception as error:
        if strict():
            raise
        return left_in_float(gm, f"{what_failed(error)}. {what_to_do(error)}"), None


def left_in_float(gm: GraphModule, why: object) -> Report:
    """Report of a graph whose linears are all float, for this reason."""
    outcomes = (
        Outcome("linear", path, node.name, (), str(why), *_sizes(node))
        for node, path in linears_of(gm)
    )
    return Report(tuple(outcomes), notes=Report.left(why).notes)


def _sizes(linear: Node) -> tuple[int, int, int]:
    """M, N, K; zeros if unknown."""
    values = [a.meta.get("example_value") for a in linear.args[:2] if isinstance(a, Node)]
    if len(values) < 2 or not all(isinstance(v, Tensor) and v.dim() for v in values):
        return 0, 0, 0
    x, weight = ([hint(n) for n in v.shape] for v in values if v is not None)
    return prod(x[:-1]), weight[0] if len(weight) > 1 else 1, x[-1]
