"""Runs and sums of `graphquant.compare`: int8 errors by linear and by output, over batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphquant.accuracy.pair import Pair
from graphquant.accuracy.report import AccuracyReport, OutputAccuracy, Padding, SiteAccuracy
from graphquant.errors import GraphquantError
from graphquant.ir.tokens import Masks, counted
from graphquant.metrics import Error, RowCosines
from graphquant.report import Outcome, Report

Key = tuple[
    str, int
]  # a linear's path, and the number of its earlier runs in this call of the model


class Value(NamedTuple):
    """The float result of a linear.

    y      the rows that count
    rows   [...] bool, which those are; None for all
    shape  of the whole result
    """

    y: Tensor
    rows: Tensor | None
    shape: torch.Size


class FloatRun:
    """One call of the model in float, which also runs each int8 linear on the float inputs.

    masks   of this call
    values  the float result of each linear
    local   the error of its int8 result on the float input
    """

    def __init__(self, masks: Masks) -> None:
        self.linears: dict[Key, Outcome] = {}  # in execution order
        self.values: dict[Key, Value] = {}
        self._masks = masks
        self.local: dict[Key, Error] = {}
        self._keys = _Keys()

    def __call__(self, pair: Pair, args: Sequence[Any]) -> Any:
        """Run one graph of the model."""
        linears = pair.linears(args)
        keys = [self._keys.of(linear) for linear in linears]
        self.linears |= dict(zip(keys, linears, strict=True))

        def found(i: int, y: Tensor, y8: Tensor, rows: Tensor | None) -> None:
            counts = counted(y, rows)
            self.local[keys[i]] = Error.of(counted(y8, rows), counts)
            kept = counts.clone() if rows is None else counts  # the model may write to y later
            self.values[keys[i]] = Value(kept, rows, y.shape)

        return pair.run_float(args, found, self._masks)


class Int8Run:
    """The same call of the model in int8, compared with the float results of its linears.

    values       those results; the run removes the ones that it has compared
    accumulated  the error of each int8 linear on the int8 model's input
    """

    def __init__(self, values: dict[Key, Value]) -> None:
        self.accumulated: dict[Key, Error] = {}
        self._values = values
        self._mismatched: list[str] = []  # linears without a float result of their shape
        self._keys = _Keys()

    def __call__(self, pair: Pair, args: Sequence[Any]) -> Any:
        """Run one graph of the model."""
        keys = [self._keys.of(linear) for linear in pair.linears(args)]

        def found(i: int, y8: Tensor) -> None:
            value = self._values.pop(keys[i], None)
            if value is None or value.shape != y8.shape:
                self._mismatched.append(keys[i][0])
            else:
                self.accumulated[keys[i]] = Error.of(counted(y8, value.rows), value.y)

        return pair.run_int8(args, found)

    def check(self) -> None:
        """Raises GraphquantError if the model ran other linears than in float."""
        for name in (*self._mismatched, *(name for name, _ in self._values)):
            raise _diverged(name)


class _Keys:
    """Counts the runs of each linear within one call of the model."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    def of(self, linear: Outcome) -> Key:
        name = linear.path or linear.node
        self._calls[name] += 1
        return name, self._calls[name] - 1


class Comparison:
    """Int8 errors of a model summed over batches, by linear and by output."""

    def __init__(self) -> None:
        self._linears: dict[Key, Outcome] = {}  # in execution order
        self._local: dict[Key, Error] = {}
        self._accumulated: dict[Key, Error] = {}
        self._outputs: dict[str, tuple[Error, RowCosines]] = {}
        self._batches = 0

    def linears(self, floats: FloatRun, int8: Int8Run) -> None:
        """Add the errors of one batch's linears."""
        for key, linear in floats.linears.items():
            self._linears.setdefault(key, linear)
        for total, found in (
            (self._local, floats.local),
            (self._accumulated, int8.accumulated),
        ):
            for key, error in found.items():
                total[key] = total.get(key, Error()) + error

    def outputs(self, got: Mapping[str, Tensor], want: Mapping[str, Tensor], masks: Masks) -> None:
        """Add the errors of the int8 outputs of one batch against the float ones."""
        self._batches += 1
        if got.keys() != want.keys():
            raise _diverged("its outputs")
        for name, y in want.items():
            if got[name].shape != y.shape:
                raise _diverged(f"its output {name}")
            rows = masks.rows(y)
            y8, y = counted(got[name], rows), counted(y, rows)
            error, cosines = self._outputs.get(name, (Error(), RowCosines()))
            self._outputs[name] = error + Error.of(y8, y), cosines + RowCosines.of(y8, y)

    def result(self, report: Report, padding: tuple[Padding, ...] = ()) -> AccuracyReport:
        sites = tuple(
            SiteAccuracy(linear, key[1], self._local[key], self._accumulated[key])
            for key, linear in self._linears.items()
        )
        outputs = tuple(OutputAccuracy(name, *sums) for name, sums in self._outputs.items())
        return AccuracyReport(sites, outputs, report, self._batches, padding)


def _diverged(where: str) -> GraphquantError:
    return GraphquantError(
        f"the model took another path in int8 than in float, seen at {where}: its control flow or "
        "its sizes depend on values that int8 has changed"
    )
