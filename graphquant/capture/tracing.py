"""Trace: runs a model by torch.compile with a function for every captured graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graphquant._torch import is_compiled, local_of, original
from graphquant._torch.dynamo import patch_config
from graphquant.capture.aten import from_dynamo
from graphquant.capture.fallback import left_in_float, with_fallback
from graphquant.errors import CaptureError, GraphquantError
from graphquant.failure import raise_failures, stage
from graphquant.ir.captured import Captured
from graphquant.report import Report


class Trace:
    """Calls a model, with a replacement for each of its graphs.

    take   take(captured, Dynamo's graph) -> (report, replacement), called once per graph
    entry  name of an entry point that is useless in float, and so raises GraphquantError if
           graphquant fails; "" if the graph is reported as left in float instead
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
        # a new code object: Dynamo counts compilations per code object, and runs eager after a few
        call = FunctionType(_call.__code__.replace(), globals())
        self._compiled = torch.compile(call, backend=self.observe)

    def __call__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._root = root_of(model)
        limits = patch_config(recompile_limit=2**16, accumulated_recompile_limit=2**16)
        with limits, raise_failures(self._entry), _without_fast_path():
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
            report, int8 = with_fallback(gm, attempt)
            run = int8 or gm.forward
        if report.graphs:
            self._reports.append(report)
        return run

    def report(self, model: Callable[..., Any]) -> Report:
        """The merged Report of all graphs so far. Raises GraphquantError if there are none."""
        if not self._reports:
            raise GraphquantError(f"torch.compile found no tensor code in {type(model).__name__}")
        report = Report.merge(self._reports)
        return replace(report, notes=(*report.notes, *missing_linears(root_of(model), self._seen)))


def root_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module at which paths begin: the model, or the owner of the method; None if neither."""
    model = getattr(model, "__self__", model)
    if is_compiled(model):
        return root_of(original(model))
    return model if isinstance(model, nn.Module) else None


def missing_linears(model: nn.Module | None, seen: Collection[Any]) -> Iterator[str]:
    """A note if linears of the model are in no graph, and so not counted in its coverage.

    seen  ids of the parameters of all graphs, of DTensors those of their local tensors
    """
    if model is None:
        return
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if missing := [n for n, m in every.items() if id(local_of(m.weight)) not in seen]:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield (
            f"{len(missing)} of {len(every)} nn.Linear modules are in no captured graph and not "
            f"counted ({names}): this call did not reach them, torch.compile skipped their code, "
            "or they share another layer's graph"
        )


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Context in which nn.TransformerEncoderLayer runs its submodules: torch 2.11 cannot trace the
    one op that it calls instead if sizes are dynamic."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)  # named `self` as in a method: paths leave it out
