"""Dynamic, static and clipped activations, and both weight scales, in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from graphquant import OptionError, Report
from tests.seen import Seen, seen
from tests.small import FAR, NEAR, Mlp, error, int8, notes, seeded

DIM, TOKENS = 64, (2, 9)


class Layer(nn.Module):
    """Pre-norm attention and a gated MLP: every kind of quantizer but the one of post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.RMSNorm(DIM, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.fc1, self.gate, self.fc2 = nn.Linear(DIM, 96), nn.Linear(DIM, 96), nn.Linear(96, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        h = self.norm2(x)
        return x + self.fc2(F.silu(self.gate(h)) * self.fc1(h))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


@pytest.fixture
def encoder() -> nn.Module:
    return seeded(lambda: nn.Sequential(Layer(), Layer(), nn.Linear(DIM, DIM))).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(*TOKENS, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_static_ranges_serve_an_encoder(encoder: nn.Module, x: Tensor, inner: str) -> None:
    """15 linears in two layers and a head; calibrated on the batch itself, nothing is clipped."""
    reports: list[Report] = []
    known = seen(encoder, x)
    run = int8(encoder, reports, inner=inner, activation="static", calibration=known)
    assert error(run(x), encoder(x)) < 2 * NEAR
    (report,) = reports
    assert report.coverage == 1.0 and len(report.linears) == 15 and not notes(report)
    torch._dynamo.reset()
    assert not torch.equal(run(x), int8(encoder, inner=inner)(x))


def test_every_int8_linear_reads_its_own_range(encoder: nn.Module, x: Tensor) -> None:
    """If the calibration has seen a quarter of it the rest is cut off; but q, k and v read one
    value, and fc1 and gate: there the ranges of the others say how wide it is."""
    known = seen(encoder, x)
    whole = int8(encoder, activation="static", calibration=known)(x)
    for path in known.ranges:
        half = Seen({**known.ranges, path: tuple(end / 4 for end in known.ranges[path])})  # type: ignore[dict-item]
        torch._dynamo.reset()
        run = int8(encoder, activation="static", calibration=half)
        got = run(x)
        if path.split(".")[-1] in ("q", "k", "v", "fc1", "gate"):
            assert torch.equal(got, whole), path
        else:
            assert error(got, encoder(x)) > 2 * error(whole, encoder(x)), path


def test_explain_says_what_stays_dynamic(encoder: nn.Module, x: Tensor) -> None:
    known = seen(encoder, x)
    del known.ranges["1.out"], known.ranges["2"]
    options = {"activation": "static", "calibration": known}
    (note,) = notes(graphquant.explain(encoder, x, options=options))
    assert note.startswith("2 of 15 int8 linears stay dynamic") and note.endswith(": 1.out, 2")
    assert not notes(graphquant.explain(encoder, x))


def test_static_without_a_calibration_is_refused(encoder: nn.Module, x: Tensor) -> None:
    with pytest.raises(OptionError, match="takes its ranges from calibration data"):
        graphquant.explain(encoder, x, options={"activation": "static"})


def clipped(model: nn.Module, x: Tensor, clip: float) -> Tensor:
    """The float model, each of whose linears reads clamp(x, -clip, clip)."""
    hooks = [
        m.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(-clip, clip),))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    y: Tensor = model(x)
    for hook in hooks:
        hook.remove()
    return y


def test_a_clip_is_what_clamping_in_front_of_every_linear_is(encoder: nn.Module, x: Tensor) -> None:
    got = int8(encoder, clip_range=0.8)(x)
    assert error(got, clipped(encoder, x, 0.8)) < 2 * NEAR
    assert error(got, encoder(x)) > FAR / 2


def test_a_clip_that_nothing_reaches_changes_nothing(encoder: nn.Module, x: Tensor) -> None:
    want = int8(encoder)(x)
    torch._dynamo.reset()
    assert torch.equal(int8(encoder, clip_range=1e4)(x), want)


def test_a_clip_bounds_what_a_massive_token_does(x: Tensor) -> None:
    """Its own quantization: one channel of 3000 makes steps of 24, and the rest of it is lost."""
    model = seeded(lambda: nn.Linear(DIM, DIM)).eval()
    x[0, 4, 7] = 3000.0
    want = clipped(model, x, 4.0)[0, 4]
    got = int8(model, clip_range=4.0)(x)[0, 4]
    assert error(got, want) < NEAR
    rest = torch.arange(DIM) != 7
    plain = x.clone()
    plain[0, 4, 7] = 0.0
    torch._dynamo.reset()
    lost = int8(model)(x)[0, 4] - 3000.0 * model.weight[:, 7] - model.bias  # what the rest became
    kept = (plain[0, 4, rest] @ model.weight[:, rest].T).double()
    assert error(lost, kept) > FAR


def test_mse_weights_are_nearer(x: Tensor) -> None:
    """Rows of x that are unit vectors are exact in int8, so the result is the packed weight, and
    its error the weight's alone."""
    model = seeded(lambda: nn.Linear(DIM, 300, bias=False)).eval()
    eye = torch.eye(DIM)
    of = {}
    for scale in ("absmax", "mse"):
        torch._dynamo.reset()
        of[scale] = error(int8(model, weight_scale=scale)(eye), model.weight.T)
    assert 0.8 * of["absmax"] < of["mse"] < 0.97 * of["absmax"] < NEAR


def massive() -> tuple[nn.Module, Tensor, Tensor]:
    """(an MLP that norms nothing, tokens, the same with token 4 of the first row 300 times as
    large): a trained encoder has such tokens in the stream that its MLPs read."""
    model = seeded(Mlp).eval()
    model.norm = nn.Identity()
    calm = torch.randn(*TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    wild = calm.clone()
    wild[0, 4] *= 300.0
    return model, calm, wild


OTHERS = torch.ones(TOKENS, dtype=torch.bool)
OTHERS[0, 4] = False


def test_a_massive_token_does_no_harm_to_others_whose_scales_are_their_own() -> None:
    model, calm, wild = massive()
    run = int8(model)
    assert torch.equal(run(wild)[OTHERS], run(calm)[OTHERS])
    assert error(run(wild)[OTHERS], model(wild)[OTHERS]) < NEAR  # 0.9 %
    assert error(run(wild)[~OTHERS], model(wild)[~OTHERS]) < NEAR


def test_a_massive_token_ruins_the_others_under_a_static_range_that_holds_it() -> None:
    """A range of some 1900 has steps of 7: what the others hold, of size 1, becomes the one step
    that is nearest to zero."""
    model, _, wild = massive()
    static = int8(model, activation="static", calibration=seen(model, wild))
    harm = error(static(wild)[OTHERS], model(wild)[OTHERS])
    torch._dynamo.reset()
    dynamic = error(int8(model)(wild)[OTHERS], model(wild)[OTHERS])
    assert harm > 1.0 and harm > 100 * dynamic  # 290 % and 0.9 %


def test_a_massive_token_is_lost_under_a_static_range_that_does_not_hold_it() -> None:
    """The others are as near as they are without it."""
    model, calm, wild = massive()
    static = int8(model, activation="static", calibration=seen(model, calm))
    got, want = static(wild), model(wild)
    assert torch.equal(got[OTHERS], static(calm)[OTHERS])
    assert error(got[OTHERS], want[OTHERS]) < NEAR  # 1.1 %
    assert error(got[~OTHERS], want[~OTHERS]) > 0.9  # 99.5 %
