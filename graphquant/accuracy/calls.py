"""Turns a user's batches into calls (args, kwargs) of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from inspect import Signature
from typing import Any

import torch
from torch import Tensor, nn

from graphquant._torch import tree_map
from graphquant.errors import UnsupportedInputError

Call = tuple[tuple[Any, ...], dict[str, Any]]

_FORMS = "a tensor, a tuple of arguments, a mapping, or (arguments, dict of keyword arguments)"


def each_call(batches: Iterable[Any], model: Callable[..., Any] | None = None) -> Iterator[Call]:
    """(args, kwargs) of each batch.

    A mapping is the keyword arguments if the model takes them, else the one argument.

    Raises UnsupportedInputError for anything that is no batch.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise UnsupportedInputError(
            f"batches is a {type(batches).__name__}, needs an iterable of batches, such as [batch]"
        )
    takes = signature(model)
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


def signature(model: Callable[..., Any] | None) -> Signature | None:
    """Of a function, a method, or a module's forward; None if it cannot be inspected."""
    called = model.forward if isinstance(model, nn.Module) else model
    if called is None:
        return None
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):  # not introspectable
        return None


def _binds(takes: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        takes.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call with copies of its tensors and mappings, which a model may modify."""
    made: Call = tree_map(_copied, (args, kwargs))
    return made


def _copied(value: Any) -> Any:
    """Also copies mappings that are no pytrees, such as transformers' BatchEncoding."""
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
def preserve_rng() -> Iterator[None]:
    """Restores the state of torch's random generators, CPU and CUDA, afterwards."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
