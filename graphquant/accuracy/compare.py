"""Int8 against float over batches: errors by linear and by output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graphquant.accuracy.outputs import kept
from graphquant.accuracy.pair import Pair
from graphquant.accuracy.report import AccuracyReport, OutputAccuracy, SiteAccuracy
from graphquant.errors import GraphquantError
from graphquant.metrics import Error, RowCosines
from graphquant.report import Outcome, Report

Key = tuple[str, int]  # a linear's path, and how many times this call of the model was there before


class FloatRun:
    """One call of the model in float, and the int8 products of its linears on float values.

    values  what each linear computed
    local   the error of its int8 product on what the float model reads there
    """

    def __init__(self) -> None:
        self.linears: dict[Key, Outcome] = {}  # in the order in which the model runs them
        self.values: dict[Key, Tensor] = {}
        self.local: dict[Key, Error] = {}
        self._keys = _Keys()

    def __call__(self, pair: Pair, args: Sequence[Any]) -> Any:
        """In place of one graph of the model."""
        linears = pair.linears(args)
        keys = [self._keys.of(linear) for linear in linears]
        self.linears |= dict(zip(keys, linears, strict=True))

        def found(i: int, y: Tensor, y8: Tensor) -> None:
            self.local[keys[i]] = Error.of(y8, y)
            self.values[keys[i]] = y.clone()  # the model may go on to write to it

        return pair.run_float(args, found)


class Int8Run:
    """The same call of the model in int8, against what its linears computed in float.

    values       what they computed in float, of which the run takes out what it has met
    accumulated  the error of each int8 product, its input in int8 as well
    """

    def __init__(self, values: dict[Key, Tensor]) -> None:
        self.accumulated: dict[Key, Error] = {}
        self._values = values
        self._strayed: list[str] = []  # linears that are not where they were in float
        self._keys = _Keys()

    def __call__(self, pair: Pair, args: Sequence[Any]) -> Any:
        """In place of one graph of the model."""
        keys = [self._keys.of(linear) for linear in pair.linears(args)]

        def found(i: int, y8: Tensor) -> None:
            y = self._values.pop(keys[i], None)
            if y is None or y.shape != y8.shape:
                self._strayed.append(keys[i][0])
            else:
                self.accumulated[keys[i]] = Error.of(y8, y)

        return pair.run_int8(args, found)

    def check(self) -> None:
        """Raises GraphquantError if the model took another path than in float."""
        for name in (*self._strayed, *(name for name, _ in self._values)):
            raise _other_path(name)


class _Keys:
    """Names for linears that one call of the model may run several times."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    def of(self, linear: Outcome) -> Key:
        name = linear.path or linear.node
        self._calls[name] += 1
        return name, self._calls[name] - 1


class Comparison:
    """Errors of a model in int8, added up over batches, by linear and by output."""

    def __init__(self) -> None:
        self._linears: dict[Key, Outcome] = {}  # in the order in which the model runs them
        self._local: dict[Key, Error] = {}
        self._accumulated: dict[Key, Error] = {}
        self._outputs: dict[str, tuple[Error, RowCosines]] = {}
        self._batches = 0

    def linears(self, floats: FloatRun, int8: Int8Run) -> None:
        """Add what both runs of one batch found."""
        for key, linear in floats.linears.items():
            self._linears.setdefault(key, linear)
        for total, found in (
            (self._local, floats.local),
            (self._accumulated, int8.accumulated),
        ):
            for key, error in found.items():
                total[key] = total.get(key, Error()) + error

    def outputs(self, got: Any, theirs: Mapping[str, Tensor]) -> None:
        """Add what the model returned in int8, against the tensors that were `kept` in float."""
        self._batches += 1
        ours = kept(got)
        if ours.keys() != theirs.keys():
            raise _other_path("its outputs")
        for name, y in theirs.items():
            y8 = ours[name]
            if y8.shape != y.shape:
                raise _other_path(f"its output {name}")
            error, cosines = self._outputs.get(name, (Error(), RowCosines()))
            self._outputs[name] = error + Error.of(y8, y), cosines + RowCosines.of(y8, y)

    def result(self, report: Report) -> AccuracyReport:
        sites = tuple(
            SiteAccuracy(linear, key[1], self._local[key], self._accumulated[key])
            for key, linear in self._linears.items()
        )
        outputs = tuple(OutputAccuracy(name, *sums) for name, sums in self._outputs.items())
        return AccuracyReport(sites, outputs, report, self._batches)


def _other_path(where: str) -> GraphquantError:
    return GraphquantError(
        f"the model took another path in int8 than in float, seen at {where}: its control flow or "
        "its sizes depend on values that int8 has changed"
    )
