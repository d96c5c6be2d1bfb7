"""A module that `optimize_` was called for, and the report that follows what it compiles."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, replace
from typing import Any
from weakref import WeakSet, ref

from torch import nn

from graphquant._torch import local_of
from graphquant.capture.tracing import missing_linears
from graphquant.config import Config
from graphquant.optimized.calls import (
    CALL,
    FORWARD,
    OptimizedCall,
    inside_cached_call,
    override,
)
from graphquant.parts import is_hooked, parts_of
from graphquant.report import Quiet, Report

log = logging.getLogger(__name__)


class LiveReport(Report):
    """Report of an optimized module, updated whenever it compiles a graph."""

    @property
    def ran(self) -> bool:
        """Has the module, or a part of it, been compiled by a call since `optimize_`?"""
        return self.graphs > 0

    def become(self, report: Report) -> None:
        """Replace the content by that of another report."""
        for field in fields(Report):
            object.__setattr__(self, field.name, getattr(report, field.name))


class Optimized:
    """A module that `optimize_` was called for.

    call    what the module calls
    parts   what its parts call, by path
    """

    def __init__(self, module: nn.Module, config: Config, options: dict[str, Any]) -> None:
        self.config = config
        self.report = LiveReport(())
        self.module: Callable[[], Any] = ref(module)
        self.options = options
        self._graphs: dict[frozenset[Hashable], Report] = {}  # by ids of the parameters of each
        self._told = False
        found = parts_of(module)
        self.call = OptimizedCall(module, self, "")
        self.parts = {path: OptimizedCall(part, self, path) for path, part in found.items()}
        self.before = vars(module).get(CALL)
        setattr(module, CALL, self.call)
        if FORWARD not in vars(module) or is_hooked(module):
            override(module, self.call)
        for path, part in found.items():
            override(part, self.parts[path])
        self._update()
        _not_called.add(self)

    def remove(self) -> None:
        """Undo what was set on the module and its parts."""
        for part in list(self.parts.values()):
            part.remove()
        self.call.remove()
        vars(self.module()).pop(CALL)
        if self.before is not None:
            setattr(self.module(), CALL, self.before)
        _not_called.discard(self)

    def add(self, reads: frozenset[Hashable], report: Report) -> None:
        """Add the report of a graph.

        reads  ids of the parameters that it reads
        """
        key = reads or frozenset(o.node for o in report.outcomes)
        if key:  # a graph without weights replaces no other one
            overlaps = [k for k in self._graphs if k and (k <= key or key <= k)]
            for old in overlaps:
                del self._graphs[old]
        self._graphs[key] = report
        self._update()
        if self.config.on_report is not None:
            self.config.on_report(report)

    def tell(self) -> None:
        """Warn, once, if nothing has run in int8. To be called after a call."""
        _not_called.discard(self)
        self._update()
        if self._told or inside_cached_call():  # or not all of its parts were called yet
            return
        self._told = True
        log.info("optimize_: %s", "; ".join((self.report.summary(), *self.report.notes)))
        loud = [note for note in self.report.notes if not isinstance(note, Quiet)]
        if not self.report.ran:
            log.warning("optimize_: nothing has run in int8: %s", "; ".join(self.report.notes))
        elif self.config.quantize and not self.report.coverage and not loud:
            log.warning("optimize_: nothing runs in int8: %s", self.report.summary())

    def _update(self) -> None:
        report = Report.merge(self._graphs.values())
        self.report.become(replace(report, notes=(*report.notes, *self._notes())))

    def _notes(self) -> Iterator[str]:
        """What has not run, and why."""
        calls = {"": self.call, **self.parts}
        if not any(call.compiled or call.cached for call in calls.values()):
            yield "nothing is compiled yet: the module was not called"
            return
        seen: set[Hashable] = set().union(*self._graphs)
        cached, idle = dict[str, None](), dict[str, None]()
        for name, linear in self.module().named_modules():
            if not isinstance(linear, nn.Linear) or id(local_of(linear.weight)) in seen:
                continue
            around = [p for p in calls if not p or f"{name}.".startswith(f"{p}.")]
            if any(calls[p].compiled for p in around):
                continue  # for missing_linears
            seen.add(id(local_of(linear.weight)))
            if calls[inner := max(around, key=len)].cached:
                cached[inner or name] = None
            else:
                outer = min((p for p in around if p and not calls[p].cached), key=len, default=name)
                idle[outer] = None
        if cached:
            yield Quiet(
                f"in float, because called with a key/value cache: {', '.join(cached)}; decoding "
                "token by token is not quantized"
            )
        if idle:
            yield Quiet(f"not called: {', '.join(idle)}")
        if self._graphs:
            yield from missing_linears(self.module(), seen)


_not_called: WeakSet[Optimized] = WeakSet()


@atexit.register
def _warn_of_what_was_not_called() -> None:
    for optimized in list(_not_called):
        if (module := optimized.module()) is not None:
            name = type(module).__name__
            log.warning("optimize_: nothing has run in int8: %s was never called", name)


def optimized_of(module: nn.Module) -> Optimized | None:
    """What `optimize_` has made of this module, if it was called for it."""
    call = vars(module).get(CALL)
    owner = call.optimized if isinstance(call, OptimizedCall) else None
    return owner if isinstance(owner, Optimized) else None
