"""Packed weights: int8 copies that belong to the parameters they come from, and are never stale.

A backend that closes over packed weights gives silently wrong answers after `load_state_dict`, an
optimizer step, a second instance of the same class, a replaced parameter. So packs belong to
parameters, are *inputs* of the compiled graph, and every call checks that nothing moved:

    fresh  <=>  same parameter objects, same `_version`, same living storage at the same address,
                the same values where some are compared, nothing announced since

Announced are what leaves no trace on a parameter: optimizer steps, by torch's hook (fused ones
change no version); PEFT's writes through `.data`, see adapters.py; what `refresh` is called for.
Values are compared before the call on a CPU, and on CUDA behind its back, see probe.py: there the
calls that are made until the answer has arrived still use the old packs.

A stale pack is computed again into the same memory, so that CUDA graphs stay valid. Nothing keeps
parameters alive, and no pack outlives what it was made from or the last graph that reads it.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
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
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphquant._torch import DisableTorchFunction, has_function_mode
from graphquant.errors import ReleasedWeightError
from graphquant.utils.locks import Lock
from graphquant.weights.gpu_probe import Probe, probes, values_of
from graphquant.weights.peft import announce
from graphquant.weights.released import is_released, let_go
from graphquant.weights.snapshot import Seen, Snapshot, snapshot

log = logging.getLogger(__name__)

_MARK = "_graphquant_mark"
_lock = Lock()
_numbers = itertools.count(1)
_latest = 0  # another number whenever a stamp has changed somewhere
_epoch = 0
_hooked = False
_read_in_float: set[StorageWeakRef] = set()  # by graphs with free_weights=True


class Recipe(Hashable, Protocol):
    """How packed tensors are computed from parameters. Equal recipes share packs."""

    def compute(self, roots: Sequence[Tensor]) -> list[Tensor]: ...


class _Mark:
    """What hangs on one parameter, and lives as long as it does: weak references to tensors
    themselves would forbid torch.utils.swap_tensors.

    name   of the parameter: never used again
    stamp  of its values: another number for other values
    seen   its state at that stamp; None if that is not known yet

    Pickled, it becomes an empty OrderedDict: a pickled module needs no graphquant to load.
    """

    __slots__ = ("__weakref__", "name", "seen", "stamp")

    def __init__(self) -> None:
        self.name = self.stamp = next(_numbers)
        self.seen: Seen | None = None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return OrderedDict, ()

    def __deepcopy__(self, memo: object) -> _Mark:
        return _Mark()


@dataclass(eq=False)
class _Packed:
    """What one recipe has computed from parameters with these stamps, seen like this."""

    tensors: list[Tensor]
    stamps: list[int]
    seen: list[Seen]
    epoch: int

    def changed(self, roots: Sequence[Tensor]) -> bool:
        """Has one of those changed that still have values?"""
        now = [_mark(t).seen for t in roots]
        pairs = zip(roots, self.seen, now, strict=True)
        return any(b is None or not a.equals(b) for t, a, b in pairs if not is_released(t))


_packs: WeakValueDictionary[tuple[Any, ...], _Packed] = WeakValueDictionary()  # plans keep them
# But for those whose parameters were released: they are all that is left of their values.
_pinned: dict[Hashable, tuple[_Packed, list[ref[_Mark]]]] = {}


@dataclass(eq=False)
class Plan:
    """All packs that one graph reads, for one set of parameters."""

    tensors: list[Tensor]
    packs: list[_Packed]
    stamps: list[int | None]
    epoch: int
    snapshot: Snapshot
    probes: list[Probe]
    latest: int
    deaths: list[ref[_Mark]] = field(default_factory=list)

    def fresh(self, args: Sequence[Any], roots: Callable[[Sequence[Any]], Sequence[Any]]) -> bool:
        if self.latest != _latest:
            latest = _latest  # read before the stamps are
            if self.epoch != _epoch or _stamps(roots(args)) != self.stamps:
                return False
            self.latest = latest
        return self.snapshot.still(args) and not sum(p.changed() for p in self.probes)


class Supply:
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
        _announce_optimizer_steps()
        self._jobs = list(jobs)
        self._names = names
        self._floats = floats
        self._packed = {i for _, indices in jobs for i in indices}
        self._watched = sorted({*self._packed, *floats})
        self._pick = _picker(self._watched)
        self._owned = sorted(self._packed.intersection(owned))
        self._releases: bool | str = False
        self._steady = True  # the last look found nothing new
        self._plans: dict[tuple[int, ...], Plan] = {}  # by ids of the roots
        self._newest: dict[int, Plan] = {}  # by the id of the first

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """The packed tensors for these arguments, computed again if a parameter changed."""
        if not self._watched:
            return []
        if announce(_renew):
            refresh()
        plan = self._newest.get(id(args[self._watched[0]]))
        if plan is not None and self._fresh(plan, args):
            self._steady = True
            return plan.tensors
        with _lock:
            return self._find(args).tensors

    def guess(self, args: Sequence[Any]) -> Plan | None:
        """Packs that are fresh unless something has changed in silence since the last call, for a
        GPU to begin with; None where that is not worth it. `confirms` tells."""
        if not self._watched or not self._steady:
            return None
        if announce(_renew):
            refresh()
        plan = self._newest.get(id(args[self._watched[0]]))
        if plan is None or plan.latest != _latest or any(p.raised() for p in plan.probes):
            return None
        return plan

    def confirms(self, plan: Plan, args: Sequence[Any]) -> bool:
        """Were these packs fresh? If not, call the Supply."""
        self._steady = self._fresh(plan, args)
        return self._steady

    def _fresh(self, plan: Plan, args: Sequence[Any]) -> bool:
        if has_function_mode():  # such as torch.set_default_device
            with DisableTorchFunction():
                return plan.fresh(args, self._pick)
        return plan.fresh(args, self._pick)

    def _find(self, args: Sequence[Any]) -> Plan:
        roots = self._pick(args)
        key = tuple(map(id, roots))
        plan = self._plans.get(key)
        if plan is None or not self._fresh(plan, args):
            plan = self._plans[key] = self._make(args, roots, key)
        self._newest[key[0]] = plan
        return plan

    def _make(self, args: Sequence[Any], roots: Sequence[Tensor], key: tuple[int, ...]) -> Plan:
        if self._releases:  # a graph may serve many modules
            self.release(args, self._releases)
        latest, epoch = _latest, _epoch
        seen = self._observe(args)
        stamps = _stamps(roots)
        state = snapshot(self._watched, roots, seen), probes(roots, seen)
        packs = self._packs(args)
        tensors = list(chain.from_iterable(p.tensors for p in packs))
        plan = Plan(tensors, packs, stamps, epoch, *state, latest)
        mine, this = ref(self), ref(plan)

        def dead(_: object) -> None:
            supply, plan = mine(), this()
            if supply is not None and plan is not None:
                supply._drop(key, plan)

        plan.deaths = [ref(_mark(t), dead) for t in roots]
        return plan

    def _drop(self, key: tuple[int, ...], plan: Plan) -> None:
        """Runs wherever a parameter dies, so it waits for no lock."""
        if self._plans.get(key) is plan:
            self._plans.pop(key, None)
        if self._newest.get(key[0]) is plan:
            self._newest.pop(key[0], None)

    def _observe(self, args: Sequence[Any]) -> list[Seen]:
        return _observe(self._pick(args), lambda i: self._names(self._watched[i]))

    def _packs(self, args: Sequence[Any]) -> list[_Packed]:
        made = []
        for recipe, indices in self._jobs:
            names = partial(map, self._names, indices)
            made.append(
                _pack(recipe, [args[i] for i in indices], names, pin=self._releases is True)
            )
        return made

    def release(self, args: Sequence[Any], how: bool | str = True) -> int:
        """From now on, the device holds no roots that no such graph reads in float.

        how  True: their values are given up. "host": they move to host memory.

        Whoever else holds such a root's memory, under another name, keeps it with its values.
        Returns the bytes of device memory freed now.
        """
        with _lock:
            self._releases = how
            for i in self._floats:
                if is_released(args[i]):
                    raise ReleasedWeightError(
                        f"{self._names(i)} is read in float, but free_weights=True released it"
                    )
                _read_in_float.add(StorageWeakRef(args[i].untyped_storage()))
            _read_in_float.difference_update([s for s in _read_in_float if s.expired()])
            self._observe(args)
            self._packs(args)
            gone = [let_go(args[i], self._names(i), how, _read_in_float) for i in self._owned]
            if any(freed is not None for freed in gone):
                self._keep_packs(args)
        return sum(freed or 0 for freed in gone)

    def _keep_packs(self, args: Sequence[Any]) -> None:
        """The roots lie elsewhere, and their values are those that were packed."""
        for t in map(args.__getitem__, self._owned):
            mark = _mark(t)
            if mark.seen is not None:
                mark.seen = Seen.of(t, None if is_released(t) else mark.seen.values)


def _pack(
    recipe: Recipe, roots: Sequence[Tensor], names: Callable[[], Iterable[str]], *, pin: bool
) -> _Packed:
    """The packs of one recipe, computed if need be. Its roots were observed before."""
    marks = [_mark(t) for t in roots]
    key = (recipe, *(m.name for m in marks))  # tied weights differ in their other roots
    pack = _packs.get(key)
    stamps, epoch = [m.stamp for m in marks], _epoch
    if pack is None or pack.stamps != stamps or pack.epoch != epoch:
        seen = [m.seen or Seen.of(t) for m, t in zip(marks, roots, strict=True)]
        if gone := [n for n, t in zip(names(), roots, strict=True) if is_released(t)]:
            tensors = _of_released(pack, roots, ", ".join(gone), names)
        else:
            new = recipe.compute(roots)
            if pack is not None:
                pack.epoch = -1  # of no state, until all of it is written
            tensors = _into(pack, new)
        if pack is None or pack.tensors is not tensors:
            pack = _packs[key] = _Packed(tensors, stamps, seen, epoch)
        pack.stamps, pack.seen, pack.epoch = stamps, seen, epoch
    if pin:
        _pinned[key] = pack, [ref(m, lambda _: _pinned.pop(key, None)) for m in marks]
    return pack


def _of_released(
    pack: _Packed | None, roots: Sequence[Tensor], gone: str, names: Callable[[], Iterable[str]]
) -> list[Tensor]:
    if pack is None:
        raise ReleasedWeightError(
            f"{gone}: free_weights=True released the float values, "
            "and this combination was never packed"
        )
    if pack.changed(roots):
        raise ReleasedWeightError(
            f"{', '.join(names())} are packed together. One of them has changed, and cannot be "
            f"packed again: free_weights=True released {gone}"
        )
    return pack.tensors


def _into(pack: _Packed | None, new: list[Tensor]) -> list[Tensor]:
    """The new tensors, in the memory of the old ones if they fit."""
    if pack is None or [*map(_spec, pack.tensors)] != [*map(_spec, new)]:
        return new
    with torch.inference_mode(False), torch.no_grad():
        for old, value in zip(pack.tensors, new, strict=True):
            old.copy_(value)
    return pack.tensors


def _observe(roots: Sequence[Tensor], name: Callable[[int], str]) -> list[Seen]:
    """What they are now. Those that have changed get a new stamp.

    If one has changed in silence, through an alias, so may others have, in values that are not
    looked at: then all get one.
    """
    global _latest
    seen = [Seen.of(t, v) for t, v in zip(roots, values_of(roots), strict=True)]
    stamped, silent = False, []
    for i, t in enumerate(roots):
        mark = _mark(t)
        then = mark.seen
        if then is not None:  # else the stamp is new already
            if then.visible() != seen[i].visible():
                mark.stamp, stamped = next(_numbers), True
            elif seen[i].values is None:  # they cannot be looked at while a CUDA graph is captured
                seen[i] = then
            elif not then.equals(seen[i]):
                silent.append(i)
        mark.seen = seen[i]
    if silent:
        _tell(roots[silent[0]].device.type, [name(i) for i in silent])
        for t in roots:
            _mark(t).stamp, stamped = next(_numbers), True
    if stamped:
        _latest = next(_numbers)
    return seen


def _tell(device: str, names: Sequence[str]) -> None:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if device == "cpu":
        log.info("%s: changed through an alias; packed again", some)
    else:
        log.warning(
            "%s: changed through an alias, and packed again now. Calls between the change and this "
            "one may have used the old values: graphquant.refresh() behind such a change prevents "
            "that.",
            some,
        )


def packs_of(roots: Iterable[Tensor]) -> list[Tensor]:
    """The packed tensors that are computed from any of these parameters."""
    names = {mark.name for t in roots if type(mark := t.__dict__.get(_MARK)) is _Mark}
    with _lock:
        return [t for key, pack in _packs.items() if names & {*key[1:]} for t in pack.tensors]


def refresh(module: torch.nn.Module | None = None) -> None:
    """Pack again at the next call: of this module, or of everything.

    Needed only after a change that may go unnoticed: a write through an alias (`p.data.mul_()`,
    numpy, a flat buffer that parameters are views of) to single values, or, on CUDA, to any. See
    "Changes that leave no trace" in docs/limits.md.
    """
    global _epoch, _latest
    with _lock:
        if module is None:
            _epoch += 1
            _latest = next(_numbers)
        else:
            _renew(chain(module.parameters(), module.buffers()))


def forget(module: torch.nn.Module) -> None:
    """Let go of all that was packed for this module. Who still uses it packs it again."""
    with _lock:
        for t in chain(module.parameters(), module.buffers()):
            t.__dict__.pop(_MARK, None)


def _renew(tensors: Iterable[Tensor]) -> None:
    """The values of these have changed."""
    global _latest
    for t in tensors:
        mark = t.__dict__.get(_MARK)
        if type(mark) is _Mark:
            mark.stamp, mark.seen = next(_numbers), None
    _latest = next(_numbers)


def _announce_optimizer_steps() -> None:
    """Fused optimizers write parameters without a new `_version`: hear of it from torch."""
    global _hooked
    with _lock:
        if not _hooked:
            register_optimizer_step_post_hook(
                lambda optimizer, args, kwargs: _renew(
                    p for group in optimizer.param_groups for p in group["params"]
                )
            )
            _hooked = True


def _mark(t: Tensor) -> _Mark:
    mark = t.__dict__.get(_MARK)
    if type(mark) is not _Mark:
        mark = _Mark()
        setattr(t, _MARK, mark)
    return mark


def _stamps(roots: Sequence[Any]) -> list[int | None]:
    return [getattr(t.__dict__.get(_MARK), "stamp", None) for t in roots]


def _spec(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(indices) == 1:
        (only,) = indices
        return lambda args: (args[only],)
    return itemgetter(*indices) if indices else lambda args: ()
