"""Packed weights are never stale.

Each test changes weights in one way and compares with a float model built anew from the new
values. It also asserts that the old result is far from the new one, so that it can fail.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import graphquant
from graphquant.backend import can_run_twice
from graphquant.passes.prepack import Recipe
from graphquant.weights import gpu_probe, snapshot
from graphquant.weights.packed import PackedInputs, packed_tensors
from tests import zoo
from tests.small import FAR, NEAR, Mlp, Scaled, again, error, int8, seeded

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Every recipe that is computed from now on."""
    seen: list[Recipe] = []
    compute = Recipe.compute

    def spy(self: Recipe, roots: Sequence[Tensor]) -> list[Tensor]:
        seen.append(self)
        return compute(self, roots)

    monkeypatch.setattr(Recipe, "compute", spy)
    return seen


def other(like: Tensor, seed: int = 1) -> Tensor:
    """Other values for a weight, of its own size."""
    new = seeded(lambda: torch.randn(like.shape), seed).to(like)
    return new * like.std()


# Every way to change a weight that is noticed by itself ------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = seeded(lambda: torch.randn(16, 64), 3).to(next(model.parameters()))
    with torch.enable_grad():
        model(x).square().sum().backward()
    optimizer.step()


def sgd(model: Mlp) -> None:
    train(model, torch.optim.SGD(model.parameters(), lr=1e-2))


def fused_sgd(model: Mlp) -> None:
    train(model, torch.optim.SGD(model.parameters(), lr=1e-2, fused=True))


def foreach_adamw(model: Mlp) -> None:
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True))


def fused_adamw(model: Mlp) -> None:
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))


def copy_under_no_grad(model: Mlp) -> None:
    model.fc1.weight.copy_(other(model.fc1.weight))


def copy_under_inference_mode(model: Mlp) -> None:
    with torch.inference_mode():
        model.fc1.weight.copy_(other(model.fc1.weight))


def copy_into_detached(model: Mlp) -> None:
    model.fc1.weight.detach().copy_(other(model.fc1.weight))


def bias_alone(model: Mlp) -> None:
    model.fc2.bias.copy_(10 * other(model.fc2.bias))


def gamma_alone(model: Mlp) -> None:
    model.norm.weight.copy_(other(model.fc1.weight[0]) * 10)


def load_state_dict(model: Mlp) -> None:
    model.load_state_dict(seeded(Mlp, 1).state_dict())


def load_state_dict_by_assignment(model: Mlp) -> None:
    new = seeded(Mlp, 1).to(model.fc1.weight.device)
    model.load_state_dict(new.state_dict(), assign=True)


def load_state_dict_by_swapping(model: Mlp) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(seeded(Mlp, 1).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def new_parameter(model: Mlp) -> None:
    model.fc1.weight = nn.Parameter(other(model.fc1.weight))


def new_submodule(model: Mlp) -> None:
    model.fc1 = seeded(lambda: nn.Linear(64, 96), 1).to(model.fc1.weight.device)


def new_data(model: Mlp) -> None:
    model.fc1.weight.data = other(model.fc1.weight)


def exchanged_data(model: Mlp) -> None:
    twin = seeded(Mlp, 1).to(model.fc1.weight.device)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.data, q.data = q.data, p.data


def init_in_place(model: Mlp) -> None:
    with torch.random.fork_rng():
        nn.init.orthogonal_(model.fc1.weight)


def lora_merged_by_copy(model: Mlp) -> None:
    w = model.fc1.weight
    w.copy_(w + other(w[:, :4]) @ other(w[:4]) * 10)


def lora_merged_by_add(model: Mlp) -> None:
    w = model.fc1.weight
    w.add_(other(w[:, :4]) @ other(w[:4]) * 10)


def swapped_tensors(model: Mlp) -> None:
    new = nn.Parameter(other(model.fc1.weight))
    torch.utils.swap_tensors(model.fc1.weight, new)


def flat_vector(model: Mlp) -> None:
    twin = seeded(Mlp, 1).to(model.fc1.weight.device)
    vector_to_parameters(parameters_to_vector(twin.parameters()), model.parameters())


def moved_storage(model: Mlp) -> None:
    model.fc1.weight.set_(other(model.fc1.weight))


def averaged(model: Mlp) -> None:
    torch._foreach_lerp_(list(model.parameters()), [other(p) for p in model.parameters()], 0.9)
    if model.fc1.weight.is_cuda:  # there torch's foreach operators leave no version behind
        graphquant.refresh(model)


UPDATES: list[Callable[[Mlp], None]] = [
    sgd,
    fused_sgd,
    foreach_adamw,
    fused_adamw,
    copy_under_no_grad,
    copy_under_inference_mode,
    copy_into_detached,
    bias_alone,
    gamma_alone,
    load_state_dict,
    load_state_dict_by_assignment,
    load_state_dict_by_swapping,
    new_parameter,
    new_submodule,
    new_data,
    exchanged_data,
    init_in_place,
    lora_merged_by_copy,
    lora_merged_by_add,
    swapped_tensors,
    flat_vector,
    moved_storage,
    averaged,
]


@pytest.mark.parametrize("update", UPDATES, ids=lambda f: f.__name__)
def test_this_update_is_noticed(update: Callable[[Mlp], None], device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    old = run(x)
    assert error(old, again(model)(x)) < NEAR
    update(model)
    want = again(model)(x)
    assert error(old, want) > FAR
    assert error(run(x), want) < NEAR
    assert error(run(x), want) < NEAR  # and it stays so


@pytest.fixture
def _without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """No values are compared, as on a GPU at the next call."""
    monkeypatch.setattr(
        "graphquant.weights.versions.values_of", lambda tensors: [None] * len(tensors)
    )


@pytest.mark.usefixtures("_without_values")
@pytest.mark.parametrize(
    "update",
    [fused_sgd, fused_adamw, copy_under_no_grad, new_data, exchanged_data],
    ids=lambda f: f.__name__,
)
def test_this_update_is_noticed_without_values(
    update: Callable[[Mlp], None], device: str, x: Tensor
) -> None:
    test_this_update_is_noticed(update, device, x)


@pytest.mark.usefixtures("_without_values")
def test_data_that_moves_within_its_storage_is_noticed(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    w = model.fc1.weight
    both = torch.cat([w.detach(), other(w)])
    w.data = both[:96]
    run = int8(model)
    old = run(x)
    w.data = both[96:]
    want = again(model)(x)
    assert error(old, want) > FAR
    assert error(run(x), want) < NEAR


def test_new_data_at_the_old_address_is_noticed() -> None:
    """`p.data = p.data + a; p.data = p.data + b`: the second may land where the first started."""
    memory = bytearray(4 * 64 * 96)
    run = int8(model := seeded(Mlp))
    x = seeded(lambda: torch.randn(8, 64))
    w, results = model.fc1.weight, []
    for seed in range(3):
        new = torch.frombuffer(memory, dtype=torch.float32).view(96, 64)
        new.copy_(other(seeded(Mlp).fc1.weight, seed))
        w.data = new
        del new  # now the storage belongs to the parameter alone
        results.append(run(x))
        assert error(results[-1], again(model)(x)) < NEAR
    assert error(results[1], results[2]) > FAR


def test_two_types_and_back(device: str, x: Tensor) -> None:
    run = int8(model := seeded(Mlp).to(device))
    old = run(x)
    model.to(torch.bfloat16)
    copy_under_no_grad(model)
    half = run(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, again(model)(x.bfloat16())) < NEAR
    model.to(torch.float32)
    want = again(model)(x)
    assert error(old, want) > FAR
    assert error(run(x), want) < NEAR


def test_inference_tensors_are_packed_and_replaced(device: str, x: Tensor) -> None:
    with torch.inference_mode():
        run = int8(model := seeded(Mlp).to(device))
        assert model.fc1.weight.is_inference()
        old = run(x)
        assert error(old, again(model)(x)) < NEAR
        model.fc1.weight = nn.Parameter(other(model.fc1.weight))
        want = again(model)(x)
        assert error(old, want) > FAR
        assert error(run(x), want) < NEAR


def test_inference_tensors_changed_in_place_need_refresh(device: str, x: Tensor) -> None:
    """They have no version counter, so nothing tells."""
    with torch.inference_mode():
        run = int8(model := seeded(Mlp).to(device))
        old = run(x)
        copy_under_no_grad(model)
        graphquant.refresh(model)
        want = again(model)(x)
        assert error(old, want) > FAR
        assert error(run(x), want) < NEAR


# What leaves no trace on a parameter: writes through an alias -----------------------------------


def data_multiplied(model: Mlp) -> None:
    model.fc1.weight.data.mul_(-1.5)


def data_added_to(model: Mlp) -> None:
    model.fc1.weight.data += other(model.fc1.weight) * 2


def data_of_the_bias(model: Mlp) -> None:
    model.fc2.bias.data += 3


def storage_copied(model: Mlp) -> None:
    new = other(model.fc1.weight)
    model.fc1.weight.untyped_storage().copy_(new.untyped_storage())


def a_third_of_the_rows(model: Mlp) -> None:
    model.fc1.weight.data[32:64] = other(model.fc1.weight)[:32] * 4


def some_columns(model: Mlp) -> None:
    model.fc1.weight.data[:, 5:25] = 1


ALIASES = [
    data_multiplied,
    data_added_to,
    data_of_the_bias,
    storage_copied,
    a_third_of_the_rows,
    some_columns,
]


def settled(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """On a GPU the values are compared behind the call's back, and the next call knows."""
    if x.is_cuda:
        run(x)
        torch.cuda.synchronize()


@pytest.fixture(params=["in C", "in Python"])
def how_values_are_compared(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.param == "in Python":
        monkeypatch.setattr("graphquant.weights.snapshot._native", lambda: None)
    else:
        assert snapshot._native() is not None


@pytest.mark.usefixtures("how_values_are_compared")
@pytest.mark.parametrize("write", ALIASES, ids=lambda f: f.__name__)
def test_this_write_through_an_alias_is_noticed(
    write: Callable[[Mlp], None], device: str, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    old = run(x)
    write(model)
    want = again(model)(x)
    assert error(old, want) > FAR
    settled(run, x)
    for _ in range(2):
        assert error(run(x), want) < NEAR
    if x.is_cuda:
        said = [r.message for r in caplog.records if r.name == "graphquant.weights.versions"]
        seen = [] if write is data_of_the_bias else ["fc"]  # a bias is read, not packed
        assert [m[:2] for m in said] == seen


def test_parameters_that_are_views_of_one_written_buffer(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    flat = parameters_to_vector(model.parameters()).detach()
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    run = int8(model)
    old = run(x)
    flat.mul_(1.4)
    want = again(model)(x)
    assert error(old, want) > FAR
    settled(run, x)
    assert error(run(x), want) < NEAR


def test_parameters_taken_from_one_vector_again_and_again(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    flat = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(flat, model.parameters())
    run = int8(model)
    for seed in range(3):
        flat.copy_(parameters_to_vector(seeded(Mlp, seed).parameters()))
        vector_to_parameters(flat, model.parameters())
        settled(run, x)
        assert error(run(x), again(model)(x)) < NEAR


def test_storage_of_parameters_can_still_be_resized(x: Tensor) -> None:
    """numpy forbids it to what it has seen."""
    model = seeded(Mlp).to(x.device)
    run = int8(model)
    run(x)
    for p in model.parameters():
        assert p.untyped_storage().resizable()


def test_writes_through_numpy_and_to_inference_tensors_are_noticed() -> None:
    x = seeded(lambda: torch.randn(8, 64))
    for make in (seeded, under_inference_mode):
        model = make(Mlp)
        run = int8(model)
        with torch.inference_mode():
            old = run(x)
            model.fc1.weight.detach().numpy()[...] *= -2
            want = model(x)
            assert error(old, want) > FAR
            assert error(run(x), want) < NEAR


def under_inference_mode(make: Callable[[], Mlp]) -> Mlp:
    with torch.inference_mode():
        return seeded(make)


def test_a_change_that_bfloat16_hardly_holds_is_noticed(device: str) -> None:
    """A thousandth of a weight: most of its values stay what they were, bit for bit."""
    linear = seeded(lambda: nn.Linear(256, 256, bias=False)).to(device, torch.bfloat16)
    x = seeded(lambda: torch.randn(8, 256)).to(device, torch.bfloat16)
    run = int8(linear)
    run(x)
    before = linear.weight.clone()
    version = tracker_of(linear.weight).version
    linear.weight.data += other(before) / 1000
    assert 0.05 < (linear.weight != before).float().mean() < 0.5
    settled(run, x)
    run(x)
    assert tracker_of(linear.weight).version != version


def test_a_weight_that_is_no_row_major_matrix_is_compared(device: str, x: Tensor) -> None:
    linear = seeded(lambda: nn.Linear(64, 96)).to(device)
    linear.weight.data = linear.weight.t().contiguous().t()
    run = int8(linear)
    old = run(x)
    linear.weight.data[40:] *= -3
    assert error(old, linear(x)) > FAR
    settled(run, x)
    assert error(run(x), linear(x)) < NEAR


def test_a_graph_that_is_compiled_later_takes_no_pack_from_before_a_silent_write(
    device: str, x: Tensor
) -> None:
    """Its own first look comes after the write."""
    model = seeded(Mlp).to(device)
    run = int8(model)
    old = run(x)
    model.fc1.weight.data.mul_(-2)
    want = again(model)(x)
    assert error(old, want) > FAR
    assert error(int8(model, exclude="fc2")(x), want) < NEAR
    assert error(run(x), want) < NEAR


@pytest.mark.parametrize("of_module", [True, False], ids=["of the module", "of everything"])
def test_one_value_that_is_not_looked_at_needs_refresh(
    of_module: bool, device: str, x: Tensor
) -> None:
    """As documented."""
    linear = seeded(lambda: nn.Linear(64, 96)).to(device)
    run = int8(linear)
    old = run(x)
    places = set(snapshot._sample_indices(linear.weight.numel()).tolist())
    unseen = next(i for i in range(linear.weight.numel()) if i not in places)
    linear.weight.data.view(-1)[unseen] += 100
    settled(run, x)
    assert torch.equal(run(x), old)
    graphquant.refresh(linear if of_module else None)
    assert error(run(x), linear(x)) < NEAR
    assert error(run(x), old) > FAR


@pytest.mark.parametrize("of_module", [True, False], ids=["of the module", "of everything"])
def test_refresh_packs_again_at_once(of_module: bool, device: str, x: Tensor) -> None:
    """On a GPU a silent write is noticed one call later; after refresh() there is no such call."""
    run = int8(model := seeded(Mlp).to(device))
    old = run(x)
    model.fc1.weight.data += other(model.fc1.weight) * 2
    want = again(model)(x)
    assert error(old, want) > FAR
    graphquant.refresh(model if of_module else None)
    assert error(run(x), want) < NEAR


def test_refresh_of_one_module_leaves_others_alone(
    device: str, x: Tensor, packings: list[Recipe]
) -> None:
    a, b = (seeded(Mlp, i).to(device) for i in range(2))
    run_a, run_b = int8(a), int8(b)
    run_a(x), run_b(x)
    packings.clear()
    graphquant.refresh(a)
    run_b(x)
    assert len(packings) == 0
    run_a(x)
    assert len(packings) == 2


# One compiled graph, many weights ----------------------------------------------------------------


def test_two_instances_compiled_separately(device: str, x: Tensor) -> None:
    a, b = (seeded(Mlp, i).to(device) for i in range(2))
    run_a, run_b = int8(a), int8(b)
    for _ in range(2):
        assert error(run_a(x), again(a)(x)) < NEAR
        assert error(run_b(x), again(b)(x)) < NEAR
    assert error(run_a(x), run_b(x)) > FAR


class CompiledForward(Mlp):
    @torch.compile(backend="graphquant", options={"inner": "eager"})
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_two_instances_of_a_class_whose_forward_is_compiled(device: str, x: Tensor) -> None:
    a, b = (seeded(CompiledForward, i).to(device) for i in range(2))
    for _ in range(2):
        for model in (a, b):
            want = Mlp.forward(model, x)
            assert error(model(x), want) < NEAR
    assert error(a(x), b(x)) > FAR


def test_equal_blocks_compile_once_and_never_pack_again(
    device: str, x: Tensor, packings: list[Recipe]
) -> None:
    blocks = [seeded(Mlp, i).to(device) for i in range(4)]
    reports: list[graphquant.Report] = []
    for block in blocks:
        block.compile(backend="graphquant", options={"inner": "eager", "on_report": reports.append})
    for _ in range(3):
        for block in blocks:
            assert error(block(x), Mlp.forward(block, x)) < NEAR
    assert len(reports) == 1
    assert len(packings) == 2 * len(blocks)


def test_another_batch_shares_the_packs(device: str, x: Tensor, packings: list[Recipe]) -> None:
    run = int8(model := seeded(Mlp).to(device), reports := [])
    for size in (8, 1, 5):
        run(x[:size])
    assert len(reports) > 1  # it was compiled again
    assert len(packings) == 2
    copy_under_no_grad(model)
    for size in (1, 8, 5):
        assert error(run(x[:size]), again(model)(x[:size])) < NEAR
    assert len(packings) == 3


def test_functional_call_with_other_weights(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    run = int8(lambda weights, x: torch.func.functional_call(model, weights, (x,)))
    for seed in (1, 2):
        twin = seeded(Mlp, seed).to(device)
        weights = {n: p.detach() for n, p in twin.named_parameters()}
        assert error(run(weights, x), twin(x)) < NEAR


# Weights with more than one reader ---------------------------------------------------------------


class Tied(nn.Module):
    """One weight in two stacks, each time beside another sibling and with another bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.norm1(x), self.norm2(x.flip(-1))
        return torch.cat([self.a(y), self.b(y), self.c(z), self.d(z)], -1)


def test_tied_weight_in_two_stacks(device: str, x: Tensor) -> None:
    model = seeded(Tied).to(device)
    reports: list[graphquant.Report] = []
    run = int8(model, reports)
    old = run(x)
    assert reports[0].counts() == {"stack_siblings + norm_linear": 4}
    want = model(x)
    for part in range(4):
        assert error(old.chunk(4, -1)[part], want.chunk(4, -1)[part]) < NEAR
    model.a.weight.copy_(other(model.a.weight))
    want = model(x)
    assert error(old, want) > FAR
    new = run(x)
    for part in range(4):
        assert error(new.chunk(4, -1)[part], want.chunk(4, -1)[part]) < NEAR


class TwoBiases(nn.Module):
    """One weight, two biases, each behind its own layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.s, self.t = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.s * self.a(x), self.t * self.b(y)


def test_tied_weight_with_two_biases_and_layer_scales(device: str, x: Tensor) -> None:
    model = seeded(TwoBiases).to(device)
    run = int8(model)
    for _ in range(2):
        for got, want in zip(run(x, x + 1), model(x, x + 1), strict=True):
            assert error(got, want) < NEAR
        model.b.bias.add_(3)
        model.t.copy_(other(model.t, 5))


def test_layers_that_share_all_weights(packings: list[Recipe]) -> None:
    entry = zoo.load("albert")
    model = entry.build("sdpa")
    args, kwargs = entry.inputs(2)
    run = int8(model)
    run(*args, **kwargs)
    packings.clear()
    got, want = (f(*args, **kwargs).last_hidden_state for f in (run, model))
    assert error(got, want) < NEAR
    assert not packings


def test_buffer_as_layer_scale_updated_in_place(device: str, x: Tensor) -> None:
    model = seeded(Scaled).to(device)
    reports: list[graphquant.Report] = []
    run = int8(model, reports)
    old = run(x)
    assert reports[0].counts() == {"linear + layer_scale": 1}
    model.scale.mul_(-3)
    want = again(model)(x)
    assert error(old, want) > FAR
    assert error(run(x), want) < NEAR


# The user's module stays the user's --------------------------------------------------------------


@pytest.mark.parametrize("make", [Mlp, Scaled])
def test_deepcopy_of_a_used_module_is_independent(
    make: type[nn.Module], device: str, x: Tensor
) -> None:
    model = seeded(make).to(device)
    run = int8(model)
    old = run(x)
    twin = copy.deepcopy(model)
    run_twin = int8(twin)
    for p in [*twin.parameters(), *twin.buffers()]:
        p.copy_(other(p))
    assert error(run_twin(x), again(twin)(x)) < NEAR
    assert error(run_twin(x), old) > FAR
    assert torch.equal(run(x), old)


def test_state_dict_is_what_it_was(device: str, x: Tensor) -> None:
    model = seeded(Scaled).to(device)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    int8(model)(x)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not any(v.__dict__ for v in after.values())


USERS = """
import torch

class Users(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(64, 64)
        self.register_buffer("scale", torch.linspace(-1, 1, 64))

    def forward(self, x):
        return self.fc(x) * self.scale
"""

ELSEWHERE = """
import sys
sys.modules["graphquant"] = None  # an import would fail
import torch
model = torch.load("model.pt", weights_only=False)
weights = torch.load("weights.pt", weights_only=True)
x, want = torch.load("call.pt", weights_only=True)
assert list(weights) == ["fc.weight", "fc.bias", "scale"], list(weights)
assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.items())
assert type(weights["fc.weight"]) is torch.nn.Parameter
torch.testing.assert_close(model(x), want)
"""


def test_used_module_loads_where_graphquant_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_module.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    from users_module import Users  # type: ignore[import-not-found]

    model, x = Users(), torch.randn(3, 64)
    int8(model)(x)
    assert packed_tensors([model.fc.weight])  # there is something to leave behind
    torch.save(model, tmp_path / "model.pt")
    torch.save(dict([*model.named_parameters(), *model.named_buffers()]), tmp_path / "weights.pt")
    torch.save((x, model(x)), tmp_path / "call.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    copied = int8(torch.load(tmp_path / "model.pt", weights_only=False))  # and here as well
    assert error(copied(x), model(x)) < NEAR


@pytest.mark.parametrize("make", [Mlp, Scaled])
def test_deleted_model_frees_its_weights_and_packs(make: type[nn.Module], x: Tensor) -> None:
    model = seeded(make).to(x.device)
    run = int8(model)
    run(x)
    tensors = [*model.parameters(), *model.buffers()]
    packed = packed_tensors(tensors)
    assert packed
    watched = [weakref.ref(t) for t in [*tensors, *packed]]
    del model, run, tensors, packed
    gc.collect()
    assert [r() for r in watched] == [None] * len(watched)


def tracker_of(root: Tensor) -> Any:
    return root.__dict__["_graphquant_tracker"]


# Nothing outlives what it was made from ---------------------------------------------------------


class Attention(nn.Module):
    """Three stacked linears, packed together from six parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q(x) * self.k(x) + self.v(x)


def int8_bytes() -> int:
    gc.collect()
    packed = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.int8]
    return sum(t.untyped_storage().nbytes() for t in packed)


def test_replaced_parameters_take_their_packs_with_them(device: str, x: Tensor) -> None:
    before = int8_bytes()
    run = int8(model := seeded(Attention).to(device))
    run(x)
    one = int8_bytes() - before
    for seed in range(40):
        linear = (model.k, model.v, model.q)[seed % 3]
        linear.weight = nn.Parameter(other(linear.weight, seed))
        linear.bias = nn.Parameter(other(linear.bias, seed))
        run(x)
    assert 0 < int8_bytes() - before < 2 * one
    assert error(run(x), model(x)) < 2 * NEAR


def test_parameters_in_turn_are_packed_once(device: str, x: Tensor, packings: list[Recipe]) -> None:
    """Both are alive, so both packed weights are."""
    run = int8(model := seeded(Attention).to(device))
    weights = [model.k.weight, nn.Parameter(other(model.k.weight))]
    results = []
    for i in range(6):
        model.k.weight = weights[i % 2]
        results.append(run(x))
    assert len(packings) == 2
    assert error(results[0], results[1]) > FAR
    assert torch.equal(results[0], results[4]) and torch.equal(results[1], results[5])


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_dynamo_reset_frees_all_packs_of_a_living_model(inner: str, device: str, x: Tensor) -> None:
    before = int8_bytes()
    model = seeded(Attention).to(device)
    run = int8(model, inner=inner)
    run(x), run(x[:4])
    assert int8_bytes() > before
    torch._dynamo.reset()
    assert int8_bytes() == before
    assert error(run(x), model(x)) < 2 * NEAR
    del model, run
    torch._dynamo.reset()
    assert int8_bytes() == before


def test_other_recipes_replace_the_former_once_dynamo_forgets_them(device: str, x: Tensor) -> None:
    """As each new calibration does: its statistics are part of the recipe."""
    before = int8_bytes()
    model = seeded(Attention).to(device)
    sizes = []
    for i in range(4):
        torch._dynamo.reset()
        int8(model, weight_scale=("absmax", "mse")[i % 2])(x)
        graphquant.refresh()
        sizes.append(int8_bytes() - before)
    assert sizes[0] > 0 and max(sizes) < 2 * sizes[0]


def test_packs_live_as_long_as_one_graph_that_reads_them() -> None:
    w = nn.Parameter(torch.randn(4, 4))
    one, two = supply_of(Doubled()), supply_of(Doubled())
    packed = weakref.ref(one([w])[0])
    assert two([w])[0] is packed()
    del one
    assert packed() is not None
    del two
    assert packed() is None
    assert packed_tensors([w]) == []


def test_packs_die_with_any_parameter_they_were_made_from() -> None:
    supply = PackedInputs([(Doubled(), (0, 1))], str)
    for dies in (0, 1):
        roots = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
        packed = weakref.ref(supply(roots)[0])
        assert packed() is not None
        del roots[dies]
        assert packed() is None


# PackedInputs, alone ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubled:
    """A recipe that is slow enough for other threads to come in between."""

    log: tuple[list[int], ...] = ()

    def compute(self, roots: Sequence[Tensor]) -> list[Tensor]:
        for calls in self.log:
            calls.append(1)
            time.sleep(0.02)
        return [2 * roots[0].detach()]

    def __hash__(self) -> int:
        return 1


def supply_of(recipe: Doubled) -> PackedInputs:
    return PackedInputs([(recipe, (0,))], lambda i: f"w{i}")


def test_packing_again_keeps_the_address(device: str) -> None:
    """CUDA graphs replay with the addresses they were recorded with."""
    w = nn.Parameter(torch.randn(4, 4, device=device))
    supply = supply_of(Doubled())
    (before,) = supply([w])
    address = before.data_ptr()
    w.copy_(torch.randn(4, 4))
    (after,) = supply([w])
    assert after is before and after.data_ptr() == address
    assert torch.equal(after, 2 * w)


def test_two_supplies_with_one_recipe_share_the_pack() -> None:
    w = nn.Parameter(torch.randn(4, 4))
    one, two = supply_of(Doubled()), supply_of(Doubled())
    assert one([w])[0] is two([w])[0]
    w.add_(1)
    assert torch.equal(two([w])[0], 2 * w)
    assert torch.equal(one([w])[0], 2 * w)


def test_a_guess_is_confirmed_or_not() -> None:
    """What a GPU begins with before it is known whether something has changed in silence."""
    w = nn.Parameter(torch.randn(4, 4))
    supply = supply_of(Doubled())
    assert supply.speculate([w]) is None  # nothing is packed yet
    supply([w])
    guess = supply.speculate([w])
    assert guess is not None and supply.confirm(guess, [w])
    w.data.mul_(3)
    guess = supply.speculate([w])
    assert guess is not None and not supply.confirm(guess, [w])
    assert torch.equal(supply([w])[0], 2 * w)
    assert supply.speculate([w]) is None  # it looks first where things change from call to call
    supply([w])
    assert supply.speculate([w]) is not None
    graphquant.refresh()  # said aloud
    assert supply.speculate([w]) is None


@pytest.mark.parametrize(
    ("function", "twice"),
    [
        (lambda x, s: F.gelu(x) + s, True),
        (lambda x, s: F.scaled_dot_product_attention(x, x, x), True),
        (lambda x, s: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), False),
        (lambda x, s: x + s.add_(1), False),
        (lambda x, s: x + torch.rand_like(x), False),
        (lambda x, s: F.dropout(x), False),
        (lambda x, s: F.batch_norm(x, s.new_zeros(4), s.new_ones(4), training=True), False),
    ],
)
def test_only_a_graph_without_side_effects_runs_before_its_packs_are_known_to_be_fresh(
    function: Any, twice: bool
) -> None:
    x = torch.randn(2, 4, 3, 3)
    graph = make_fx(function, pre_dispatch=True)(x, torch.randn(3)).graph
    assert can_run_twice(graph) is twice


def test_one_supply_serves_many_parameters() -> None:
    supply = supply_of(Doubled())
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    packed = [supply([w])[0] for w in weights]
    assert len({t.data_ptr() for t in packed}) == 3
    assert all(supply([w])[0] is t for w, t in zip(weights, packed, strict=True))


def test_first_packing_from_many_threads_happens_once() -> None:
    calls: list[int] = []
    w = nn.Parameter(torch.randn(4, 4))
    supply = supply_of(Doubled((calls,)))
    barrier = threading.Barrier(8)

    def call(_: int) -> Tensor:
        barrier.wait()
        return supply([w])[0]

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(call, range(8)))
    assert all(t is got[0] for t in got)
    assert len(calls) == 1
    assert torch.equal(got[0], 2 * w)


def test_threads_share_a_compiled_model(device: str, x: Tensor) -> None:
    run = int8(model := seeded(Mlp).to(device))
    want = run(x)
    copy_under_no_grad(model)  # so that the threads also race to pack
    model_want = again(model)(x)
    barrier = threading.Barrier(8)

    def call(_: int) -> list[Tensor]:
        with torch.no_grad():
            barrier.wait()
            return [run(x) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        results = [y for ys in pool.map(call, range(8)) for y in ys]
    assert error(want, model_want) > FAR
    assert all(error(y, model_want) < NEAR for y in results)
    assert all(torch.equal(y, results[0]) for y in results)


FORK = """
import os, threading, torch
from torch import nn
from graphquant.weights.packed import PackedInputs

class Slow:
    def compute(self, roots):
        if threading.current_thread() is not threading.main_thread():
            packing.set()
            forked.wait()
        return [2 * roots[0].detach()]

packing, forked = threading.Event(), threading.Event()
w, supply = nn.Parameter(torch.ones(4)), PackedInputs([(Slow(), (0,))], str)
thread = threading.Thread(target=supply, args=([w],))
thread.start()
packing.wait()
child = os.fork()
if not child:
    os._exit(0 if supply([w])[0].tolist() == [2] * 4 else 3)
_, status = os.waitpid(child, 0)
forked.set()
thread.join()
assert supply([w])[0].tolist() == [2] * 4
print("child", os.waitstatus_to_exitcode(status))
"""


def test_a_process_forked_while_another_thread_packs_can_pack() -> None:
    """The child has the lock of a thread that it does not have."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout == "child 0\n", done.stderr


# Values on a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_probe_raises_its_flag_when_a_value_has_changed(dtype: torch.dtype, device: str) -> None:
    """On a CPU its kernels run in Triton's interpreter."""
    tensors = [
        torch.arange(100, device=device).to(dtype),
        torch.randint(-9, 9, (40, 50), device=device).to(dtype).t(),
        torch.randint(-9, 9, (64, 64), device=device).to(dtype),
        torch.tensor(5, device=device).to(dtype),  # CLIP's logit_scale has no dimension
    ]
    where = tensors[0].device
    rows = gpu_probe.read(gpu_probe._table(tensors).to(where)).cpu().numpy()
    seen = [snapshot.TensorState.of(t, row.tobytes()) for t, row in zip(tensors, rows, strict=True)]
    looks = gpu_probe.Probe(tensors, seen, where)

    def raised() -> bool:
        looks.changed()
        if where.type == "cuda":
            torch.cuda.synchronize()
        return looks.raised()

    assert not raised() and not raised()
    for t in tensors[1], tensors[3]:
        looks = gpu_probe.Probe(tensors, seen, where)
        before = t.clone()
        t.fill_(9)
        assert raised() and raised()
        t.copy_(before)
    assert gpu_probe.Probe(tensors, seen, where).changed() is False


def test_a_probe_reads_the_first_bytes_of_its_tensors_values(device: str) -> None:
    x = torch.randn(3, 5, device=device).bfloat16()
    (row,) = gpu_probe.read(gpu_probe._table([x]).to(device))
    assert torch.equal(row[:15].short().view(torch.bfloat16).view(3, 5), x)


@pytest.mark.cuda
def test_a_probe_neither_waits_nor_keeps_parameters_alive(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    run(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        start = time.perf_counter()
        run(x)
        assert time.perf_counter() - start < 0.05
    torch.cuda.synchronize()
    weight = weakref.ref(model.fc1.weight)
    del model, run
    gc.collect()
    assert weight() is None


@pytest.mark.cuda
def test_a_call_that_is_recorded_as_a_cuda_graph_looks_at_nothing(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    for _ in range(3):
        run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    graph.replay()
    assert error(y, model(x)) < NEAR


@pytest.mark.cuda
def test_a_change_that_is_seen_after_the_launch_is_right_in_the_same_call(
    device: str, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU begins with the old packed weights, and again with the new ones."""
    model = seeded(Mlp).to(device).eval()
    run = int8(model)
    for seed in range(4):
        model.fc1.weight.copy_(other(model.fc1.weight, seed))
        for _ in range(seed + 1):
            assert error(run(x), again(model)(x)) < NEAR
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
