"""The sums of a comparison: what `Pair`s find, batch by batch, added up by site and by output."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from inspect import Signature
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphquant._torch import tree_leaves, tree_map
from graphquant.accuracy.pair import Pair
from graphquant.accuracy.report import AccuracyReport, OutputAccuracy, SiteAccuracy
from graphquant.errors import GraphquantError, UnsupportedInputError
from graphquant.metrics import Error, RowCosines
from graphquant.report import Outcome, Report

Call = tuple[tuple[Any, ...], dict[str, Any]]
Named = tuple[str, Tensor]
Key = tuple[str, int]  # a linear's path, and how many times this call of the model was there before

_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, type, range),
    *(torch.dtype, torch.device, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(nn.Module, FunctionType, MethodType, ModuleType),
)
"""What holds no result."""
_FORMS = "a tensor, a tuple of arguments, a mapping, or (arguments, dict of keyword arguments)"


def each_call(batches: Iterable[Any], model: Callable[..., Any] | None = None) -> Iterator[Call]:
    """(args, kwargs) of each batch. Raises UnsupportedInputError for what is none.

    A mapping is the keyword arguments of the call, if the model can be called with them, else its
    one argument.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise UnsupportedInputError(
            f"batches is a {type(batches).__name__}, needs an iterable of batches, such as [batch]"
        )
    takes = _signature(model)
    return (_call(i, batch, takes) for i, batch in enumerate(batches))


def _call(i: int, batch: Any, takes: Signature | None) -> Call:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and _is_keywords(batch[1]):
            return tuple(batch[0]), dict(batch[1])
        return batch, {}
    if isinstance(batch, Mapping):
        if _is_keywords(batch) and (takes is None or _binds(takes, (), batch)):
            return (), dict(batch)
        if takes is None or _binds(takes, (batch,), {}):
            return (batch,), {}
        raise UnsupportedInputError(
            f"batch {i} is a {type(batch).__name__} with {', '.join(map(repr, batch))}: the model "
            f"takes {takes}"
        )
    raise UnsupportedInputError(f"batch {i} is a {type(batch).__name__}, needs {_FORMS}")


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)


def _signature(model: Callable[..., Any] | None) -> Signature | None:
    called = model.forward if isinstance(model, nn.Module) else model
    if called is None:
        return None
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):  # it has none that can be read
        return None


def _binds(takes: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        takes.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """With tensors and mappings of their own: a model may write to its arguments."""
    made: Call = tree_map(_copied, (args, kwargs))
    return made


def _copied(value: Any) -> Any:
    """Of what is no pytree of its own: transformers' BatchEncoding is a mapping, and no dict."""
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, Mapping):
        return value
    items = {k: tree_map(_copied, v) for k, v in value.items()}
    if not isinstance(value, MutableMapping):
        return items
    own = copy.copy(value)
    own.update(items)
    return own


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

    def outputs(self, got: Any, theirs: Mapping[str, Tensor]) -> None:
        """What the model returned in int8, and the tensors that were `kept` of it in float."""
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


def kept(result: Any) -> dict[str, Tensor]:
    """Copies of the floating-point tensors of what a model returned, and where each stands: the
    next call may write to the same memory, or into the same mapping.

    Raises UnsupportedInputError if there are none, or if it holds something that cannot be looked
    into.
    """
    found = {name: tensor.detach().clone() for name, tensor in _tensors(result)}
    if not found:
        raise UnsupportedInputError("the model returns no floating-point tensor to compare")
    return found


def _tensors(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Iterator[Named]:
    """The floating-point tensors of a model's output, and where each stands."""
    if isinstance(value, Tensor):
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point():
            yield name or "output", value
    elif not isinstance(value, _VALUES) and id(value) not in above:
        for inner, part in _parts(value, name):
            yield from _tensors(part, inner, (*above, id(value)))


def _parts(value: Any, name: str) -> Iterable[tuple[str, Any]]:
    """What a container holds, and where."""
    if isinstance(value, Mapping):  # transformers' ModelOutput is one
        return ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _fields(name, value, value._fields)
    if isinstance(value, (tuple, list, deque)):
        return ((f"{name}[{i}]", v) for i, v in enumerate(value))
    if dataclasses.is_dataclass(value):
        return _fields(name, value, [f.name for f in dataclasses.fields(value)])
    leaves = tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a pytree that was registered
        return ((f"{name}[{i}]", v) for i, v in enumerate(leaves))
    if hasattr(value, "__dict__"):  # such as a cache of keys and values
        return _fields(name, value, list(vars(value)))
    raise UnsupportedInputError(
        f"{name or 'what the model returns'} is a {type(value).__name__}, which cannot be compared"
    )


def _fields(name: str, value: Any, fields: Iterable[str]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}.{f}" if name else f, getattr(value, f)) for f in fields)
