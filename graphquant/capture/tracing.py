"""torch.compile with a view of every graph: how the entries beside the backend run a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graphquant._torch import is_compiled, original
from graphquant._torch.dynamo import patch_config
from graphquant.capture.aten import from_dynamo
from graphquant.capture.fallback import left_in_float, or_in_float
from graphquant.errors import CaptureError, GraphquantError
from graphquant.failure import promised, stage
from graphquant.ir.captured import Captured
from graphquant.report import Report


class Trace:
    """Calls of a model.

    take(captured, Dynamo's graph) -> (its report, what runs in its place), once for each graph
    entry  that is of no use in float, and raises GraphquantError where graphquant fails; "" for
           one that reports such a graph as left in float
    """

    def __init__(
        self,
        take: Callable[[Captured, GraphModule], tuple[Report, Callable[..., Any]]],
        entry: str = "",
    ) -> None:
        self._take = take
        self._entry = entry
        self._reports: list[Report] = []
        self._seen: set[int] = set()  # ids of parameters
        self._root: nn.Module | None = None
        # Dynamo counts compilations by code object, and runs eager after a few: this one is new
        call = FunctionType(_call.__code__.replace(), globals())
        self._compiled = torch.compile(call, backend=self.observe)

    def __call__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._root = root_of(model)
        many = patch_config(recompile_limit=2**16, accumulated_recompile_limit=2**16)
        with many, promised(self._entry):
            return self._compiled(model, *args, **kwargs)

    def observe(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def attempt() -> tuple[Report, Callable[..., Any]]:
            with stage("capture"):
                captured = from_dynamo(gm, example_inputs, self._root)
            if captured is None:
                return Report((), graphs=0), gm.forward
            self._seen.update(map(id, captured.parameters.values()))
            return self._take(captured, gm)

        if self._entry:
            try:
                report, run = attempt()
            except CaptureError as why:
                report, run = left_in_float(gm, why), gm.forward
        else:
            report, int8 = or_in_float(gm, attempt)
            run = int8 or gm.forward
        if report.graphs:
            self._reports.append(report)
        return run

    def report(self, model: Callable[..., Any]) -> Report:
        """Of all graphs until now."""
        if not self._reports:
            raise GraphquantError(f"torch.compile found no tensor code in {type(model).__name__}")
        report = Report.merge(self._reports)
        return replace(report, notes=(*report.notes, *unseen(root_of(model), self._seen)))


def root_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module at which paths begin: the model, or whose method it is; None for a function."""
    model = getattr(model, "__self__", model)
    if is_compiled(model):
        return root_of(original(model))
    return model if isinstance(model, nn.Module) else None


def unseen(model: nn.Module | None, seen: Collection[Any]) -> Iterator[str]:
    """A note if the model has linears that no graph holds: coverage does not count them."""
    if model is None:
        return
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if missing := [n for n, m in every.items() if id(m.weight) not in seen]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield (
            f"{len(missing)} of {len(every)} nn.Linear modules are in no captured graph and not "
            f"counted ({names}): this call did not reach them, torch.compile skipped their code, "
            "or they share another layer's graph"
        )


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # named as in a method: paths in the report begin behind it
