"""The search behind `graphquant.fit_budget`: which linears to leave in float.

The linears' errors add up in the outputs almost like independent noise, so a linear's error alone
predicts its share among the others. Linears are ranked by

    loss with only this linear in int8 / cost of leaving it in float

Bisection finds the shortest prefix of that ranking which, left in float, reaches the goal. Then
each of its linears, the most expensive first, returns to int8 if the goal still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from graphquant.accuracy.budget import Metric
from graphquant.accuracy.calls import Call, copies, preserve_rng
from graphquant.accuracy.compare import Comparison
from graphquant.accuracy.counted import Counted
from graphquant.accuracy.pair import Pair
from graphquant.capture.tracing import Trace, root_of
from graphquant.config import Config
from graphquant.errors import GraphquantError
from graphquant.failure import stage
from graphquant.ir.captured import Captured
from graphquant.ir.interpret import Paths
from graphquant.report import Outcome, Report
from graphquant.utils.progress import bar

Quality = Callable[
    [frozenset[str]], float
]  # of the outputs, with the linears at these paths in float
_MIN_COST = 1e-9  # relative to the total, so that zero-cost linears still rank by loss


class Found(NamedTuple):
    """The result of a search, by module paths.

    left    the linears to leave in float
    others  all others, by rank
    alone   the quality with only this linear in int8
    """

    left: list[str]
    others: list[str]
    alone: dict[str, float]


def search(
    costs: Mapping[str, float], quality: Quality, loss: Callable[[float], float], goal: float
) -> Found:
    """A small set of linears with quality(set) >= goal.

    costs  of leaving each linear in float, in any unit

    Raises GraphquantError if all of them in float do not suffice.
    """
    every = frozenset(costs)
    if not (best := quality(every)) >= goal:
        raise GraphquantError(
            f"this budget cannot be met: with every linear in float the outputs reach {best:g}, "
            f"less than {goal:g}. Does the model compute the same when it is called twice?"
        )
    floor = _MIN_COST * sum(max(c, 0.0) for c in costs.values()) or 1.0
    alone = {path: quality(every - {path}) for path in costs}
    gain = {path: loss(alone[path]) / max(costs[path], floor) for path in costs}
    ranked = sorted(costs, key=lambda path: gain[path], reverse=True)
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if quality(frozenset(ranked[:middle])) >= goal:
            high = middle
        else:
            low = middle + 1
    left = ranked[:high]
    for path in sorted(left, key=lambda path: costs[path], reverse=True):
        fewer = [other for other in left if other != path]
        if quality(frozenset(fewer)) >= goal:
            left = fewer
    return Found(left, [path for path in ranked if path not in left], alone)


class Trials:
    """Runs a model on these calls with any subset of its linears in int8, and compares the outputs.

    Stacked siblings may differ; they share the smoothing and ranges that they have if all are int8,
    which is close to the final result.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        calls: Sequence[Call],
        config: Config,
        counted: Counted | None = None,
    ) -> None:
        self._model, self._calls, self._config = model, calls, config
        self._counted = counted or Counted(model)
        self._masks = [self._counted.masks(*call) for call in calls]
        self._paths = Paths(root_of(model))
        self._sites: dict[
            str, list[tuple[Outcome, float]]
        ] = {}  # with its share of its int8_linear
        self._int8: Collection[str] = ()
        self.trace = Trace(self._take, "fit_budget")
        self._wanted: list[dict[str, Tensor]] = []

    def _take(self, captured: Captured, gm: GraphModule) -> tuple[Report, Callable[..., Any]]:
        with stage("the pairing of float and int8"):
            pair = Pair(captured, self._config, self._paths)
        here: dict[str, list[tuple[Outcome, float]]] = {}
        for product in pair.products:
            width = sum(outcome.N for outcome in product)
            for outcome in product:
                here.setdefault(outcome.path, []).append((outcome, outcome.N / width))
        for path, outcomes in here.items():
            self._sites.setdefault(path, outcomes)

        def run(*args: Any) -> Any:
            return pair.run_mixed(args, lambda o: o.path in self._int8)

        return pair.report, captured.around(run)

    def _run(self, int8: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """What counts in the result of each call."""
        self._int8 = int8
        for (args, kwargs), masks in zip(self._calls, self._masks, strict=True):
            with torch.no_grad(), preserve_rng():
                result = self.trace(self._model, *copies(args, kwargs))
            yield self._counted.outputs(result, masks)

    def costs(self) -> dict[str, float]:
        """Path -> cost of leaving its linears in float: measured microseconds if all of the model's
        int8 linears were measured, else FLOPs."""
        if not self._wanted:
            self._wanted = list(self._run(()))
        every = [outcome for site in self._sites.values() for outcome, _ in site]
        timed = all(outcome.float_us > 0 for outcome in every)

        def cost(outcome: Outcome, share: float) -> float:
            return (outcome.float_us - outcome.int8_us) * share if timed else outcome.flops

        return {path: sum(cost(*one) for one in site) for path, site in self._sites.items()}

    def flops(self, path: str) -> int:
        return sum(outcome.flops for outcome, _ in self._sites[path])

    def quality(self, metric: Metric, in_float: frozenset[str]) -> float:
        """The metric of the outputs with these linears in float and all others in int8."""
        comparison = Comparison()
        runs = self._run(self._sites.keys() - in_float)
        for got, want, masks in zip(runs, self._wanted, self._masks, strict=True):
            comparison.outputs(got, want, masks)
        return metric(comparison.result(Report(())).outputs)

    def search(self, metric: Metric, goal: float, *, progress: bool | None) -> Found:
        costs, known = self.costs(), dict[frozenset[str], float]()
        with bar("fit_budget", "run", progress) as shown:

            def quality(in_float: frozenset[str]) -> float:
                if in_float not in known:
                    known[in_float] = self.quality(metric, in_float)
                    shown.update()
                return known[in_float]

            return search(costs, quality, metric.loss, goal)
