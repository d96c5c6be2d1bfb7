"""Shared scale groups: found, given one scale, kept together through all that models go through."""

from __future__ import annotations

import copy
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphquant
from graphquant import OptionError
from graphquant.calibration.modelopt.groups import (
    SharedInputAmaxState,
    SharedQuantState,
    SharedWeightGlobalAmaxState,
    groups_at,
    shared_quant_states,
)
from graphquant.calibration.modelopt.quantizer import QuantizedLinear, Quantizer, quantize_linears_
from graphquant.calibration.utils import SHARED_PATTERNS, find_shared_input_groups
from tests.calibration import ranks
from tests.small import seeded

PATTERNS = list(SHARED_PATTERNS)
QKV = r"(?:(.*)\.)?(?:q_proj|k_proj|v_proj)"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def make() -> Any:
    return seeded(Model).eval()


def quantized() -> Any:
    model = make()
    assert quantize_linears_(model) == 14
    return model


def named(model: nn.Module, groups: list[Any]) -> list[tuple[str, list[str]]]:
    """The parent's path and the members', below the parent."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [(paths[id(p)], [paths[id(m)] for m in members]) for p, members in groups]


# Discover ---------------------------------------------------------------------------------------


def test_roles_are_grouped_by_the_module_they_are_in() -> None:
    model = quantized()
    assert named(model, find_shared_input_groups(model, PATTERNS)) == [
        (f"layers.{i}{parent}", [f"layers.{i}{parent}.{role}" for role in roles])
        for i in range(2)
        for parent, roles in (
            (".attn", ("q_proj", "k_proj", "v_proj")),
            ("", ("gate_proj", "up_proj")),
        )
    ]


@pytest.mark.parametrize(
    "roles", ["query key value", "to_q to_k to_v", "q k v", "w1 w3", "gate up"]
)
def test_the_default_patterns_know_other_names(roles: str) -> None:
    names = roles.split()
    for where in ("", "encoder."):
        model = nn.Module()
        parent = model.encoder = nn.Module() if where else model
        if not where:
            del model._modules["encoder"]
        for name in (*names, "out", "w2"):
            setattr(parent, name, QuantizedLinear.of(nn.Linear(2, 2)))
        found = named(model, find_shared_input_groups(model, PATTERNS))
        assert found == [(where.rstrip("."), [f"{where}{name}" for name in names])]


def test_without_patterns_there_are_no_groups() -> None:
    model = quantized()
    assert find_shared_input_groups(model) == find_shared_input_groups(model, []) == []


def test_only_enabled_quantizers_of_the_kind_count() -> None:
    model = quantized()
    attention = model.layers[0].attn
    attention.q_proj.weight_quantizer._disabled = True
    groups = find_shared_input_groups(model, [QKV])
    assert named(model, groups)[0][1] == ["layers.0.attn.k_proj", "layers.0.attn.v_proj"]
    attention.k_proj.weight_quantizer._disabled = True
    assert len(find_shared_input_groups(model, [QKV])) == 1
    assert len(find_shared_input_groups(model, [QKV], "input")) == 2
    assert find_shared_input_groups(model, [QKV], "output") == []
    assert find_shared_input_groups(make(), [QKV]) == []
    with pytest.raises(AttributeError, match="no bias_quantizer: a kind is one of weight"):
        find_shared_input_groups(model, [QKV], "bias")


def test_capture_groups_are_the_key() -> None:
    model = quantized()

    def found(pattern: str) -> list[tuple[str, list[str]]]:
        return named(model, find_shared_input_groups(model, [pattern]))

    # no capture group: one group over all layers, owned above the nn.ModuleList
    ((parent, members),) = found(r".*\.(?:q_proj|k_proj)")
    assert parent == "" and len(members) == 4
    ((parent, members),) = found(r"(layers)\.\d+\.attn\.q_proj")
    assert parent == "" and members == ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]
    assert found(r"(.*)\.(q_proj|k_proj)") == []  # the role is part of the key
    assert found("attn.q_proj|attn.k_proj") == []  # not the whole path
    with pytest.raises(re.error):
        find_shared_input_groups(model, ["("])


def test_the_first_pattern_that_matches_counts() -> None:
    model = quantized()
    groups = find_shared_input_groups(model, [r"(.*)\.(?:q_proj|k_proj)", QKV])
    assert [len(members) for _, members in groups] == [2, 2]  # v_proj is alone in the second


def test_the_parent_is_above_a_module_list_and_no_other_container() -> None:
    q, k = (QuantizedLinear.of(nn.Linear(2, 2)) for _ in range(2))
    for container, parent in ((nn.ModuleList([q, k]), ""), (nn.Sequential(q, k), "m")):
        model = nn.Module()
        model.m = container
        assert named(model, find_shared_input_groups(model, [r"m\.\d"]))[0][0] == parent


def test_groups_are_those_of_the_graph() -> None:
    model, x = make(), torch.randn(5, 8)
    calibration = graphquant.calibrate(model, [x], progress=False)
    quantize_linears_(model, calibration)
    by_graph = groups_at(model, calibration.groups, "input")
    assert named(model, by_graph) == named(
        model, find_shared_input_groups(model, PATTERNS, "input")
    )
    model.layers[0].attn.q_proj.input_quantizer._disabled = True
    assert [len(m) for _, m in groups_at(model, calibration.groups, "input")] == [2, 2, 3, 2]
    assert groups_at(model, [("nowhere", "layers.0.attn.k_proj")]) == []


# Attach -----------------------------------------------------------------------------------------


def test_states_are_attached_once() -> None:
    model = quantized()
    keys = set(model.state_dict())
    assert SharedWeightGlobalAmaxState.metadata(model) == {}
    assert SharedWeightGlobalAmaxState.attach(model) == 0  # no patterns, no groups
    assert SharedWeightGlobalAmaxState.attach(model, PATTERNS) == 4
    assert SharedWeightGlobalAmaxState.attach(model, PATTERNS) == 0
    assert SharedInputAmaxState.attach(model, [QKV]) == 2
    assert len(model.layers[0].attn._shared_quant_states) == 2
    assert SharedWeightGlobalAmaxState.metadata(model) == {"weight_global_amax": True}
    assert len(list(shared_quant_states(model))) == 6
    states = list(shared_quant_states(model, SharedWeightGlobalAmaxState))
    assert states[0].members == tuple(model.layers[0].attn.children())[:3]
    assert set(model.state_dict()) == keys
    # members are no submodules of their state: no module is met twice
    assert len(list(model.parameters())) == 28 and not list(states[0].children())


def test_the_base_class_has_no_sync() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SharedQuantState()  # type: ignore[abstract]


def test_hooks_are_installed_for_new_states_and_removed_when_there_is_a_value() -> None:
    class Watching(SharedInputAmaxState):
        name = "watching"

        def install_hooks(self) -> None:
            self.hook = self.members[0].register_forward_pre_hook(self.see)

        def see(self, module: nn.Module, args: Any) -> None:
            self._set("_amax", args[0].abs().max())

        def remove_hooks(self) -> None:
            self.hook.remove()

        def finalize(self) -> bool:
            return SharedQuantState.finalize(self)

    model, x = quantized(), torch.randn(3, 8)
    assert Watching.attach(model, [QKV]) == 2
    assert Watching.populate(model) == 0
    model(x)
    assert Watching.populate(model) == 2
    first = next(shared_quant_states(model, Watching))
    assert float(first._amax) == float(x.abs().max())
    model(10 * x)
    assert float(first._amax) == float(x.abs().max())


class Bare(SharedQuantState):
    """As Model-Optimizer's own tests define kinds of state: sync and one attribute."""

    name = "bare"
    managed_attrs = ("_amax",)

    def __init__(self, ready: bool = True) -> None:
        super().__init__()
        self.ready, self.synced = ready, []  # type: ignore[var-annotated]

    def finalize(self) -> bool:
        return self.ready

    def sync(self, parallel_state: Any = None) -> None:
        self.synced.append(parallel_state)


def bare(model: nn.Module) -> Any:
    assert Bare.attach(model, [QKV]) == 2
    return next(shared_quant_states(model, Bare))


def test_populate_counts_and_syncs_what_finalize_says_is_ready() -> None:
    model = quantized()
    first = bare(model)
    first.members[1].parallel_state = "of the members"
    assert Bare.populate(model) == 2 and first.synced == ["of the members"]
    first.ready = False
    first._set("_amax", torch.tensor(1.0))  # a value of before: it does not count
    assert Bare.populate(model) == 1 and first.synced == ["of the members"]


def test_hooks_whose_handles_are_kept_are_removed_once_there_is_a_value() -> None:
    model, seen = quantized(), []
    first = bare(model)
    handle = first.members[0].register_forward_hook(lambda *given: seen.append(1))
    first._hook_handles.append(handle)
    first.ready = False
    Bare.populate(model)
    model(torch.randn(3, 8))
    assert seen == [1]
    first.ready = True
    Bare.populate(model)
    model(torch.randn(3, 8))
    assert seen == [1] and first._hook_handles == []


def test_a_bare_kind_of_state_has_no_groups_by_itself() -> None:
    assert Bare.resolve_patterns() == Bare.resolve_patterns({}) == []

    class Nameless(SharedQuantState):
        def sync(self, parallel_state: Any = None) -> None: ...

    assert Nameless.resolve_patterns() == [] and not Nameless().finalize()
    assert SharedInputAmaxState.resolve_patterns() == PATTERNS


def test_nothing_is_restored_where_no_member_has_a_value() -> None:
    model = quantized()
    SharedWeightGlobalAmaxState.attach(model, [QKV])
    state = shared(model)[0]
    state.global_amax = torch.tensor(3.0)
    assert not state.restore_from_members()
    assert all(q._global_amax is None for q in state.quantizers)  # nor tied


def test_groups_of_processes_may_be_given_as_model_optimizer_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Group:
        def __init__(self, group: str, ready: bool) -> None:
            self.group, self.is_initialized = group, lambda: ready

    class Parallel:
        expert_model_parallel_group = Group("experts", True)
        tensor_parallel_group = Group("tensors", False)

    reduced = []
    for name, value in (
        ("is_initialized", lambda: True),
        ("get_backend", lambda group: "gloo"),
        ("all_reduce", lambda tensor, op, group: reduced.append(group)),
    ):
        monkeypatch.setattr(torch.distributed, name, value)
    SharedWeightGlobalAmaxState().sync(parallel_state=Parallel())
    assert reduced == ["experts"]
    SharedWeightGlobalAmaxState().sync()
    assert reduced == ["experts", None]


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (None, PATTERNS),
        ({}, PATTERNS),
        ({"input_amax": {"patterns": ["x"]}}, PATTERNS),
        ({"weight_global_amax": {"patterns": ["a", "b"]}}, ["a", "b"]),
        ({"weight_global_amax": {"patterns": []}}, []),
        ({"weight_global_amax": {}}, PATTERNS),
    ],
)
def test_patterns_are_resolved(config: Any, want: list[str]) -> None:
    assert SharedWeightGlobalAmaxState.resolve_patterns(config) == want


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"weights": {}}, "unsupported state 'weights'"),
        ({"weight_global_amax": {"regex": []}}, "unsupported field 'regex'"),
        ({"weight_global_amax": {"patterns": ["("]}}, r"invalid regex '\('"),
    ],
)
def test_wrong_patterns_are_refused(config: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SharedWeightGlobalAmaxState.resolve_patterns(config)


# Finalize ---------------------------------------------------------------------------------------


def shared(model: nn.Module) -> list[SharedWeightGlobalAmaxState]:
    return list(shared_quant_states(model, SharedWeightGlobalAmaxState))  # type: ignore[arg-type]


def test_the_value_is_the_maximum_over_the_members() -> None:
    model = quantized()
    SharedWeightGlobalAmaxState.attach(model, PATTERNS)
    assert SharedWeightGlobalAmaxState.populate(model) == 4
    for state in shared(model):
        assert state.global_amax is not None
        assert state.global_amax.shape == () and state.global_amax.dtype == torch.float32
        assert float(state.global_amax) == max(
            float(m.weight.detach().abs().max()) for m in state.members
        )
    # populate does not tie
    assert all(q._global_amax is None for state in shared(model) for q in state.quantizers)


def test_members_without_a_value_do_not_count_and_nan_does() -> None:
    model = quantized()
    q, k, v = (m.weight_quantizer for m in list(model.layers[0].attn.children())[:3])
    SharedWeightGlobalAmaxState.attach(model, [QKV])
    state = shared(model)[0]
    q._amax, k._amax, v._amax = torch.tensor(9.0).to("meta"), None, torch.tensor([[1.0], [-7.0]])
    assert state.finalize() and float(state.global_amax) == 7  # type: ignore[arg-type]
    k._amax = torch.tensor(math.nan)
    assert state.finalize() and math.isnan(float(state.global_amax))  # type: ignore[arg-type]
    q._amax = k._amax = v._amax = None
    assert not state.finalize()
    fresh = quantized()
    for linear in fresh.modules():
        if isinstance(linear, QuantizedLinear):
            linear.weight_quantizer._amax = None
    SharedWeightGlobalAmaxState.attach(fresh, PATTERNS)
    assert SharedWeightGlobalAmaxState.populate(fresh) == 0


def test_the_value_can_be_set() -> None:
    state = SharedWeightGlobalAmaxState()
    assert state.global_amax is None
    state.global_amax = torch.tensor(3.0, dtype=torch.float64)
    assert state.global_amax.dtype == torch.float32 and float(state.global_amax) == 3


# Tie and keep -----------------------------------------------------------------------------------


def tied() -> Any:
    model = quantized()
    SharedWeightGlobalAmaxState.attach(model, PATTERNS)
    SharedWeightGlobalAmaxState.populate(model)
    for state in shared(model):
        state.tie_member_quantizers()
    return model


def one_object(model: nn.Module, states: int = 4) -> None:
    found = shared(model)
    assert len(found) == states
    for state in found:
        assert state.global_amax is not None and state.global_amax.dtype == torch.float32
        for member in state.members:
            assert any(member is m for m in model.modules())
            assert member.weight_quantizer._global_amax is state.global_amax
        assert float(state.global_amax) == pytest.approx(
            max(float(m.weight.detach().abs().max()) for m in state.members), rel=1e-2
        )


def test_tied_quantizers_hold_one_tensor() -> None:
    model = tied()
    one_object(model)
    quantizer = model.layers[0].attn.q_proj.weight_quantizer
    with pytest.raises(RuntimeError, match="_global_amax is shared with other quantizers"):
        quantizer._global_amax = torch.tensor(1.0)
    quantizer._global_amax.copy_(torch.tensor(5.0))
    assert float(shared(model)[0].global_amax) == 5  # type: ignore[arg-type]
    x = model.layers[0].attn.k_proj.weight
    steps = model.layers[0].attn.k_proj.weight_quantizer(x) / (5 / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    alone = model.layers[0].down_proj.weight_quantizer
    assert alone._global_amax is None


def test_a_new_value_reaches_all_members() -> None:
    model = tied()
    state = shared(model)[0]
    state.global_amax = torch.tensor(2.0)
    assert all(float(q._global_amax) == 2 for q in state.quantizers)
    state.global_amax = torch.tensor([2.0, 3.0])  # another shape: another tensor, tied again
    assert all(q._global_amax is state.global_amax for q in state.quantizers)


def test_only_quantizers_with_the_attribute_take_part() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._disabled = False

    state = SharedWeightGlobalAmaxState()
    assert not state.tie_member_quantizer(Quantizer())  # no value yet
    state.global_amax = torch.tensor(3.0)
    foreign = Foreign()
    assert not state.tie_member_quantizer(foreign)
    foreign.global_amax = None  # type: ignore[assignment]
    foreign._global_amax = None  # type: ignore[assignment]
    assert state.tie_member_quantizer(foreign)
    assert foreign._global_amax is state.global_amax
    assert foreign.state_dict()["_global_amax"] is not state.global_amax


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double().to("cpu"),
        copy.deepcopy,
        lambda m: copy.deepcopy(m).half(),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())) and m,
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and m,
        lambda m: torch.load(saved(m), weights_only=False),
    ],
    ids=["half", "bfloat16", "double", "copy", "copy half", "load", "assign", "pickle"],
)
def test_they_stay_one_tensor_in_float32(change: Any) -> None:
    model = tied()
    old = shared(model)[0].global_amax
    changed = change(model)
    one_object(changed)
    assert float(shared(changed)[0].global_amax) == float(old)  # type: ignore[arg-type]
    assert (shared(changed)[0].global_amax is old) == (changed is model)


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_they_are_tied_again_on_another_device() -> None:
    model = tied().to("meta")
    for where in (model, copy.deepcopy(model).to_empty(device="cpu")):
        for state in shared(where):
            assert state._global_amax.is_meta == (where is model)
            assert all(q._global_amax is state._global_amax for q in state.quantizers)
    half_moved = tied()
    half_moved.layers[0].attn.q_proj.half()  # one member alone
    one_object(half_moved)


def test_a_state_dict_holds_independent_copies_and_restores(tmp_path: Path) -> None:
    model = tied()
    held = model.state_dict()
    keys = [k for k in held if k.endswith("_global_amax")]
    assert len(keys) == 10 and not any("_shared_quant_states" in k for k in held)
    assert len({held[k].untyped_storage().data_ptr() for k in keys}) == 10
    save_file(held, tmp_path / "model.safetensors")  # which refuses shared storages

    fresh = make()
    quantize_linears_(fresh)
    for linear in fresh.modules():
        if isinstance(linear, QuantizedLinear):
            linear.weight_quantizer._amax = None  # not calibrated: as loaded, or not at all
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert SharedWeightGlobalAmaxState.metadata(fresh) == {}
    SharedWeightGlobalAmaxState.restore(fresh, PATTERNS)
    one_object(fresh)
    for state, other in zip(shared(fresh), shared(model), strict=True):
        assert torch.equal(state.global_amax, other.global_amax)  # type: ignore[arg-type]


def test_nothing_is_restored_from_members_without_a_value() -> None:
    model = quantized()
    SharedWeightGlobalAmaxState.attach(model, PATTERNS)
    assert not any(state.restore_from_members() for state in shared(model))
    quantizers = shared(model)[0].quantizers
    quantizers[1]._global_amax = torch.tensor(4.0)
    assert shared(model)[0].restore_from_members()
    assert all(q._global_amax is shared(model)[0].global_amax for q in quantizers)


def test_inputs_share_the_scale_of_the_value_that_they_are() -> None:
    """The whole path, on what a calibration has seen."""
    model, x = make(), torch.randn(50, 8)
    calibration = graphquant.calibrate(model, [x], progress=False)
    quantize_linears_(model, calibration)
    assert SharedInputAmaxState.attach(model, groups=calibration.groups) == 4
    assert SharedInputAmaxState.populate(model) == 4
    for state in shared_quant_states(model, SharedInputAmaxState):
        state.tie_member_quantizers()
    model.half().float()
    for i in range(2):
        for names in (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("gate_proj", "up_proj")):
            paths = [f"layers.{i}.{name}" for name in names]
            amaxes = [model.get_submodule(p).input_quantizer._amax for p in paths]
            assert all(a is amaxes[0] for a in amaxes)
            low, high = calibration.range(paths[0]) or (0.0, 0.0)
            assert float(amaxes[0]) == max(-low, high)
    assert graphquant.calibrate(make(), [x], progress=False).groups == calibration.groups


# Processes --------------------------------------------------------------------------------------


def populate_on_ranks(rank: int, folder: Path) -> None:
    model = nn.Module()
    for pair, amaxes in (
        ("both", ((1.0, 5.0), (7.0, 2.0))),  # of each rank
        ("one", ((None, None), (3.0, 1.0))),
        ("none", ((None, None), (None, None))),
        ("nan", ((math.nan, 9.0), (4.0, 4.0))),
    ):
        block = nn.Module()
        for name, amax in zip(("w1", "w3"), amaxes[rank], strict=True):
            linear = QuantizedLinear.of(nn.Linear(2, 2))
            linear.weight_quantizer._amax = None if amax is None else torch.tensor(amax)
            setattr(block, name, linear)
        setattr(model, pair, block)
    SharedWeightGlobalAmaxState.attach(model, PATTERNS)
    count = SharedWeightGlobalAmaxState.populate(model)
    values = [None if (a := s.global_amax) is None else float(a) for s in shared(model)]
    torch.save((count, values), folder / f"{rank}")


def test_processes_agree_on_the_maximum(tmp_path: Path) -> None:
    ranks.spawn(populate_on_ranks, tmp_path)
    for rank in range(ranks.RANKS):
        count, values = torch.load(tmp_path / f"{rank}")
        assert count == 3 and values[:3] == [7.0, 3.0, None] and math.isnan(values[3])


def test_a_sync_that_fails_says_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("connection closed")

    for name, value in (("is_initialized", lambda: True), ("get_backend", lambda group: "gloo")):
        monkeypatch.setattr(torch.distributed, name, value)
    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(RuntimeError, match="Failed to sync shared weight global_amax"):
        SharedWeightGlobalAmaxState().sync()
