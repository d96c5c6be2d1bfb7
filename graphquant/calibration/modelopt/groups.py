"""Shared scales: groups of quantizers that must use the same scale.

Linears that read the same value (q/k/v) have one int8 input, so they must share its static scale.
Their weights need no shared scale in graphquant: scales are per output channel, so stacking weights
changes nothing. Engines with per-tensor weight scales must share them among stacked weights.

    groups     are found by module paths (`find_shared_input_groups`), or are those that read one
               value in a calibration (`Calibration.groups`, `groups_at`)
    attach     gives each group a SharedQuantState, on the module that holds all its members
    populate   finalizes (the maximum over the members), then syncs (the maximum over all processes)
    tie        makes the members' quantizers hold the state's tensor: one float32 object, also after
               `.to()`, `.half()`, deepcopy and load_state_dict
    state_dict holds each member's copy and nothing of the states: `restore` rebuilds them from what
               a model with the same groups has loaded

After NVIDIA Model-Optimizer's classes of these names. Deliberate differences: a process without a
value takes part in the sync instead of blocking the others, and tied buffers stay float32.
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

KINDS = ("weight", "input", "output")  # of a module's quantizers

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
"""Linears that are stacked, by the module they are in. For cross-attention, where q reads another
value than k and v, these groups are wider than necessary; those of a calibration are exact."""


def find_shared_input_groups(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    target_quantizer_kind: str = "weight",
) -> list[Group]:
    """Groups by module paths: (parent, members) of each.

    Paths that a pattern matches as a whole, with equal capture groups, form a group; the first
    pattern that matches counts. `(.*)\\.(?:w1|w3)` gives a group for
    each module with a w1 and a w3; `(.*)\\.experts\\.\\d+\\.(?:w1|w3)` one for all experts.

    Only modules with an enabled `<kind>_quantizer` count, and groups of two or more. Groups are in
    the order of their first member, members in that of `named_modules`. The parent is the nearest
    common ancestor that is not an nn.ModuleList.

    Without patterns there are no groups; SHARED_PATTERNS are the usual ones.

    Raises re.error for an invalid pattern, AttributeError for a kind that is not one of KINDS.
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
    """Groups by the paths of their members, such as `Calibration.groups`.

    Like `find_shared_input_groups`, it ignores modules without an enabled quantizer of this kind.
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
    """State shared by the quantizers of one group.

    It is a submodule of the group's parent, in the nn.ModuleList `_shared_quant_states`, and not
    part of the state_dict.

    name                   of the kind of state, as in `metadata`
    managed_attrs          names of the shared buffers, as on the quantizers
    target_quantizer_kind  of the quantizers: "weight", "input" or "output"
    default_patterns       the default of `resolve_patterns`: no groups

    A subclass defines `sync` and, unless hooks compute the value, `finalize`. It puts the handles
    of its hooks into `_hook_handles`.
    """

    name: ClassVar[str]
    managed_attrs: ClassVar[tuple[str, ...]] = ()
    target_quantizer_kind: ClassVar[str] = "weight"
    default_patterns: ClassVar[tuple[str, ...]] = ()
    _syncs_without_value: ClassVar[bool] = False  # so that other processes do not hang

    def __init__(self) -> None:
        super().__init__()
        for attr in self.managed_attrs:
            self.register_buffer(attr, None, persistent=False)
        object.__setattr__(self, "_hook_handles", [])
        self.set_members(None, ())

    # Members ------------------------------------------------------------------------------------

    def set_members(self, parent: nn.Module | None, members: Sequence[nn.Module]) -> None:
        """Set the group. The members are not registered as submodules of the state."""
        object.__setattr__(self, "_parent", parent)
        object.__setattr__(self, "_members", tuple(members))

    @property
    def members(self) -> tuple[nn.Module, ...]:
        linked: tuple[nn.Module, ...] = self.__dict__["_members"]
        return linked

    @property
    def quantizers(self) -> list[nn.Module]:
        """The members' quantizers of this state's kind."""
        every = (getattr(m, f"{self.target_quantizer_kind}_quantizer", None) for m in self.members)
        return [q for q in every if isinstance(q, nn.Module)]

    # Discover -----------------------------------------------------------------------------------

    @classmethod
    def resolve_patterns(
        cls, shared_states: Mapping[str, Mapping[str, Sequence[str]]] | None = None
    ) -> list[str]:
        """The patterns for this state: `shared_states[name]["patterns"]`, or the defaults.

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
        """Attach a state of this class to every group that has none; returns how many are new.

        patterns  for `find_shared_input_groups`; None means none, not the defaults
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

    # Observe, finalize, sync --------------------------------------------------------------------

    def install_hooks(self) -> None:
        """For states whose value is computed while the model runs. Does nothing here."""

    def remove_hooks(self) -> None:
        """Remove the hooks in `_hook_handles`."""
        for handle in self.__dict__["_hook_handles"]:
            handle.remove()
        object.__setattr__(self, "_hook_handles", [])

    def finalize(self) -> bool:
        """Compute the value; returns whether there is one. Here: whether a hook has set one."""
        return any(_is_set(self._buffers[attr]) for attr in self.managed_attrs)

    @abstractmethod
    def sync(self, parallel_state: Any = None) -> None:
        """Reduce the value over all processes of a group.

        parallel_state  a ProcessGroup; or, as in Model-Optimizer, an object whose
                        `expert_model_parallel_group` and `tensor_parallel_group` have
                        `is_initialized()` and `group`; None is the default group
        """

    @classmethod
    def populate(cls, model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> int:
        """Finalize and sync every state of this class; returns how many have a value now.

        A state whose `finalize` returns False is neither synced nor counted. Exception: the states
        of this module sync anyway, and take the value of the other processes.

        group  for states whose members have no `parallel_state`

        Where torch.distributed is initialized, every process of the group must call it.
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
        """Tie all quantizers that can be tied."""
        for quantizer in self.quantizers:
            self.tie_member_quantizer(quantizer)

    def tie_member_quantizer(self, quantizer: nn.Module) -> bool:
        """Make the quantizer's buffers those of this state; returns whether there is one to share.

        A tied buffer cannot be replaced (graphquant's Quantizer raises RuntimeError), but written
        by `copy_`, for all members at once. In a state_dict each quantizer has a copy, for formats
        without shared storage.
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
        """Attach the states, and tie the values that the quantizers have loaded."""
        cls.attach(model, patterns, groups=groups)
        for state in shared_quant_states(model, cls):
            state.restore_from_members()

    def restore_from_members(self) -> bool:
        """Take the first value of a member's quantizer, and tie; returns whether there is one."""
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
        """Set a buffer, in place if it is tied."""
        value = value.detach().to(torch.float32)
        held = self._buffers[attr]
        if held is not None and (held.shape, held.device) == (value.shape, value.device):
            held.copy_(value)
        else:
            self._buffers[attr] = value.clone()
            self._retie()

    def _retie(self) -> None:
        for quantizer in self.quantizers:
            if TIED in quantizer.__dict__:
                self.tie_member_quantizer(quantizer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedQuantState:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for attr, old in before.items():
            self._buffers[attr] = moved(old, self._buffers[attr])
        self._retie()  # the parent moves its states after its other submodules
        return self


class _SharedAmaxState(SharedQuantState):
    """A shared maximum, () float32, in the only managed buffer."""

    default_patterns = SHARED_PATTERNS
    _syncs_without_value = True

    def finalize(self) -> bool:
        """Take the maximum of the members' `_amax`; nan if one is nan.

        Members without one, or with one on the meta device, are ignored. False if none has one.
        """
        found = [a for q in self.quantizers if _is_set(a := getattr(q, "_amax", None))]
        if found:
            device = found[0].device
            highest = [reduce_amax(a.float()).to(device) for a in found]
            self._set(self.managed_attrs[0], torch.stack(highest).amax())
        return bool(found)

    def sync(self, parallel_state: Any = None) -> None:
        """All-reduce with MAX; nan on one process is nan on all.

        A process without a value takes that of the others. Does nothing without an initialized
        process group. Raises RuntimeError if it fails.
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
    """A shared `_global_amax` for the weights of a group: a per-tensor scale.

    Only quantizers with an attribute `global_amax`, such as graphquant's, take part.
    """

    name = "weight_global_amax"
    managed_attrs = ("_global_amax",)

    @property
    def global_amax(self) -> Tensor | None:
        """() float32, None if not set."""
        return self._buffers["_global_amax"]

    @global_amax.setter
    def global_amax(self, value: Tensor) -> None:
        self._set("_global_amax", value)

    def tie_member_quantizer(self, quantizer: nn.Module) -> bool:
        return hasattr(quantizer, "global_amax") and super().tie_member_quantizer(quantizer)


class SharedInputAmaxState(_SharedAmaxState):
    """A shared `_amax` for the inputs of a group, which are the same value."""

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
    """The process groups in the argument of SharedQuantState.sync."""
    kinds = ("expert_model_parallel_group", "tensor_parallel_group")
    if not any(hasattr(parallel_state, kind) for kind in kinds):
        return [parallel_state]
    given = (getattr(parallel_state, kind, None) for kind in kinds)
    return [group.group for group in given if group is not None and group.is_initialized()]


def _names(cls: Any) -> Iterator[str]:
    """Names of all defined kinds of state, in this library or elsewhere."""
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
