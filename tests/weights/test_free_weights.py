"""free_weights=True gives the float weights' memory back, and never a wrong number for it."""

from __future__ import annotations

import gc
import io
import logging
import pickle
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.multiprocessing.reductions import StorageWeakRef

from graphquant import ReleasedWeightError, Report, optimize_, restore_
from graphquant.passes.prepack import Recipe
from graphquant.weights.packed import PackedInputs
from graphquant.weights.released import (
    _in_host_memory,
    in_host_memory,
    is_in_host_memory,
    is_released,
    without_memory,
)
from tests.small import FAR, NEAR, Mlp, again, error, int8, seeded
from tools.bench.models import MODELS, build, inputs
from tools.bench.variants import Prepared, weight_bytes


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


def normal(make: type[nn.Module], device: str, seed: int = 0) -> nn.Module:
    """A module whose parameters are ordinary tensors."""
    with torch.inference_mode(False):
        module: nn.Module = seeded(make, seed).to(device)
    return module


def kept(model: nn.Module) -> list[str]:
    """The parameters that still have values."""
    return [n for n, p in model.named_parameters() if not is_released(p)]


def test_output_is_the_same(device: str, x: Tensor) -> None:
    plain, freed = normal(Mlp, device), normal(Mlp, device)
    want = int8(plain)(x)
    run = int8(freed, free_weights=True)
    assert torch.equal(run(x), want)
    assert torch.equal(run(x), want)


def test_weights_that_only_int8_linears_read_are_released(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model, free_weights=True)(x)
    assert model.fc1.weight.untyped_storage().nbytes() == 0
    assert model.fc2.weight.untyped_storage().nbytes() == 0
    assert kept(model) == ["norm.weight", "norm.bias", "fc1.bias", "fc2.bias"]


class SlicedProjection(nn.Module):
    """Queries from one value, keys and values from another, by parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.in_proj_weight = nn.Parameter(torch.randn(192, 64) / 8)
        self.in_proj_bias = nn.Parameter(torch.randn(192))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.in_proj_weight, self.in_proj_bias
        q = nn.functional.linear(x, w[:64], b[:64])
        kv = nn.functional.linear(self.norm(x), w[64:], b[64:])
        return q + kv[:, :64] * kv[:, 64:]


def test_a_parameter_that_is_read_in_slices_is_released_and_its_slices_are_not(
    device: str, x: Tensor
) -> None:
    plain, freed = normal(SlicedProjection, device), normal(SlicedProjection, device)
    want = int8(plain)(x)
    run = int8(freed, free_weights=True)
    assert torch.equal(run(x), want)
    assert kept(freed) == ["norm.weight", "norm.bias"]
    assert torch.equal(run(x), want)


def test_nothing_is_released_by_default(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model)(x)
    assert kept(model) == [n for n, _ in model.named_parameters()]


def test_refused_linears_keep_their_weights(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model, free_weights=True, exclude="fc1")(x)
    assert is_released(model.fc2.weight)
    assert not is_released(model.fc1.weight)


def test_weights_that_need_a_gradient_are_kept(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    with torch.inference_mode(False):
        int8(model, free_weights=True)(x.clone())
    assert kept(model) == [n for n, _ in model.named_parameters()]


class LanguageModel(nn.Module):
    """The output projection is the embedding table."""

    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.split = split
        self.emb = nn.Embedding(50, 64)
        self.norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.fc(self.norm(self.emb(ids)))
        if self.split:
            torch._dynamo.graph_break()
        return self.head(y)


class SplitLanguageModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__(split=True)


class AliasedLanguageModel(LanguageModel):
    """Tied by memory: two parameters on one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.emb.weight.detach())


@pytest.mark.parametrize("make", [LanguageModel, SplitLanguageModel, AliasedLanguageModel])
def test_tied_embedding_is_kept(make: type[nn.Module], device: str) -> None:
    """Also if the graph that reads it in float is not the one that packs it."""
    model = normal(make, device)
    ids = torch.arange(50, device=device)
    want = again(model)(ids)
    reports: list[Report] = []
    run = int8(model, reports, free_weights=True)
    for _ in range(2):
        assert error(run(ids), want) < NEAR
    assert all(o.int8 for r in reports for o in r.linears)
    assert is_released(model.fc.weight)
    assert not is_released(model.emb.weight)


def test_every_module_that_a_graph_serves_is_released(device: str, x: Tensor) -> None:
    blocks = [normal(Mlp, device, i) for i in range(3)]
    want = [again(b)(x) for b in blocks]
    for block in blocks:
        block.compile(backend="graphquant", options={"inner": "eager", "free_weights": True})
    for _ in range(2):
        for block, right in zip(blocks, want, strict=True):
            assert error(block(x), right) < NEAR
    assert all(is_released(b.fc1.weight) and is_released(b.fc2.weight) for b in blocks)


def test_second_instance_keeps_its_tied_embedding_too(device: str) -> None:
    ids = torch.arange(50, device=device)
    for seed in range(2):
        model = normal(SplitLanguageModel, device, seed)
        want = again(model)(ids)
        run = int8(model, free_weights=True)
        for _ in range(2):
            assert error(run(ids), want) < NEAR
        assert is_released(model.fc.weight)
        assert not is_released(model.emb.weight)


def test_another_batch_reuses_the_pack(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    want = again(model)
    reports: list[Report] = []
    run = int8(model, reports, free_weights=True)
    for size in (8, 3, 5):
        assert error(run(x[:size]), want(x[:size])) < NEAR
    assert len(reports) > 1


def test_part_of_a_larger_storage_is_kept(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    with torch.inference_mode(False):
        flat = torch.randn(2 * 96 * 64, device=device) / 8
        model.fc1.weight.data = flat[96 * 64 :].view(96, 64)
    before = flat.clone()
    int8(model, free_weights=True)(x)
    assert torch.equal(flat, before)
    assert is_released(model.fc2.weight)


def test_float_use_in_a_later_graph_names_the_parameter(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model, free_weights=True)(x)
    read = int8(lambda x: x @ model.fc1.weight.mT.sin())
    with pytest.raises(BackendCompilerFailed, match=r"fc1\.weight.*free_weights.*float") as seen:
        read(x)
    assert isinstance(seen.value.inner_exception, ReleasedWeightError)


def test_float_use_by_another_set_of_options_names_the_parameter(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model, free_weights=True)(x)
    torch._dynamo.reset()
    message = r"fc1\.weight was released by free_weights=True, but is read in float by linear"
    with pytest.raises(BackendCompilerFailed, match=message):
        int8(model, exclude="fc1")(x)


def test_graph_that_reads_floats_refuses_a_released_module(device: str, x: Tensor) -> None:
    """It was compiled for another module, so that only the call can tell."""
    first, second = normal(Mlp, device, 0), normal(Mlp, device, 1)
    options = {"free_weights": True, "exclude": "fc1"}
    int8(first, **options)(x)
    int8(second, free_weights=True)(x)
    with pytest.raises(ReleasedWeightError, match=r"fc1\.weight"):
        int8(second, **options)(x)


def test_combination_that_was_never_packed_is_refused(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    int8(model, free_weights=True)(x)
    with torch.inference_mode(False):
        scale = nn.Parameter(torch.ones(64, device=device))
    scaled = int8(lambda x: model(x) * scale)
    message = r"fc2\.weight: free_weights=True released the float values, .* never packed"
    with pytest.raises(BackendCompilerFailed, match=message):
        scaled(x)


def test_new_weights_after_the_release_are_used(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    run = int8(model, free_weights=True)
    old = run(x)
    with torch.inference_mode(False):
        new = seeded(Mlp, 1).to(device)
        model.load_state_dict(new.state_dict(), assign=True)
        want = new(x.clone())
    assert error(old, want) > FAR
    for _ in range(2):
        assert error(run(x), want) < NEAR


def test_bias_that_stays_float_may_change(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    twin = again(model)
    run = int8(model, free_weights=True)
    old = run(x)
    for m in (model, twin):
        m.fc2.bias.add_(3)
    want = twin(x)
    assert error(old, want) > FAR
    assert error(run(x), want) < NEAR


class SharedScale(nn.Module):
    """A layer scale that is packed with a weight and also read in float."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale + self.scale


def test_change_that_a_released_weight_would_have_to_follow_raises(device: str, x: Tensor) -> None:
    model = normal(SharedScale, device)
    run = int8(model, free_weights=True)
    run(x)
    assert is_released(model.fc.weight) and not is_released(model.scale)
    model.scale.mul_(2)
    with pytest.raises(ReleasedWeightError, match=r"scale.*has changed.*released fc\.weight"):
        run(x)


# Whose weights are released -----------------------------------------------------------------------


def test_argument_that_is_a_parameter_is_kept(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    with torch.inference_mode(False):
        w = nn.Parameter(seeded(lambda: torch.randn(64, 64)).to(device))
        before = w.detach().clone()
    int8(lambda x, w: nn.functional.linear(model(x), w), free_weights=True)(x, w)
    assert torch.equal(w, before)
    assert is_released(model.fc1.weight) and is_released(model.fc2.weight)


def test_argument_that_is_marked_static_is_kept(device: str, x: Tensor) -> None:
    with torch.inference_mode(False):
        w = seeded(lambda: torch.randn(64, 64)).to(device)
    before = w.clone()
    torch._dynamo.mark_static_address(w)
    int8(lambda x, w: nn.functional.linear(x, w), free_weights=True)(x, w)
    assert torch.equal(w, before)


def test_arguments_in_a_container_are_kept(device: str, x: Tensor) -> None:
    """As torch.func.functional_call gives a module its parameters."""
    model = normal(Mlp, device)
    with torch.inference_mode(False):
        given = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    run = int8(lambda x, p: torch.func.functional_call(model, p, (x,)), free_weights=True)
    run(x, given)
    assert not any(map(is_released, given.values()))


def test_parameters_in_a_plain_list_of_the_module_are_kept(device: str, x: Tensor) -> None:
    """No load_state_dict could bring them back."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = [nn.Parameter(torch.randn(64, 64, device=device))]

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weights[0])

    model = normal(Listed, device)
    int8(model, free_weights=True)(x)
    assert not is_released(model.weights[0])


def test_another_name_for_the_same_memory_keeps_it(device: str, x: Tensor) -> None:
    """An argument, a state_dict that was taken before, a second model on the same memory."""
    model = normal(Mlp, device)
    taken = model.state_dict()
    before = {n: t.clone() for n, t in taken.items()}
    int8(lambda x, w: model(x) @ w, free_weights=True)(x, model.fc1.weight.detach().mT[:, :64])
    assert is_released(model.fc1.weight)
    assert all(torch.equal(t, before[n]) for n, t in taken.items())


# When ---------------------------------------------------------------------------------------------


def test_nothing_is_released_if_on_report_raises(device: str, x: Tensor) -> None:
    def refuse(report: Report) -> None:
        raise ValueError("not with me")

    model = normal(Mlp, device)
    with pytest.raises(BackendCompilerFailed, match="not with me"):
        int8(model, free_weights=True, on_report=refuse)(x)
    assert kept(model) == [n for n, _ in model.named_parameters()]


def test_nothing_is_released_if_optimize_s_on_report_raises(device: str, x: Tensor) -> None:
    def refuse(report: Report) -> None:
        raise ValueError("not with me")

    model = normal(Mlp, device)
    optimize_(model, inner="eager", free_weights=True, on_report=refuse)
    with pytest.raises(BackendCompilerFailed, match="not with me"):
        model(x)
    assert kept(model) == [n for n, _ in model.named_parameters()]


def test_nothing_is_released_if_the_first_call_fails(
    device: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> object:
        raise RuntimeError("out of memory")

    model = normal(Mlp, device)
    monkeypatch.setattr("graphquant.backend.compile_graph", lambda *_: broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        int8(model, free_weights=True)(x)
    assert kept(model) == [n for n, _ in model.named_parameters()]


# What a released weight says ----------------------------------------------------------------------

WRITES: dict[str, Callable[[nn.Module], object]] = {
    "data += d": lambda m: m.fc1.weight.data.add_(1.0),
    "data.mul_": lambda m: m.fc1.weight.data.mul_(2.0),
    "copy_": lambda m: m.fc1.weight.copy_(torch.zeros(96, 64)),
    "zero_": lambda m: m.fc1.weight.detach().zero_(),
    "fill_": lambda m: m.fc1.weight.data.fill_(1.0),
    "an element": lambda m: m.fc1.weight.data.__setitem__((0, 0), 1.0),
    "lerp_": lambda m: m.fc1.weight.data.lerp_(torch.zeros_like(m.norm.weight[:64]), 0.5),
    "_foreach_add_": lambda m: torch._foreach_add_([m.fc1.weight.data], 1.0),
    "nn.init": lambda m: nn.init.normal_(m.fc1.weight),
    "load_state_dict": lambda m: m.load_state_dict(Mlp().state_dict()),
    "numpy": lambda m: m.fc1.weight.detach().cpu().numpy(),
    "torch.save of a state_dict": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "torch.save of the old format": lambda m: torch.save(
        m.state_dict(), io.BytesIO(), _use_new_zipfile_serialization=False
    ),
    "torch.save of a module": lambda m: torch.save(m, io.BytesIO()),
    "pickle": pickle.dumps,
    "safetensors": lambda m: safetensors.torch.save(m.state_dict()),
    "the eager module": lambda m: m(torch.ones(2, 64, device=m.norm.weight.device)),
    "torch.export": lambda m: torch.export.export(m, (torch.ones(2, 64),)).module()(
        torch.ones(2, 64)
    ),
    "a row": lambda m: m.fc1.weight[0],
    "its transpose": lambda m: m.fc1.weight.mT.sum(),
    "repr": lambda m: repr(m.fc1.weight),
    "data_ptr": lambda m: m.fc1.weight.data_ptr(),
}


@pytest.fixture(scope="module")
def released(device: str) -> nn.Module:
    torch._dynamo.reset()
    model = normal(Mlp, device)
    with torch.inference_mode():
        int8(model, free_weights=True)(torch.ones(8, 64, device=device))
    return model


@pytest.mark.parametrize("way", WRITES)
def test_use_of_a_released_weight_raises(way: str, released: nn.Module) -> None:
    with torch.inference_mode(False), torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        WRITES[way](released)
    assert is_released(released.fc1.weight)


HAS_MESSAGES = hasattr(torch._C, "_set_storage_data_ptr_access_error_msg")


@pytest.mark.parametrize("read", ["abs", "sum", "double", "clone", "isnan", "cumsum"])
def test_read_of_a_released_weight_finds_no_number(read: str, released: nn.Module) -> None:
    """Some reads get past torch's check in builds for the CPU alone. They must not crash."""
    given = {"cumsum": (0,)}.get(read, ())
    if HAS_MESSAGES:
        with pytest.raises(RuntimeError, match=r"fc1\.weight: free_weights=True released"):
            getattr(released.fc1.weight, read)(*given)
    elif hasattr(torch.UntypedStorage, "_swap_data_ptr_"):
        got = getattr(released.fc1.weight, read)(*given)
        assert got.all() if read == "isnan" else got.isnan().all()


@pytest.mark.skipif(not HAS_MESSAGES, reason="torch's builds for the CPU alone have no messages")
def test_error_of_a_released_weight_names_it_and_the_way_back(released: nn.Module) -> None:
    message = r"fc1\.weight: free_weights=True released .* load_state_dict\(values, assign=True\)"
    with pytest.raises(RuntimeError, match=message):
        released.fc1.weight.data.add_(1.0)


def test_memory_of_a_sentinel_holds_the_largest_weight(device: str) -> None:
    for size in (8, 4, 64):
        t = without_memory(torch.ones(size, size, device=device), "w")
        assert is_released(t) and t.shape == (size, size)
        if not HAS_MESSAGES and hasattr(torch.UntypedStorage, "_swap_data_ptr_"):
            assert t.isnan().all()


def test_values_that_are_assigned_to_data_come_back(device: str, x: Tensor) -> None:
    model = normal(Mlp, device)
    run = int8(model, free_weights=True)
    old = run(x)
    with torch.inference_mode(False):
        new = seeded(Mlp, 1).to(device)
        for p, q in zip(model.parameters(), new.parameters(), strict=True):
            p.data = q.detach().clone()
        want = new(x.clone())
    assert error(old, want) > FAR
    for _ in range(2):
        assert error(run(x), want) < NEAR
    assert is_released(model.fc1.weight)  # again


def test_a_release_by_one_graph_does_not_disturb_another(device: str, x: Tensor) -> None:
    """The other one was compiled to keep the weights, and has packed the same."""
    model = normal(Mlp, device)
    want = again(model)(x)
    keeps = int8(model)
    keeps(x)
    held = model.fc1.weight.detach()  # so that the memory itself lives on
    torch._dynamo.reset()
    int8(model, free_weights=True)(x)
    assert is_released(model.fc1.weight) and not is_released(held)
    assert error(keeps(x), want) < NEAR


# In host memory -----------------------------------------------------------------------------------


@pytest.fixture
def a_host(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A host apart from the device. On the CPU it is other memory of the same."""

    def moved(t: Tensor) -> Tensor | None:
        if is_in_host_memory(t):
            return None
        with torch.inference_mode(t.is_inference()), torch.no_grad():
            copy = t.detach().clone()
        _in_host_memory.add(StorageWeakRef(copy.untyped_storage()))
        return copy

    if device == "cpu":
        monkeypatch.setattr("graphquant.weights.released.in_host_memory", moved)


def in_host(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if is_in_host_memory(p)]


def test_on_the_cpu_weights_are_in_host_memory_already(x: Tensor, device: str) -> None:
    if device == "cpu":
        model = normal(Mlp, device)
        addresses = [p.data_ptr() for p in model.parameters()]
        int8(model, free_weights="host")(x)
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_weights_that_only_int8_linears_read_move_to_host_memory(
    device: str, x: Tensor, a_host: None
) -> None:
    model = normal(Mlp, device)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    want = again(model)(x)
    run = int8(model, free_weights="host")
    for n in (8, 8, 5):
        assert error(run(x[:n]), want[:n]) < NEAR
    assert in_host(model) == ["fc1.weight", "fc2.weight"]
    assert all(p.device.type == device for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_move_packs_nothing_again(
    device: str, x: Tensor, a_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, seen = Recipe.compute, []
    monkeypatch.setattr(Recipe, "compute", lambda s, r: (seen.append(s), compute(s, r))[1])
    run = int8(normal(Mlp, device), free_weights="host")
    for _ in range(3):
        run(x)
    assert len(seen) == 2


def test_module_whose_weights_are_in_host_memory_runs_in_eager_and_is_saved(
    device: str, x: Tensor, a_host: None
) -> None:
    model = normal(Mlp, device)
    want = again(model)(x)
    int8(model, free_weights="host")(x)
    assert error(model(x), want) < 1e-5
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = normal(Mlp, device, 1)
    with torch.inference_mode(False):
        loaded.load_state_dict(torch.load(file))
    assert error(loaded(x), want) < 1e-5


def load(model: nn.Module, new: nn.Module) -> None:
    model.load_state_dict(new.state_dict())


def assign(model: nn.Module, new: nn.Module) -> None:
    model.load_state_dict(new.state_dict(), assign=True)


def optimizer_step(model: nn.Module, new: nn.Module) -> None:
    for p, q in zip(model.parameters(), new.parameters(), strict=True):
        p.grad = (p - q).detach()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def new_data(model: nn.Module, new: nn.Module) -> None:
    for p, q in zip(model.parameters(), new.parameters(), strict=True):
        p.data = q.detach().clone()


@pytest.mark.parametrize("update", [load, assign, optimizer_step, new_data])
def test_packs_follow_weights_in_host_memory(
    update: Callable[[nn.Module, nn.Module], None], device: str, x: Tensor, a_host: None
) -> None:
    model, new = normal(Mlp, device), normal(Mlp, device, 1)
    run = int8(model, free_weights="host")
    old = run(x)
    with torch.inference_mode(False), torch.no_grad():
        update(model, new)
    want = again(new)(x)
    assert error(old, want) > FAR
    for _ in range(2):
        assert error(run(x), want) < NEAR
    assert in_host(model) == ["fc1.weight", "fc2.weight"]


def test_tied_embedding_stays_on_the_device(device: str, a_host: None) -> None:
    model = normal(SplitLanguageModel, device)
    ids = torch.arange(50, device=device)
    want = again(model)(ids)
    run = int8(model, free_weights="host")
    for _ in range(2):
        assert error(run(ids), want) < NEAR
    assert in_host(model) == ["fc.weight"]


def test_restore_brings_weights_back_to_the_device(device: str, x: Tensor, a_host: None) -> None:
    model = normal(Mlp, device)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimize_(model, inner="eager", free_weights="host")
    model(x)
    assert in_host(model) == ["fc1.weight", "fc2.weight"]
    restore_(model)
    assert in_host(model) == []
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_host_memory_is_addressed_by_the_device(dtype: torch.dtype, device: str) -> None:
    for t in (torch.randn(33, 65, device=device), torch.randn(65, 33, device=device).mT):
        t = t.to(dtype)
        moved = in_host_memory(t)
        assert moved is not None and moved.device == t.device and moved.stride() == t.stride()
        assert torch.equal(moved, t)
        moved.add_(1)
        assert torch.equal(moved.cpu(), t.cpu() + 1)
        assert torch.equal(moved @ moved.mT, (t + 1) @ (t + 1).mT)


@pytest.mark.cuda
def test_device_holds_half_of_a_block_s_bytes(device: str) -> None:
    """Int8 and two float32 of each output channel, of bfloat16: 0.502 at this width."""

    class Wide(Mlp):
        def __init__(self) -> None:
            super().__init__(2048, 8192)

    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    with torch.inference_mode(False):
        model = seeded(Wide).to(device, torch.bfloat16)
    x = torch.randn(8, 2048, device=device, dtype=torch.bfloat16)
    weights = torch.cuda.memory_allocated() - start
    run = int8(model, free_weights="host", select="always")
    run(x)
    gc.collect()
    assert (torch.cuda.memory_allocated() - start) / weights <= 0.53
    assert in_host(model) == ["fc1.weight", "fc2.weight"]


def test_bytes_freed_are_logged(device: str, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Wide(Mlp):
        def __init__(self) -> None:
            super().__init__(64, 1024)

    with caplog.at_level(logging.INFO, logger="graphquant.backend"):
        int8(normal(Wide, device), free_weights=True)(x)
    assert "free_weights released 0.5 MiB of float weights" in caplog.text


def test_release_before_any_job_is_nothing() -> None:
    assert PackedInputs([], str).release([]) == 0


@pytest.mark.slow
def test_a_published_encoder_keeps_half_of_its_bytes() -> None:
    """SigLIP-so400m: int8 and two float32 for each output channel; patches and positions stay."""
    with torch.inference_mode(False):
        model = build(MODELS["siglip-so400m"], "cpu")
    before = weight_bytes(Prepared(model, model, []))
    reports: list[Report] = []
    run = int8(model, reports, free_weights=True)
    run(**inputs(MODELS["siglip-so400m"], 1, "cpu"))
    assert weight_bytes(Prepared(run, model, reports)) <= 0.52 * before
