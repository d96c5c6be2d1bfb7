"""The sums of a comparison: what `Pair`s find, batch by batch, added up by site and by output."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graphquant.accuracy import AccuracyReport, Error, OutputAccuracy, RowCosines, SiteAccuracy
from graphquant.errors import GraphquantError, UnsupportedInputError
from graphquant.paired import Pair
from graphquant.report import Outcome, Report

Call = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[str, int]  # a linear's path, and how many times this call of the model was there before

_FORMS = "a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, dict)"


def each_call(batches: Iterable[Any]) -> Iterator[Call]:
    """(args, kwargs) of each batch. Raises UnsupportedInputError for what is none."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise UnsupportedInputError(
            f"batches is a {type(batches).__name__}, needs an iterable of batches, such as [batch]"
        )
    return (_call(i, batch) for i, batch in enumerate(batches))


def _call(i: int, batch: Any) -> Call:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and _is_keywords(batch[1]):
            return tuple(batch[0]), dict(batch[1])
        return batch, {}
    if _is_keywords(batch):
        return (), dict(batch)
    raise UnsupportedInputError(f"batch {i} is a {type(batch).__name__}, needs {_FORMS}")


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)


def copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """With tensors of their own: a model may write to its arguments."""
    made: Call = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    return made


@contextmanager
def own_generators() -> Iterator[None]:
    """The user's random generators are afterwards where they were before."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield


class Tally:
    """Adds up one float run and one int8 run of the model for each batch, in this order."""

    def __init__(self) -> None:
        self._linears: dict[Key, Outcome] = {}  # in the order in which the model runs them
        self._local: dict[Key, Error] = {}
        self._accumulated: dict[Key, Error] = {}
        self._outputs: dict[str, tuple[Error, RowCosines]] = {}
        self._batches = 0
        self._in_int8 = False
        self._calls: Counter[str] = Counter()  # of each linear, in this run
        self._kept: dict[Key, Tensor] = {}  # float results of this batch
        self._strayed: list[str] = []  # linears that are not where they were in float

    @contextmanager
    def float_run(self) -> Iterator[None]:
        self._in_int8 = False
        self._kept.clear()
        with self._run():
            yield

    @contextmanager
    def int8_run(self) -> Iterator[None]:
        self._in_int8 = True
        with self._run():
            yield
        for name in (*self._strayed, *(name for name, _ in self._kept)):
            raise _other_path(name)

    @contextmanager
    def _run(self) -> Iterator[None]:
        self._calls.clear()
        self._strayed.clear()
        with own_generators():  # both runs draw the same numbers
            yield

    def run(self, pair: Pair, *args: Any) -> Any:
        """In place of one graph of the model."""
        linears = pair.linears(args)
        keys = [self._key(linear) for linear in linears]
        if self._in_int8:
            return pair.run_int8(args, lambda i, y8: self._found_int8(keys[i], y8))
        for key, linear in zip(keys, linears, strict=True):
            self._linears.setdefault(key, linear)
        return pair.run_float(args, lambda i, y, y8: self._found_float(keys[i], y, y8))

    def _key(self, linear: Outcome) -> Key:
        name = linear.path or linear.node
        self._calls[name] += 1
        return name, self._calls[name] - 1

    def _found_float(self, key: Key, y: Tensor, y8: Tensor) -> None:
        self._local[key] = self._local.get(key, Error()) + Error.of(y8, y)
        self._kept[key] = y.clone()  # the model may go on to write to it

    def _found_int8(self, key: Key, y8: Tensor) -> None:
        y = self._kept.pop(key, None)
        if y is None or y.shape != y8.shape:
            self._strayed.append(key[0])
        else:
            self._accumulated[key] = self._accumulated.get(key, Error()) + Error.of(y8, y)

    def outputs(self, got: Any, want: Any) -> None:
        """What the model returned in int8 and in float."""
        self._batches += 1
        ours, theirs = (dict(_tensors(v)) for v in (got, want))
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


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output, and where each stands."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
        return
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):  # transformers' ModelOutput is one
        parts = ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = _fields(name, value, value._fields)
    elif isinstance(value, (tuple, list)):
        parts = ((f"{name}[{i}]", v) for i, v in enumerate(value))
    elif dataclasses.is_dataclass(value):
        parts = _fields(name, value, [f.name for f in dataclasses.fields(value)])
    for inner, part in parts:
        yield from _tensors(part, inner)


def _fields(name: str, value: Any, fields: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{f}" if name else f, getattr(value, f)) for f in fields)
