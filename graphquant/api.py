"""The entries beside torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule

from graphquant.capture import from_dynamo
from graphquant.config import Config
from graphquant.errors import CaptureError, GraphquantError, UnsupportedInputError
from graphquant.passes.pipeline import rewrite
from graphquant.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend="graphquant", options=options)` would do on this call.

    Captures `model(*args, **kwargs)`, applies the rules and returns the Report. Nothing is packed
    or compiled; the model runs once, in float, as it is. Call it under the same
    `torch.inference_mode()` or `torch.no_grad()` as the model: what needs a gradient stays float.
    """
    if not callable(model):
        raise UnsupportedInputError(f"explain needs a torch.nn.Module, got {type(model).__name__}")
    config = Config.of(options or {})
    reports: list[Report] = []
    seen: set[int] = set()

    def observe(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            captured = from_dynamo(gm, example_inputs)
        except CaptureError as why:
            captured = None
            reports.append(Report.left(why))
        if captured is not None:
            seen.update(map(id, captured.parameters.values()))
            reports.append(rewrite(captured, config))
        run: Callable[..., Any] = gm.forward
        return run

    # Dynamo counts compilations by code object, and runs eager after a few: this one is new, so
    # that the model's own code is not charged (but it is where its graph breaks)
    call = FunctionType(_call.__code__.replace(), globals())
    with torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16):
        torch.compile(call, backend=observe)(model, *args, **kwargs)
    if not reports:
        raise GraphquantError(f"torch.compile found no tensor code in {type(model).__name__}")
    report = Report.merge(reports)
    return replace(report, notes=(*report.notes, *_unseen(model, seen)))


def _unseen(model: Callable[..., Any], seen: set[int]) -> Iterator[str]:
    """A note if the model has linears that no graph holds: coverage does not count them."""
    if not isinstance(model, torch.nn.Module):
        return
    every = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if missing := [n for n, m in every.items() if id(m.weight) not in seen]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield (
            f"{len(missing)} of {len(every)} nn.Linear modules are in no captured graph and not "
            f"counted ({names}): this call did not reach them, torch.compile skipped their code, "
            "or they share another layer's graph"
        )


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # named as in a method: paths in the report begin behind it
