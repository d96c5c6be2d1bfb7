"""Version tracking of parameters: has anything written to them since they were packed?

A parameter counts as unchanged while it is the same object, with the same `_version`, the same live
storage at the same address and the same values where some are compared, and while no writer has
reported it. Writers that leave no trace on a parameter are hooked: optimizers (fused ones do not
bump `_version`) and PEFT (peft.py). For everything else there is `refresh`.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphquant._torch import local_of
from graphquant.utils.locks import Lock
from graphquant.weights import peft
from graphquant.weights.gpu_probe import values_of
from graphquant.weights.snapshot import TensorState

log = logging.getLogger(__name__)

TRACKER = "_graphquant_tracker"  # attribute of a parameter
lock = Lock()
_numbers = itertools.count(1)
last_change = 0  # changes whenever the version of any parameter does
epoch = 0  # changes when everything counts as changed
_optimizers_watched = False


class Tracker:
    """Version of one parameter, stored as an attribute of it and freed with it.

    It stands in for the parameter in weak references: one to a tensor itself would forbid
    torch.utils.swap_tensors. It is pickled as an empty OrderedDict, so that loading a pickled
    module does not need graphquant.

    id       of the parameter, never reused
    version  of its values: a new number whenever they may have changed
    state    of the parameter at that version; None if not observed yet
    """

    __slots__ = ("__weakref__", "id", "state", "version")

    def __init__(self) -> None:
        self.id = self.version = next(_numbers)
        self.state: TensorState | None = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return OrderedDict, ()

    def __deepcopy__(self, memo: object) -> Tracker:
        return Tracker()


def find_tracker(t: Tensor) -> Tracker | None:
    """The tracker of this parameter, None if it has none."""
    tracker = t.__dict__.get(TRACKER)
    return tracker if type(tracker) is Tracker else None


def tracker_of(t: Tensor) -> Tracker:
    """The tracker of this parameter, attached on first use."""
    tracker = find_tracker(t)
    if tracker is None:
        tracker = Tracker()
        setattr(t, TRACKER, tracker)
    return tracker


def versions_of(tensors: Sequence[Any]) -> list[int | None]:
    """The version of each parameter, None for those that are not tracked."""
    return [getattr(t.__dict__.get(TRACKER), "version", None) for t in tensors]


def observe(tensors: Sequence[Tensor], name: Callable[[int], str]) -> list[TensorState]:
    """The current state of each tensor; those that have changed get a new version.

    If one was written through an alias, others may have been, in values that are not compared: then
    all get a new version. `name(i)` names the i-th tensor in log messages.
    """
    global last_change
    states = [TensorState.of(t, v) for t, v in zip(tensors, values_of(tensors), strict=True)]
    changed, aliased = False, []
    for i, t in enumerate(tensors):
        tracker = tracker_of(t)
        before = tracker.state
        if before is not None:  # else the version is new already
            if before.metadata() != states[i].metadata():
                tracker.version, changed = next(_numbers), True
            elif states[i].values is None:  # unreadable while a CUDA graph is captured
                states[i] = before
            elif not before.matches(states[i]):
                aliased.append(i)
        tracker.state = states[i]
    if aliased:
        _log_alias_write(tensors[aliased[0]].device.type, [name(i) for i in aliased])
        for t in tensors:
            tracker_of(t).version, changed = next(_numbers), True
    if changed:
        last_change = next(_numbers)
    return states


def _log_alias_write(device: str, names: Sequence[str]) -> None:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if device == "cpu":
        log.info("%s: changed through an alias; repacked", some)
    else:
        log.warning(
            "%s: changed through an alias; repacked now, but calls since the change may have used "
            "the old values. Call graphquant.refresh() after such a change to prevent that.",
            some,
        )


def refresh(module: torch.nn.Module | None = None) -> None:
    """Repack the weights of `module`, or of all modules, at their next call.

    Needed only after a change that may go unnoticed: a write through an alias (`p.data.mul_()`,
    numpy, a flat buffer that parameters are views of) to single values, or, on CUDA, to any. See
    "Changes that leave no trace" in docs/limits.md.
    """
    global epoch, last_change
    with lock:
        if module is None:
            epoch += 1
            last_change = next(_numbers)
        else:
            mark_changed(chain(module.parameters(), module.buffers()))


def forget(module: torch.nn.Module) -> None:
    """Drop this module's packed weights; other users repack on their next call."""
    with lock:
        for t in chain(module.parameters(), module.buffers()):
            local_of(t).__dict__.pop(TRACKER, None)


def mark_changed(tensors: Iterable[Tensor]) -> None:
    """Give these parameters a new version; of a DTensor this process's shard, which is what is
    packed."""
    global last_change
    for t in tensors:
        if (tracker := find_tracker(local_of(t))) is not None:
            tracker.version, tracker.state = next(_numbers), None
    last_change = next(_numbers)


def watch_optimizers() -> None:
    """Hook optimizer steps, once per process."""
    global _optimizers_watched
    with lock:
        if not _optimizers_watched:
            register_optimizer_step_post_hook(
                lambda optimizer, args, kwargs: mark_changed(
                    p for group in optimizer.param_groups for p in group["params"]
                )
            )
            _optimizers_watched = True


def watch_peft() -> None:
    """Hook PEFT as soon as it is imported. Its earlier writes went unnoticed: refresh all."""
    if peft.watch(mark_changed):
        refresh()
