"""A linear whose result can need a gradient stays float; all others run in int8.

Without this, training would lose gradients in silence: int8 ops have no backward. Where nothing is
int8, losses and gradients must be eager's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphquant import Report
from graphquant.passes.eligibility import NEEDS_GRADIENT
from tests import zoo
from tests.small import FAR, NEAR, Mlp, again, error, int8, notes, seeded


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.enable_grad():
        yield


def step(run: Callable[..., Tensor], model: nn.Module, *args: Tensor) -> tuple[Tensor, dict]:
    """(loss, {parameter: its gradient or None}) of one backward pass."""
    model.zero_grad()
    loss = run(*args).float().square().mean()
    loss.backward()
    return loss.detach(), {
        n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }


def check_same_gradients(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, right in want.items():
        if right is None:
            assert got[name] is None, name
        else:
            assert got[name] is not None, f"{name} lost its gradient"
            torch.testing.assert_close(got[name], right, rtol=1e-5, atol=1e-7, msg=name)


def int8_paths(reports: list[Report]) -> list[str]:
    return [o.path for r in reports for o in r.linears if o.int8]


def refusals(reports: list[Report]) -> dict[str, str]:
    return {o.path: o.refused for r in reports for o in r.linears if not o.int8}


# Training is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "timm_block", "nn_transformer_encoder_pre"])
def test_training_a_whole_model_is_eager_training(name: str, device: str) -> None:
    entry = zoo.load(name)
    model = entry.build("sdpa").to(device)
    args, kwargs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device), entry.inputs(2)
    )

    def first(run: Callable[..., object]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = run(*args, **kwargs)
            return out if isinstance(out, Tensor) else out[0]

        return call

    reports: list[Report] = []
    loss, got = step(first(int8(model, reports)), model)
    right, want = step(first(model), model)
    assert set(refusals(reports).values()) == {NEEDS_GRADIENT}
    assert int8_paths(reports) == []
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    check_same_gradients(got, want)


def test_several_steps_of_training_stay_eager_training(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    twin = again(model)
    for m, run in ((model, int8(model)), (twin, twin)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            (run(x) - x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_training_then_evaluating_uses_the_trained_weights(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    run = int8(model)
    with torch.no_grad():
        before = run(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (run(x) - 3 * x.flip(0)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        want = again(model)(x)
        assert error(before, want) > FAR
        assert error(run(x), want) < NEAR


def test_report_and_log_say_why_nothing_is_int8(
    device: str, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[Report] = []
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        int8(seeded(Mlp).to(device), reports)(x)
    assert NEEDS_GRADIENT == "its result can need a gradient"
    assert reports[0].reasons() == {NEEDS_GRADIENT: 2}
    assert "torch.inference_mode()" in reports[0].notes[0]
    assert "every linear can need a gradient" in caplog.text


def test_no_warning_if_some_linears_are_int8(
    device: str, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Mlp).to(device)
    model.requires_grad_(False)
    model.fc2.requires_grad_(True)
    reports: list[Report] = []
    with caplog.at_level(logging.WARNING, logger="graphquant"):
        int8(model, reports)(x)
    assert notes(reports[0]) == ()
    assert not [r for r in caplog.records if r.name.startswith("graphquant")]


# Frozen parts are int8 ---------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Mlp()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_frozen_backbone_is_int8_and_the_head_trains(device: str, x: Tensor) -> None:
    model = seeded(Classifier).to(device)
    model.backbone.requires_grad_(False)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert int8_paths(reports) == ["backbone.fc1", "backbone.fc2"]
    assert refusals(reports) == {"head": NEEDS_GRADIENT}
    # the head's gradient, for the features that it really was given
    with torch.no_grad():
        features = int8(model.backbone)(x)
    assert error(features, model.backbone(x)) < NEAR
    _, want = step(model.head, model.head, features)
    check_same_gradients({n: got[f"head.{n}"] for n in want}, want)
    assert all(g is None for n, g in got.items() if n.startswith("backbone"))


class NoGradBackbone(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


class NoGradMethod(Classifier):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class BrokenNoGrad(Classifier):
    """The graph breaks inside the region without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.backbone.fc1(self.backbone.norm(x))
            torch._dynamo.graph_break()
            y = self.backbone.fc2(F.gelu(y))
        return self.head(y)


@pytest.mark.parametrize("make", [NoGradBackbone, NoGradMethod, BrokenNoGrad])
def test_backbone_under_no_grad_is_int8(make: type[Classifier], device: str, x: Tensor) -> None:
    model = seeded(make).to(device)
    reports: list[Report] = []
    loss, got = step(int8(model, reports), model, x)
    assert sorted(int8_paths(reports)) == ["backbone.fc1", "backbone.fc2"]
    assert set(refusals(reports)) == {"head"}
    right, want = step(model, model, x)
    assert error(loss, right) < NEAR
    for name, g in want.items():
        assert (g is None) == (got[name] is None), name
        if g is not None:
            assert error(got[name], g) < NEAR, name


class GradInside(Classifier):
    """A region with gradients inside one without."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.backbone(x)
            with torch.enable_grad():
                return self.head(y)


def test_enable_grad_inside_no_grad_is_seen(device: str, x: Tensor) -> None:
    model = seeded(GradInside).to(device)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert int8_paths(reports) == ["backbone.fc1", "backbone.fc2"]
    assert got["head.weight"] is not None and got["backbone.fc1.weight"] is None


class Detached(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.fc2(self.backbone.fc1(x).detach()))


def test_detached_value_starts_anew(device: str, x: Tensor) -> None:
    """Behind detach() a frozen linear is int8 again; before it, one that trains is not."""
    model = seeded(Detached).to(device)
    model.backbone.fc2 = nn.Linear(96, 64).requires_grad_(False).to(device)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert int8_paths(reports) == ["backbone.fc2"]
    assert got["backbone.fc1.weight"] is None
    assert error(got["head.weight"], step(model, model, x)[1]["head.weight"]) < NEAR


# One trainable thing ----------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen linear beside a trainable low-rank path."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.base = nn.Linear(k, n).requires_grad_(False)
        self.down = nn.Linear(k, 4, bias=False)
        self.up = nn.Linear(4, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoraMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.fc1, self.fc2 = Lora(96, 64), Lora(64, 96)  # type: ignore[assignment]


def test_lora_gradients_are_right(device: str, x: Tensor) -> None:
    """The first base sees no gradient yet and is int8; the second is on the way back and is not."""
    model = seeded(LoraMlp).to(device)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert int8_paths(reports) == ["fc1.base"]
    assert set(refusals(reports)) == {"fc1.down", "fc1.up", "fc2.base", "fc2.down", "fc2.up"}
    _, want = step(model, model, x)
    for name, g in want.items():
        if g is None:
            assert got[name] is None, name
        else:
            assert error(got[name], g) < 2 * NEAR, name  # through an int8 forward


def test_lora_on_the_last_linear_only_gives_eagers_gradients(device: str, x: Tensor) -> None:
    """All int8 linears come before the adapter, whose input is exact if they are excluded."""
    model = seeded(LoraMlp).to(device)
    loss, got = step(int8(model, exclude="fc1.base"), model, x)
    right, want = step(model, model, x)
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    check_same_gradients(got, want)


def test_input_that_requires_grad_keeps_all_float(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device).requires_grad_(False)
    reports: list[Report] = []
    run = int8(model, reports)
    grads = []
    for f in (run, model):
        given = x.clone().requires_grad_()
        f(given).square().sum().backward()
        grads.append(given.grad)
    assert set(refusals(reports)) == {"fc1", "fc2"}
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    run(x)  # the same weights, and an input that needs none
    assert len(reports) == 2 and len(int8_paths(reports[1:])) == 2


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "fc1.bias", "fc1.weight"])
def test_one_trainable_parameter_keeps_all_behind_it_float(
    name: str, device: str, x: Tensor
) -> None:
    model = seeded(Mlp).to(device).requires_grad_(False)
    model.get_parameter(name).requires_grad_(True)
    reports: list[Report] = []
    loss, got = step(int8(model, reports), model, x)
    right, want = step(model, model, x)
    assert set(refusals(reports)) == {"fc1", "fc2"}
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
    check_same_gradients(got, want)


class ScaledResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.fc(x)


def test_trainable_layer_scale_alone_is_not_folded(device: str, x: Tensor) -> None:
    model = seeded(ScaledResidual).to(device)
    model.fc.requires_grad_(False)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert reports[0].counts() == {"linear": 1}
    _, want = step(model, model, x)
    assert error(got["scale"], want["scale"]) < NEAR


def test_frozen_layer_scale_and_residual_are_folded(device: str, x: Tensor) -> None:
    """The other side of the two tests around this one."""
    model = seeded(ScaledResidual).to(device).requires_grad_(False)
    reports: list[Report] = []
    int8(model, reports)(x)
    assert reports[0].counts() == {"linear + layer_scale + residual": 1}


class OnPosition(nn.Module):
    """A residual that is a parameter, behind a frozen linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64).requires_grad_(False)
        self.position = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.position


def test_residual_that_needs_a_gradient_is_not_folded(device: str, x: Tensor) -> None:
    model = seeded(OnPosition).to(device)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert reports[0].counts() == {"linear": 1}
    _, want = step(model, model, x)
    assert error(got["position"], want["position"]) < NEAR


class Prompted(nn.Module):
    """A trainable prompt is written into a slice of a frozen value."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(64, 64).requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(2, 64))
        self.behind = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y[:2] = self.prompt
        return self.behind(y)


class PromptedView(Prompted):
    """The value has another name by then."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x).clone()
        other = y.view(-1, 64)
        y[:2].copy_(self.prompt)
        return self.behind(other)


class PromptedZeros(Prompted):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(8, 64, device=x.device)
        y.narrow(0, 0, 2).add_(self.prompt)
        return self.behind(y)


@pytest.mark.parametrize("make", [Prompted, PromptedView, PromptedZeros])
def test_gradient_that_enters_through_a_slice_is_kept(
    make: type[nn.Module], device: str, x: Tensor
) -> None:
    model = seeded(make).to(device)
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert "behind" in refusals(reports)
    _, want = step(model, model, x)
    assert error(got["prompt"], want["prompt"]) < 1e-5


class Checkpointed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, super().forward(x), use_reentrant=False)


def test_checkpointed_linears_are_left_alone(device: str, x: Tensor) -> None:
    model = seeded(Checkpointed).to(device)
    model.norm.requires_grad_(False)
    model.fc1.requires_grad_(False)
    model.fc2.weight.requires_grad_(False)  # fc2.bias trains
    reports: list[Report] = []
    _, got = step(int8(model, reports), model, x)
    assert sum("higher-order" in o.refused for o in reports[0].linears) == 2
    _, want = step(model, model, x)
    assert error(got["fc2.bias"], want["fc2.bias"]) < NEAR


# Modes -------------------------------------------------------------------------------------------


class Dropping(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(self.drop(x)))


def test_dropout_of_training_mode_is_kept_under_no_grad(device: str, x: Tensor) -> None:
    model = seeded(Dropping).to(device).train()
    reports: list[Report] = []
    run = int8(model, reports)
    with torch.no_grad():
        got, want = (seeded(lambda f=f: f(x), 5) for f in (run, model))
        assert int8_paths(reports) == ["fc1", "fc2"]
        assert torch.equal(got == 0, want == 0)  # the same channels were dropped
        assert 0.3 < float((got == 0).float().mean()) < 0.7
        assert error(got, want) < NEAR
        assert not torch.equal(seeded(lambda: run(x), 6), got)
        model.eval()
        assert error(run(x), model(x)) < NEAR
        assert torch.equal(run(x), run(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_all_is_int8(mode: Callable, device: str, x: Tensor) -> None:
    reports: list[Report] = []
    run = int8(seeded(Mlp).to(device).eval(), reports)
    with mode():
        run(x)
    assert reports[0].coverage == 1.0
    assert notes(reports[0]) == ()


def test_modes_of_one_module_do_not_mix(device: str, x: Tensor) -> None:
    """int8 under no_grad, float with gradients, int8 again: from one compiled module."""
    model = seeded(Mlp).to(device)
    run = int8(model)
    exact = model(x).detach()
    for _ in range(2):
        with torch.no_grad():
            y = run(x)
            assert 1e-4 < error(y, exact) < NEAR
        y = run(x)
        assert y.requires_grad and error(y, exact) < 1e-6
        with torch.inference_mode():
            assert 1e-4 < error(run(x), exact) < NEAR


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_half_frozen_model_trains_through_autograds_compiler(
    inner: str, device: str, x: Tensor
) -> None:
    model = seeded(Classifier).to(device)
    model.backbone.requires_grad_(False)
    _, want = step(int8(model), model, x)
    torch._dynamo.reset()
    reports: list[Report] = []
    _, got = step(int8(model, reports, inner=inner), model, x)
    assert len(int8_paths(reports)) == 2
    check_same_gradients(got, want)
