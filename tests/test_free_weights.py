"""free_weights=True gives the float weights' memory back, and never a wrong number for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from graphquant import ReleasedWeightError, Report
from graphquant.packed import Supply, is_released
from tests.small import FAR, NEAR, Mlp, again, error, int8, seeded
from tools.bench.models import MODELS, build, inputs
from tools.bench.variants import Prepared, weight_bytes


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture
def x(device: str) -> Tensor:
    return seeded(lambda: torch.randn(8, 64)).to(device)


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


def test_eager_call_of_a_released_module_raises(device: str, x: Tensor) -> None:
    """torch's own error, not ours: it must not compute with nothing."""
    model = normal(Mlp, device)
    int8(model, free_weights=True)(x)
    with pytest.raises(RuntimeError, match="storage"):
        model(x)


def test_bytes_freed_are_logged(device: str, x: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Wide(Mlp):
        def __init__(self) -> None:
            super().__init__(64, 1024)

    with caplog.at_level(logging.INFO, logger="graphquant.backend"):
        int8(normal(Wide, device), free_weights=True)(x)
    assert "free_weights released 0.5 MiB of float weights" in caplog.text


def test_release_before_any_job_is_nothing() -> None:
    assert Supply([], str).release([]) == 0


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
