"""Packed weights: int8 copies of parameters, kept up to date.

A backend that closes over packed weights returns wrong results, without an error, after
`load_state_dict`, an optimizer step, a replaced parameter, or with a second instance of the same
class. So packed weights belong to parameters, are *inputs* of the compiled graph, and every call
checks that the parameters are unchanged (versions.py).

Sampled values are compared before the call on a CPU. On CUDA they are compared asynchronously
(gpu_probe.py), and calls that are made before the answer arrives use the old packed weights.

Stale packed weights are recomputed into the same memory, so that CUDA graphs stay valid. Nothing
here keeps parameters alive, and packed weights are freed with the first of their parameters or the
last graph that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from graphquant._torch import DisableTorchFunction, has_function_mode
from graphquant.errors import ReleasedWeightError
from graphquant.weights import versions
from graphquant.weights.gpu_probe import Probe, probes
from graphquant.weights.released import is_released, release_memory
from graphquant.weights.snapshot import Snapshot, TensorState, snapshot
from graphquant.weights.versions import Tracker, find_tracker, tracker_of, versions_of

_read_in_float: set[StorageWeakRef] = set()  # by graphs with free_weights=True


class Recipe(Hashable, Protocol):
    """Computes packed tensors from their roots, the parameters that they depend on.

    Graphs with equal recipes share packed weights.
    """

    def compute(self, roots: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(eq=False)
class _PackedWeights:
    """Packed tensors of one recipe, and the versions and states of the roots they come from."""

    tensors: list[Tensor]
    versions: list[int]
    states: list[TensorState]
    epoch: int

    def is_stale(self, roots: Sequence[Tensor]) -> bool:
        """Has one of the roots that are not released changed?"""
        now = [tracker_of(t).state for t in roots]
        pairs = zip(roots, self.states, now, strict=True)
        return any(b is None or not a.matches(b) for t, a, b in pairs if not is_released(t))


# By recipe and ids of the roots; plans keep them alive.
_store: WeakValueDictionary[tuple[Any, ...], _PackedWeights] = WeakValueDictionary()
# Packed weights of released parameters are kept as long as these: the values exist nowhere else.
_pinned: dict[Hashable, tuple[_PackedWeights, list[ref[Tracker]]]] = {}


@dataclass(eq=False)
class Plan:
    """The packed tensors of one graph for one set of parameters, and how to check them."""

    tensors: list[Tensor]
    packed: list[_PackedWeights]
    versions: list[int | None]
    epoch: int
    snapshot: Snapshot
    probes: list[Probe]
    last_change: int
    finalizers: list[ref[Tracker]] = field(default_factory=list)

    def fresh(self, args: Sequence[Any], roots: Callable[[Sequence[Any]], Sequence[Any]]) -> bool:
        """Are the parameters in these arguments unchanged?"""
        if self.last_change != versions.last_change:
            last_change = versions.last_change  # read before the versions are
            if self.epoch != versions.epoch or versions_of(roots(args)) != self.versions:
                return False
            self.last_change = last_change
        # a sum, not any(): every probe must launch its comparison
        return self.snapshot.unchanged(args) and not sum(p.changed() for p in self.probes)


class PackedInputs:
    """The packed inputs of one compiled graph.

    jobs    for each packed linear, its recipe and which arguments of the call are its roots
    names   of the call's arguments, for messages
    floats  for `release`: which arguments are parameters that the graph reads in float
    owned   for `release`: which arguments belong to a module; others are never released
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Recipe, tuple[int, ...]]],
        names: Callable[[int], str],
        floats: Sequence[int] = (),
        owned: Collection[int] = (),
    ) -> None:
        versions.watch_optimizers()
        self._jobs = list(jobs)
        self._names = names
        self._floats = floats
        roots = {i for _, indices in jobs for i in indices}
        self._tracked = sorted({*roots, *floats})
        self._pick = _picker(self._tracked)
        self._owned = sorted(roots.intersection(owned))
        self._releases: bool | str = False
        self._steady = True  # the last check found no change
        self._plans: dict[tuple[int, ...], Plan] = {}  # by ids of the tracked arguments
        self._newest: dict[int, Plan] = {}  # by the id of the first of them

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """The packed tensors for these arguments, recomputed if a parameter changed."""
        if not self._tracked:
            return []
        versions.watch_peft()
        plan = self._newest.get(id(args[self._tracked[0]]))
        if plan is not None and self._fresh(plan, args):
            self._steady = True
            return plan.tensors
        with versions.lock:
            return self._find(args).tensors

    def speculate(self, args: Sequence[Any]) -> Plan | None:
        """Packed tensors that are probably fresh, so that a GPU can start before they are checked.

        `confirm` checks them. None where a change is likely or known.
        """
        if not self._tracked or not self._steady:
            return None
        versions.watch_peft()
        plan = self._newest.get(id(args[self._tracked[0]]))
        if plan is None or plan.last_change != versions.last_change:
            return None
        return None if any(p.raised() for p in plan.probes) else plan

    def confirm(self, plan: Plan, args: Sequence[Any]) -> bool:
        """Were these packed tensors fresh? If not, call the PackedInputs."""
        self._steady = self._fresh(plan, args)
        return self._steady

    def _fresh(self, plan: Plan, args: Sequence[Any]) -> bool:
        if has_function_mode():  # such as torch.set_default_device
            with DisableTorchFunction():
                return plan.fresh(args, self._pick)
        return plan.fresh(args, self._pick)

    def _find(self, args: Sequence[Any]) -> Plan:
        tracked = self._pick(args)
        key = tuple(map(id, tracked))
        plan = self._plans.get(key)
        if plan is None or not self._fresh(plan, args):
            plan = self._plans[key] = self._make(args, tracked, key)
        self._newest[key[0]] = plan
        return plan

    def _make(self, args: Sequence[Any], tracked: Sequence[Tensor], key: tuple[int, ...]) -> Plan:
        if self._releases:  # a graph may serve many modules
            self.release(args, self._releases)
        last_change, epoch = versions.last_change, versions.epoch
        states = self._observe(args)
        before = versions_of(tracked)
        checks = snapshot(self._tracked, tracked, states), probes(tracked, states)
        packed = self._pack_all(args)
        tensors = list(chain.from_iterable(p.tensors for p in packed))
        plan = Plan(tensors, packed, before, epoch, *checks, last_change)
        self_ref, plan_ref = ref(self), ref(plan)

        def parameter_died(_: object) -> None:
            inputs, plan = self_ref(), plan_ref()
            if inputs is not None and plan is not None:
                inputs._drop(key, plan)

        plan.finalizers = [ref(tracker_of(t), parameter_died) for t in tracked]
        return plan

    def _drop(self, key: tuple[int, ...], plan: Plan) -> None:
        """Runs wherever a parameter dies, so it must not wait for a lock."""
        if self._plans.get(key) is plan:
            self._plans.pop(key, None)
        if self._newest.get(key[0]) is plan:
            self._newest.pop(key[0], None)

    def _observe(self, args: Sequence[Any]) -> list[TensorState]:
        return versions.observe(self._pick(args), lambda i: self._names(self._tracked[i]))

    def _pack_all(self, args: Sequence[Any]) -> list[_PackedWeights]:
        packed = []
        for recipe, indices in self._jobs:
            names = partial(map, self._names, indices)
            packed.append(
                _pack(recipe, [args[i] for i in indices], names, pin=self._releases is True)
            )
        return packed

    def release(self, args: Sequence[Any], how: bool | str = True) -> int:
        """Free the device memory of roots that no graph reads in float, now and for later args.

        how  True: their values are dropped. "host": they move to host memory.

        Memory that another tensor shares is kept, with its values. Returns the bytes of device
        memory freed now. Raises ReleasedWeightError if this graph needs a released weight in float.
        """
        with versions.lock:
            self._releases = how
            for i in self._floats:
                if is_released(args[i]):
                    raise ReleasedWeightError(
                        f"{self._names(i)} is read in float, but free_weights=True released it"
                    )
                _read_in_float.add(StorageWeakRef(args[i].untyped_storage()))
            _read_in_float.difference_update([s for s in _read_in_float if s.expired()])
            self._observe(args)
            self._pack_all(args)
            freed = [
                release_memory(args[i], self._names(i), how, _read_in_float) for i in self._owned
            ]
            if any(size is not None for size in freed):
                self._accept_moves(args)
        return sum(size or 0 for size in freed)

    def _accept_moves(self, args: Sequence[Any]) -> None:
        """Record the new storage of roots whose values are still those that were packed."""
        for t in map(args.__getitem__, self._owned):
            tracker = tracker_of(t)
            if tracker.state is not None:
                values = None if is_released(t) else tracker.state.values
                tracker.state = TensorState.of(t, values)


def _pack(
    recipe: Recipe, roots: Sequence[Tensor], names: Callable[[], Iterable[str]], *, pin: bool
) -> _PackedWeights:
    """The packed weights of one recipe, computed if stale. Its roots were observed before."""
    trackers = [tracker_of(t) for t in roots]
    key = (recipe, *(t.id for t in trackers))  # tied weights differ in their other roots
    packed = _store.get(key)
    now, epoch = [t.version for t in trackers], versions.epoch
    if packed is None or packed.versions != now or packed.epoch != epoch:
        states = [m.state or TensorState.of(t) for m, t in zip(trackers, roots, strict=True)]
        if released := [n for n, t in zip(names(), roots, strict=True) if is_released(t)]:
            tensors = _reuse(packed, roots, ", ".join(released), names)
        else:
            new = recipe.compute(roots)
            if packed is not None:
                packed.epoch = -1  # stale until all of it is written
            tensors = _copy_into(packed, new)
        if packed is None or packed.tensors is not tensors:
            packed = _store[key] = _PackedWeights(tensors, now, states, epoch)
        packed.versions, packed.states, packed.epoch = now, states, epoch
    if pin:
        _pinned[key] = packed, [ref(t, lambda _: _pinned.pop(key, None)) for t in trackers]
    return packed


def _reuse(
    packed: _PackedWeights | None,
    roots: Sequence[Tensor],
    released: str,
    names: Callable[[], Iterable[str]],
) -> list[Tensor]:
    """The existing tensors, of which some roots are released. Raises ReleasedWeightError."""
    if packed is None:
        raise ReleasedWeightError(
            f"{released}: free_weights=True released the float values, "
            "and this combination was never packed"
        )
    if packed.is_stale(roots):
        raise ReleasedWeightError(
            f"{', '.join(names())} are packed together. One of them has changed, but they cannot "
            f"be repacked: free_weights=True released {released}"
        )
    return packed.tensors


def _copy_into(packed: _PackedWeights | None, new: list[Tensor]) -> list[Tensor]:
    """The new tensors, in the memory of the old ones if they fit."""
    if packed is None or [*map(_spec, packed.tensors)] != [*map(_spec, new)]:
        return new
    with torch.inference_mode(False), torch.no_grad():
        for old, value in zip(packed.tensors, new, strict=True):
            old.copy_(value)
    return packed.tensors


def packed_tensors(roots: Iterable[Tensor]) -> list[Tensor]:
    """The packed tensors that are computed from any of these parameters."""
    ids = {tracker.id for t in roots if (tracker := find_tracker(t)) is not None}
    with versions.lock:
        return [t for key, packed in _store.items() if ids & {*key[1:]} for t in packed.tensors]


def _spec(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(indices) == 1:
        (only,) = indices
        return lambda args: (args[only],)
    return itemgetter(*indices) if indices else lambda args: ()
