"""Quantisers that must have one scale: found, given one, kept together.

Linears that read one value have one int8 input, so a static scale of it must be one (q/k/v). Their
weights need none: graphquant's have a scale for each output channel, and stacking them changes no
number. A scale for a whole weight tensor, as other engines use, must be shared by weights that are
stacked.

    groups     found by names (`find_shared_input_groups`) or by what a calibration has seen to
               read one value (`Calibration.groups`, `groups_at`)
    attach     each gets a SharedQuantState, on the module that holds all its members
    populate   finalise, the maximum over the members; then sync, the maximum over all processes
    tie        the members' quantisers hold the state's tensor: one object, float32, which stays so
               through `.to()`, `.half()`, deepcopy and load_state_dict
    state_dict holds each member's copy and nothing of the states, so `restore` on a model with the
               same groups builds them again from what was loaded

After NVIDIA Model-Optimizer's classes of these names. Different on purpose: a process without a
value takes part in the sync instead of leaving the others waiting, and tied buffers keep float32.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from graphquant.calibration.modelopt.quantizer import TIED, moved
from graphquant.calibration.modelopt.reduce import reduce_amax
from graphquant.errors import OptionError

Group = tuple[nn.Module, list[nn.Module]]  # the module that holds all members, and these

KINDS = ("weight", "input", "output")  # of a module's quantisers

SHARED_PATTERNS = tuple(
    rf"(?:(.*)\.)?(?:{roles})"
    for roles in (
        "q_proj|k_proj|v_proj",
        "query|key|value",
        "to_q|to_k|to_v",
        "q|k|v",
        "gate_proj|up_proj",
        "gate|up",
        "w1|w3",
    )
)
"""Roles that are stacked, by the module they are in. In a cross-attention q reads another value
than k and v: there a calibration's groups are right, and these are only wider than they must be."""


def find_shared_input_groups(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    target_quantizer_kind: str = "weight",
) -> list[Group]:
    """Groups by module paths: (the parent, the members) of each.

    A path that a pattern matches as a whole belongs to the group of this pattern and of what its
    capture groups caught; of several patterns the first counts. `(.*)\\.(?:w1|w3)` has a group for
    each module that holds a w1 and a w3; `(.*)\\.experts\\.\\d+\\.(?:w1|w3)` one for all experts.

    Only modules count whose `<kind>_quantizer` is enabled. Groups of one are none. Groups come in
    the order of their first member, members in that of `named_modules`. The parent is the nearest
    module that holds all members and is no nn.ModuleList.

    Without patterns there are no groups: SHARED_PATTERNS are the usual ones.

    Raises re.error for what is no pattern, AttributeError for a kind that is not one of KINDS.
    """
    if not patterns:
        return []
    compiled = [re.compile(pattern) for pattern in patterns]
    groups: dict[object, list[str]] = {}
    for path, _ in _quantized(model, target_quantizer_kind):
        for i, pattern in enumerate(compiled):
            if match := pattern.fullmatch(path):
                groups.setdefault((i, match.groups()), []).append(path)
                break
    return [_group(model, paths) for paths in groups.values() if len(paths) > 1]


def groups_at(
    model: nn.Module, paths: Sequence[Sequence[str]], target_quantizer_kind: str = "weight"
) -> list[Group]:
    """Groups by the paths of their members, such as `Calibration.groups`: what the graph has shown.

    As `find_shared_input_groups` does, it leaves out what has no enabled quantiser of this kind.
    """
    order = {path: i for i, (path, _) in enumerate(_quantized(model, target_quantizer_kind))}
    found = (sorted((p for p in group if p in order), key=order.__getitem__) for group in paths)
    kept = sorted((group for group in found if len(group) > 1), key=lambda g: order[g[0]])
    return [_group(model, group) for group in kept]


def _quantized(model: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module]]:
    if kind not in KINDS:
        raise AttributeError(f"no {kind}_quantizer: a kind is one of {', '.join(KINDS)}")
    for path, module in model.named_modules():
        quantizer = getattr(module, f"{kind}_quantizer", None)
        if quantizer is not None and not getattr(quantizer, "_disabled", True):
            yield path, module


def _group(model: nn.Module, paths: Sequence[str]) -> Group:
    parts = [path.split(".")[:-1] for path in paths]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    parent = parts[0][:shared]
    while parent and isinstance(model.get_submodule(".".join(parent)), nn.ModuleList):
        parent.pop()
    members = [model.get_submodule(path) for path in paths]
    return model.get_submodule(".".join(parent)), members


class SharedQuantState(nn.Module, ABC):
    """What the quantisers of one group share. A submodule of the group's parent, with no part in
    the state_dict: `_shared_quant_states`, an nn.ModuleList.

    name                   of the kind of state, as in `metadata`
    managed_attrs          the buffers that it shares, under the names that the quantisers use
    target_quantizer_kind  "weight", "input" or "output": whose quantisers
    default_patterns       what `resolve_patterns` gives where nothing else is said: no groups

    A subclass says how `sync` works and, unless hooks make the value, what `finalize` does. Handles
    of hooks that it puts into `_hook_handles` are removed by `remove_hooks`.
    """

    name: ClassVar[str]
    managed_attrs: ClassVar[tuple[str, ...]] = ()
    target_quantizer_kind: ClassVar[str] = "weight"
    default_patterns: ClassVar[tuple[str, ...]] = ()
    _syncs_without_value: ClassVar[bool] = False  # so that no other process waits for this one

    def __init__(self) -> None:
        super().__init__()
        for attr in self.managed_attrs:
            self.register_buffer(attr, None, persistent=False)
        object.__setattr__(self, "_hook_handles", [])
        self.set_members(None, ())

    # Members ------------------------------------------------------------------------------------

    def set_members(self, parent: nn.Module | None, members: Sequence[nn.Module]) -> None:
        """Link them. They are no submodules of the state: each has its one place in the model."""
        object.__setattr__(self, "_parent", parent)
        object.__setattr__(self, "_members", tuple(members))

    @property
    def members(self) -> tuple[nn.Module, ...]:
        linked: tuple[nn.Module, ...] = self.__dict__["_members"]
        return linked

    @property
    def quantizers(self) -> list[nn.Module]:
        """The members' quantisers of this state's kind."""
        every = (getattr(m, f"{self.target_quantizer_kind}_quantizer", None) for m in self.members)
        return [q for q in every if isinstance(q, nn.Module)]

    # Discover -----------------------------------------------------------------------------------

    @classmethod
    def resolve_patterns(
        cls, shared_states: Mapping[str, Mapping[str, Sequence[str]]] | None = None
    ) -> list[str]:
        """The patterns for this state: `shared_states[name]["patterns"]`, else the default ones.

        `{"patterns": []}` means no groups. Raises OptionError (a ValueError) for an unsupported
        state or field and for an invalid regex.
        """
        known = set(_names(SharedQuantState))
        for name, fields in (shared_states or {}).items():
            if name not in known:
                raise OptionError(f"unsupported state {name!r}; valid: {', '.join(sorted(known))}")
            for field in fields:
                if field != "patterns":
                    raise OptionError(f"unsupported field {field!r} of {name}; valid: 'patterns'")
            for pattern in fields.get("patterns", ()):
                try:
                    re.compile(pattern)
                except re.error as bad:
                    raise OptionError(f"invalid regex {pattern!r} of {name}: {bad}") from bad
        own = (shared_states or {}).get(getattr(cls, "name", ""), {})
        return list(own.get("patterns", cls.default_patterns))

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        patterns: Sequence[str] | None = None,
        *,
        groups: Sequence[Sequence[str]] = (),
    ) -> int:
        """Give every group without a state of this class one; how many are new.

        patterns  for `find_shared_input_groups`; None means none, not the default ones
        groups    members by their paths, such as `Calibration.groups`
        """
        kind, new = cls.target_quantizer_kind, 0
        found = find_shared_input_groups(model, patterns, kind) + groups_at(model, groups, kind)
        for parent, members in found:
            owned = getattr(parent, "_shared_quant_states", None)
            if owned is None:
                owned = parent._shared_quant_states = nn.ModuleList()
            ids = [*map(id, members)]
            if any(type(s) is cls and [*map(id, s.members)] == ids for s in owned):
                continue
            state = cls()
            state.set_members(parent, members)
            owned.append(state)
            state.install_hooks()
            new += 1
        return new

    @classmethod
    def metadata(cls, model: nn.Module) -> dict[str, bool]:
        """{name: True} if the model has states of this class, else {}."""
        return {cls.name: True} if any(True for _ in shared_quant_states(model, cls)) else {}

    # Observe, finalise, sync --------------------------------------------------------------------

    def install_hooks(self) -> None:
        """For states whose value is made while the model runs. Nothing here."""

    def remove_hooks(self) -> None:
        """Those whose handles `install_hooks` has put into `_hook_handles`."""
        for handle in self.__dict__["_hook_handles"]:
            handle.remove()
        object.__setattr__(self, "_hook_handles", [])

    def finalize(self) -> bool:
        """Make the value; is there one? Here: has a hook made one?"""
        return any(_is_set(self._buffers[attr]) for attr in self.managed_attrs)

    @abstractmethod
    def sync(self, parallel_state: Any = None) -> None:
        """Agree on the value with all processes of a group.

        parallel_state  a ProcessGroup; or, as in Model-Optimizer, an object whose
                        `expert_model_parallel_group` and `tensor_parallel_group` have
                        `is_initialized()` and `group`; None is the default group
        """

    @classmethod
    def populate(cls, model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> int:
        """Finalise and sync every state of this class; how many have a value now.

        A state whose `finalize` returns False is left as it is: neither synced nor counted. States
        of this module sync none the less, and take the other processes' value.

        group  for states whose members have no `parallel_state`

        Where torch.distributed is initialised, every process of the group must call it.
        """
        return sum(state._populate(group) for state in shared_quant_states(model, cls))

    def _populate(self, group: torch.distributed.ProcessGroup | None) -> bool:
        ready = self.finalize()
        if ready or self._syncs_without_value:
            given = (getattr(m, "parallel_state", None) for m in self.members)
            had = SharedQuantState.finalize(self)
            self.sync(next((s for s in given if s is not None), group))
            ready = ready or (not had and SharedQuantState.finalize(self))
        if ready:
            self.remove_hooks()
        return ready

    # Tie, save, restore -------------------------------------------------------------------------

    def tie_member_quantizers(self) -> None:
        """All of them that can be."""
        for quantizer in self.quantizers:
            self.tie_member_quantizer(quantizer)

    def tie_member_quantizer(self, quantizer: nn.Module) -> bool:
        """Let the quantiser's buffers be this state's; was there one to share?

        From now on it cannot be set to another tensor (in graphquant's Quantizer that raises
        RuntimeError); its values can, by `copy_`, for all at once. In a state_dict each quantiser
        has a copy, so that formats without shared storage can hold it.
        """
        tied = [attr for attr in self.managed_attrs if self._buffers[attr] is not None]
        for attr in tied:
            quantizer.__dict__.pop(attr, None)
            quantizer._buffers[attr] = self._buffers[attr]
        if tied:
            if TIED not in quantizer.__dict__:
                quantizer.register_state_dict_post_hook(_with_own_storage)
            had = quantizer.__dict__.get(TIED, ())
            object.__setattr__(quantizer, TIED, tuple(dict.fromkeys((*had, *tied))))
        return bool(tied)

    @classmethod
    def restore(
        cls,
        model: nn.Module,
        patterns: Sequence[str] | None = None,
        *,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:
        """Attach the states again, and tie what the quantisers have loaded."""
        cls.attach(model, patterns, groups=groups)
        for state in shared_quant_states(model, cls):
            state.restore_from_members()

    def restore_from_members(self) -> bool:
        """Take the first value that a member's quantiser has, and tie; was there one?"""
        restored = False
        for attr in self.managed_attrs:
            values = (getattr(q, attr, None) for q in self.quantizers)
            value = next((v for v in values if _is_set(v)), None)
            if value is not None:
                self._set(attr, value)
                restored = True
        if restored:
            self.tie_member_quantizers()
        return restored

    def _set(self, attr: str, value: Tensor) -> None:
        """Where the buffer is tied, in it."""
        value = value.detach().to(torch.float32)
        held = self._buffers[attr]
        if held is not None and (held.shape, held.device) == (value.shape, value.device):
            held.copy_(value)
        else:
            self._buffers[attr] = value.clone()
            self._tie_again()

    def _tie_again(self) -> None:
        for quantizer in self.quantizers:
            if TIED in quantizer.__dict__:
                self.tie_member_quantizer(quantizer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedQuantState:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for attr, old in before.items():
            self._buffers[attr] = moved(old, self._buffers[attr])
        self._tie_again()  # the parent comes to its states after its other submodules
        return self


class _SharedAmaxState(SharedQuantState):
    """One maximum, 0-d float32, in the one buffer that is managed."""

    default_patterns = SHARED_PATTERNS
    _syncs_without_value = True

    def finalize(self) -> bool:
        """The maximum over all values of the members' `_amax`; nan if one is. Members without one,
        or with one on the meta device, don't count. False if none has one."""
        found = [a for q in self.quantizers if _is_set(a := getattr(q, "_amax", None))]
        if found:
            device = found[0].device
            highest = [reduce_amax(a.float()).to(device) for a in found]
            self._set(self.managed_attrs[0], torch.stack(highest).amax())
        return bool(found)

    def sync(self, parallel_state: Any = None) -> None:
        """All-reduce (MAX); nan on one process is nan on all, one without a value takes theirs.

        Without an initialised process group nothing happens. RuntimeError if it fails.
        """
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            for group in _process_groups(parallel_state):
                self._sync(group)

    def _sync(self, group: torch.distributed.ProcessGroup | None) -> None:
        dist = torch.distributed
        own = self._buffers[self.managed_attrs[0]]
        value = own if _is_set(own) else torch.tensor(-torch.inf)
        nan = value.isnan()
        pair = torch.stack([value.masked_fill(nan, -torch.inf), nan.float()])
        device = "cuda" if dist.get_backend(group) == dist.Backend.NCCL else "cpu"
        pair = pair.to(device)
        try:
            dist.all_reduce(pair, dist.ReduceOp.MAX, group)
        except RuntimeError as failed:
            raise RuntimeError(
                f"Failed to sync shared {self.name.replace('_', ' ', 1)}"
            ) from failed
        highest = torch.where(pair[1] > 0, torch.nan, pair[0])
        if not bool(highest == -torch.inf):
            self._set(self.managed_attrs[0], highest.to(value.device))


class SharedWeightGlobalAmaxState(_SharedAmaxState):
    """One `_global_amax` for the weights of a group: a scale for the whole of each.

    A quantiser takes part only if it has the attribute `global_amax`, as graphquant's Quantizer.
    """

    name = "weight_global_amax"
    managed_attrs = ("_global_amax",)

    @property
    def global_amax(self) -> Tensor | None:
        """() float32, or None until there is one."""
        return self._buffers["_global_amax"]

    @global_amax.setter
    def global_amax(self, value: Tensor) -> None:
        self._set("_global_amax", value)

    def tie_member_quantizer(self, quantizer: nn.Module) -> bool:
        return hasattr(quantizer, "global_amax") and super().tie_member_quantizer(quantizer)


class SharedInputAmaxState(_SharedAmaxState):
    """One `_amax` for the inputs of a group, which are one value."""

    name = "input_amax"
    managed_attrs = ("_amax",)
    target_quantizer_kind = "input"


def shared_quant_states(
    model: nn.Module, state_cls: type[SharedQuantState] = SharedQuantState
) -> Iterator[SharedQuantState]:
    """The states of this class that modules of the model own."""
    for module in model.modules():
        if isinstance(module, state_cls):
            yield module


def _process_groups(parallel_state: Any) -> list[Any]:
    """Those that SharedQuantState.sync is given."""
    kinds = ("expert_model_parallel_group", "tensor_parallel_group")
    if not any(hasattr(parallel_state, kind) for kind in kinds):
        return [parallel_state]
    given = (getattr(parallel_state, kind, None) for kind in kinds)
    return [group.group for group in given if group is not None and group.is_initialized()]


def _names(cls: Any) -> Iterator[str]:
    """Of all kinds of state that are defined, in this library or elsewhere."""
    for sub in cls.__subclasses__():
        if hasattr(sub, "name"):
            yield sub.name
        yield from _names(sub)


def _is_set(value: Tensor | None) -> TypeGuard[Tensor]:
    return value is not None and not value.is_meta


def _with_own_storage(
    quantizer: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object
) -> None:
    for attr in quantizer.__dict__[TIED]:
        if (shared := state_dict.get(prefix + attr)) is not None:
            state_dict[prefix + attr] = shared.clone()
