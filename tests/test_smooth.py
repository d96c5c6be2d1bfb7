"""SmoothQuant in a compiled model: outliers are undone, and s follows the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant import Report, compare
from graphquant.weights.released import is_released
from tests.seen import seen
from tests.small import FAR, NEAR, Mlp, again, error, int8, seeded

WIDTH, HEADS = 64, 4


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer(nn.Module):
    """Attention and an MLP, with the norms in front of them or behind."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.post = post
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, h: Tensor) -> Tensor:
        q, k, v = (
            f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def encoder(post: bool = False) -> nn.Sequential:
    return nn.Sequential(*(Layer(post) for _ in range(3)), nn.Linear(WIDTH, WIDTH)).eval()


def outliers(model: nn.Sequential) -> nn.Sequential:
    """The same function with one channel in 64 scaled by 30 to 100 where a norm or the values write
    it, and the columns of the linears that read it inversely."""

    def channel() -> tuple[int, float]:
        return int(torch.randint(WIDTH, ())), float(torch.empty(()).uniform_(30, 100))

    moved = copy.deepcopy(model)
    for layer in moved[:-1]:
        norms = [(layer.norm1, (layer.q, layer.k, layer.v)), (layer.norm2, (layer.up,))]
        for norm, readers in () if layer.post else norms:  # else the residual would be scaled too
            k, f = channel()
            for parameter in (norm.weight, norm.bias):
                parameter[k] *= f
            for reader in readers:
                reader.weight[:, k] /= f
        k, f = channel()
        layer.v.weight[k] *= f
        layer.v.bias[k] *= f
        layer.out.weight[:, k] /= f
    return moved


CALIBRATED: dict[str, Callable[[nn.Module, Tensor], dict[str, Any]]] = {
    "alpha": lambda model, x: {"smooth": 0.5, "calibration": seen(model, x)},
    "auto": lambda model, x: {"smooth": "auto", "calibration": seen(model, x, rows=True)},
}


@pytest.mark.parametrize(
    ("post", "name"),
    [
        pytest.param(False, "alpha", id="pre-norm-alpha"),
        pytest.param(True, "auto", id="post-norm-auto"),
        pytest.param(False, "auto", id="pre-norm-auto", marks=pytest.mark.slow),
        pytest.param(True, "alpha", id="post-norm-alpha", marks=pytest.mark.slow),
    ],
)
def test_outliers_that_ruin_int8_are_undone(name: str, post: bool, device: str) -> None:
    model = seeded(lambda: encoder(post)).to(device)
    moved = seeded(lambda: outliers(model))
    data, x = seeded(lambda: torch.randn(2, 16, 32, WIDTH)).to(device)
    assert error(moved(x), model(x)) < 1e-5

    def local(m: nn.Module, **options: Any) -> dict[str, float]:
        return {s.path: s.local.sqnr for s in compare(m, [x], options=options).sites}

    untouched, ruined = local(model), local(moved)
    smoothed = local(moved, **CALIBRATED[name](moved, data))
    assert len(untouched) == 19
    hit = [p for p, db in ruined.items() if db < untouched[p] - 6]
    assert len(hit) >= (3 if post else 15), "the outliers do no harm"
    for path, db in untouched.items():
        one_channel = path.endswith(".v")  # has all of the energy now: chance has a larger part
        assert smoothed[path] > db - (1.5 if one_channel else 1), path


def test_outliers_of_norms_are_undone_without_data(device: str) -> None:
    model = seeded(encoder).to(device)
    moved = seeded(lambda: outliers(model))
    x = seeded(lambda: torch.randn(16, 32, WIDTH)).to(device)
    untouched, ruined, smoothed = (
        {s.path: s.local.sqnr for s in compare(m, [x], options=options).sites}
        for m, options in ((model, {}), (moved, {}), (moved, {"smooth": "norm"}))
    )
    behind_norms = [p for p in untouched if p.endswith((".q", ".k", ".v", ".up"))]
    assert len(behind_norms) == 12
    for path in behind_norms:
        assert ruined[path] < untouched[path] - 6
        assert smoothed[path] > untouched[path] - (1.5 if path.endswith(".v") else 1)


def smoothing_options(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Options that move a lot: statistics of other values than the model reads."""
    f = seeded(lambda: torch.randn(x.shape[-1]).exp(), 3).to(x.device)
    return {"smooth": 0.5, "calibration": seen(model, x * f)}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_compiled_model_is_near(inner: str, device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    reports: list[Report] = []
    run = int8(model, reports, inner=inner, **smoothing_options(model, x))
    assert error(run(x), model(x)) < NEAR
    assert [o.smoothed for r in reports for o in r.linears] == ["alpha 0.5"] * 2
    assert error(run(x), int8(seeded(Mlp).to(device))(x)) > 0, "nothing was smoothed"


CHANGES: dict[str, Callable[[Mlp], object]] = {
    "weight": lambda m: m.fc1.weight.mul_(torch.linspace(0.1, 9, 64, device=m.fc1.weight.device)),
    "gamma": lambda m: m.norm.weight.mul_(torch.linspace(-5, 5, 64, device=m.fc1.weight.device)),
    "beta": lambda m: m.norm.bias.add_(torch.linspace(-5, 5, 64, device=m.fc1.weight.device)),
    "data": lambda m: setattr(m.norm.weight, "data", m.norm.weight.flip(0) * 3 + 1),
    "replaced": lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight * 3 - 1)),
    "loaded": lambda m: m.load_state_dict(seeded(Mlp, 7).state_dict()),
}


@pytest.mark.parametrize("smooth", ["alpha", "norm"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_packed_follows_the_weights(name: str, smooth: str, device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    options = smoothing_options(model, x) if smooth == "alpha" else {"smooth": "norm"}
    run = int8(model, **options)
    before = run(x)
    CHANGES[name](model)
    after = run(x)
    assert error(after, before) > FAR
    torch._dynamo.reset()
    assert torch.equal(after, int8(again(model), **options)(x))


def test_instances_that_share_a_graph_have_their_own_scale(device: str, x: Tensor) -> None:
    first, second = (seeded(Mlp, seed).to(device) for seed in (0, 1))
    options, reports = smoothing_options(first, x), list[Report]()
    alone = []
    for model in (first, second):
        torch._dynamo.reset()
        alone.append(int8(again(model), **options)(x))
    torch._dynamo.reset()
    for model in (first, second):
        model.compile(
            backend="graphquant",
            options={"inner": "eager", "on_report": reports.append, **options},
        )
    assert all(torch.equal(m(x), want) for m, want in zip((first, second), alone, strict=True))


def test_released_weights_are_found_again_by_the_next_graph(device: str, x: Tensor) -> None:
    """Another batch size is compiled anew, with the statistics asked for anew."""
    with torch.inference_mode():
        with torch.inference_mode(False):
            model, twin = seeded(Mlp).to(device), seeded(Mlp).to(device)
        options = smoothing_options(twin, x)
        want = [int8(twin, **options)(v) for v in (x, x[:3])]
        torch._dynamo.reset()
        reports: list[Report] = []
        run = int8(model, reports, free_weights=True, **options)
        got = [run(v) for v in (x, x[:3], x)]
        assert len(reports) == 2
    assert all(torch.equal(g, w) for g, w in zip(got, (*want, want[0]), strict=True))
    assert is_released(model.fc1.weight) and is_released(model.fc2.weight)
    assert not is_released(model.fc1.bias)


def test_the_model_keeps_its_state(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    before = copy.deepcopy(model.state_dict())
    int8(model, **smoothing_options(model, x))(x)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_one_compilation_serves_every_batch(device: str, x: Tensor) -> None:
    model = seeded(Mlp).to(device)
    options, reports = smoothing_options(model, x), list[Report]()
    run = torch.compile(
        model,
        backend="graphquant",
        dynamic=True,
        options={"inner": "eager", "on_report": reports.append, **options},
    )
    for rows in (8, 5, 2):
        batch = x[:rows].clone()
        assert error(run(batch), model(batch)) < NEAR
    assert len(reports) == 1


def test_trainable_parts_keep_their_gradients(device: str, x: Tensor) -> None:
    """The frozen part is smoothed."""
    model = seeded(Mlp).to(device)
    for p in (*model.norm.parameters(), *model.fc1.parameters()):
        p.requires_grad_(False)
    options, reports = smoothing_options(model, x), list[Report]()
    with torch.enable_grad():
        int8(model, reports, **options)(x).square().sum().backward()
    fc1, fc2 = (o for r in reports for o in r.linears)
    assert (fc1.smoothed, fc2.smoothed) == ("alpha 0.5", "") and not fc2.int8
    assert model.fc2.weight.grad is not None and model.fc1.weight.grad is None
