"""Norms and activations are recognized by what they compute, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from graphquant.ir.constants import Constants
from graphquant.passes.normalize import normalize
from graphquant.passes.recognize import Norm, Recognized, recognize
from tests.passes.graphs import (
    Model,
    argument,
    assert_near,
    exported,
    linear_bound,
    parameter,
    rewritten,
)

K = 24
EPS = 1e-3  # large enough to show in float32


def found(model: nn.Module, *args: Any) -> Recognized:
    captured = exported(model.eval(), *args)
    normalize(captured)
    return recognize(captured.gm.graph, Constants(captured.parameters))


def the_norm(forward: Callable[..., Any], x: Tensor, **parts: Any) -> Norm | None:
    norms = found(Model(forward, **parts), x).norms.values()
    assert len(norms) <= 1
    return next(iter(norms), None)


@pytest.fixture
def x() -> Tensor:
    """Rows near 1, as small as eps, and zero: a wrong eps cannot hide."""
    return torch.randn(3, 5, K) * torch.tensor([1.0, 0.03, 0.0]).view(3, 1, 1)


# RMS norm ----------------------------------------------------------------------------------------

SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "x.pow(2)": lambda x: x.pow(2),
    "x ** 2.0": lambda x: x**2.0,
    "x * x": lambda x: x * x,
    "x.square()": lambda x: x.square(),
    "abs from neg": lambda x: (-x) * (-x),
}
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean(-1)": lambda s: s.mean(-1, keepdim=True),
    "mean((2,))": lambda s: s.mean(dim=(2,), keepdim=True),
    "mean(dtype)": lambda s: s.mean(-1, keepdim=True, dtype=torch.float32),
}
ROOTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * rsqrt(v + eps)": lambda x, v: x * torch.rsqrt(v + EPS),
    "rsqrt(eps + v) * x": lambda x, v: torch.rsqrt(EPS + v) * x,
    "x / sqrt(v + eps)": lambda x, v: x / torch.sqrt(v + EPS),
    "x * (1 / sqrt)": lambda x, v: x * (1 / torch.sqrt(v + EPS)),
    "x * sqrt.reciprocal()": lambda x, v: x * (v + EPS).sqrt().reciprocal(),
    "x * pow(-0.5)": lambda x, v: x * (v + EPS).pow(-0.5),
    "x / pow(0.5)": lambda x, v: x / (v + EPS) ** 0.5,
    "x * (v.add(eps)) ** -0.5": lambda x, v: x.mul(v.add(EPS) ** -0.5),
}
GAMMAS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Any]] = {
    "no gamma": (lambda y, g: y, None),
    "gamma * y": (lambda y, g: g * y, "gamma"),
    "y * gamma": (lambda y, g: y * g, "gamma"),
    "(1 + gamma) * y": (lambda y, g: (1 + g) * y, "add_1"),
    "y * (gamma + 1.0)": (lambda y, g: y * (g + 1.0), "add_1"),
    "y * gamma[None, None]": (lambda y, g: y * g[None, None], "unsqueeze_1"),
}


def assert_found_as(
    spelled: Callable[[Any, Tensor], Tensor], x: Tensor, rms: bool, gamma: Any, beta: Any = None
) -> None:
    """Recognized with its own eps and parameters, and right as a fused op."""
    fc = nn.Linear(K, 8)
    parts = {"fc": fc, "gamma": parameter(K), "beta": parameter(K)}
    norm = the_norm(lambda m, x: m.fc(spelled(m, x)), x, **parts)
    assert norm is not None
    assert (norm.eps, norm.rms, norm.x.name) == (EPS, rms, "args_0")
    assert (norm.gamma and norm.gamma.name, norm.beta and norm.beta.name) == (gamma, beta)
    model = Model(lambda m, x: m.fc(spelled(m, x)), **parts)
    result = rewritten(model, x)
    assert result.counts == {"norm_linear": 1}
    assert argument(result.one("norm_quantize"), "eps") == EPS
    rounding = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0
    h = spelled(model, x).float()
    slack = rounding * (h.abs() @ fc.weight.abs().T + 1)
    assert_near(result.got, result.want, linear_bound(h, fc.weight) + slack)


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("mean", MEANS)
def test_an_rms_norm_is_found_however_its_mean_square_is_spelled(
    square: str, mean: str, x: Tensor
) -> None:
    def spelled(m: Any, x: Tensor) -> Tensor:
        return m.gamma * (x * torch.rsqrt(MEANS[mean](SQUARES[square](x)) + EPS))

    assert_found_as(spelled, x, rms=True, gamma="gamma")


@pytest.mark.parametrize("root", ROOTS)
def test_an_rms_norm_is_found_however_its_root_is_spelled(root: str, x: Tensor) -> None:
    def spelled(m: Any, x: Tensor) -> Tensor:
        return m.gamma * ROOTS[root](x, x.pow(2).mean(-1, keepdim=True))

    assert_found_as(spelled, x, rms=True, gamma="gamma")


@pytest.mark.parametrize("name", GAMMAS)
def test_an_rms_norm_is_found_wherever_its_gamma_stands(name: str, x: Tensor) -> None:
    apply, gamma = GAMMAS[name]

    def spelled(m: Any, x: Tensor) -> Tensor:
        return apply(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), m.gamma)

    assert_found_as(spelled, x, rms=True, gamma=gamma)


def test_gamma_may_be_multiplied_in_before_the_root(x: Tensor) -> None:
    def spelled(m: Any, x: Tensor) -> Tensor:
        return (x * m.gamma) / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    assert_found_as(spelled, x, rms=True, gamma="gamma")


def _llama(x: Tensor, g: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return g * h.to(x.dtype)


def _gemma(x: Tensor, g: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + g.float())).type_as(x)


def _t5(x: Tensor, g: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)
    return g * h.to(g.dtype)


@pytest.mark.parametrize("spelled", [_llama, _gemma, _t5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_in_between_do_not_hide_an_rms_norm(
    spelled: Callable[..., Tensor], dtype: torch.dtype, x: Tensor
) -> None:
    fc, gamma = nn.Linear(K, 8).to(dtype), parameter(K).to(dtype)
    x = x.to(dtype)
    model = Model(lambda m, x: m.fc(spelled(x, m.gamma)), fc=fc, gamma=gamma)
    (norm,) = found(model, x).norms.values()
    assert (norm.eps, norm.rms, norm.x.name) == (EPS, True, "args_0")
    result = rewritten(model, x)
    assert result.counts == {"norm_linear": 1}
    h = spelled(x, gamma).float()
    slack = 3 * torch.finfo(dtype).eps * (h.abs() @ fc.weight.float().abs().T + 1)
    assert_near(result.got, result.want, linear_bound(h, fc.weight) + slack)


# Layer norm --------------------------------------------------------------------------------------


def _deviations(x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + EPS)


LAYER_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared deviations": _deviations,
    "var(unbiased=False)": lambda x: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    ),
    "var(correction=0)": lambda x: (
        (x - x.mean(-1, keepdim=True))
        * torch.rsqrt(x.var(dim=-1, correction=0, keepdim=True) + EPS)
    ),
    "E[x^2] - E[x]^2": lambda x: (
        (x - x.mean(-1, keepdim=True))
        * torch.rsqrt(x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square() + EPS)
    ),
    "minus the mean added": lambda x: (
        (-x.mean(-1, keepdim=True) + x) * (x.var(-1, unbiased=False, keepdim=True) + EPS).pow(-0.5)
    ),
}
AFFINE: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any, Any]] = {
    "gamma * y + beta": (lambda m, y: m.gamma * y + m.beta, "gamma", "beta"),
    "beta + y * gamma": (lambda m, y: m.beta + y * m.gamma, "gamma", "beta"),
    "gamma alone": (lambda m, y: y * m.gamma, "gamma", None),
    "beta alone": (lambda m, y: y + m.beta, None, "beta"),
    "neither": (lambda m, y: y, None, None),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_a_layer_norm_is_found_however_it_is_spelled(name: str, x: Tensor) -> None:
    def spelled(m: Any, x: Tensor) -> Tensor:
        return m.gamma * LAYER_NORMS[name](x) + m.beta

    assert_found_as(spelled, x, rms=False, gamma="gamma", beta="beta")


@pytest.mark.parametrize("name", AFFINE)
def test_a_layer_norm_is_found_with_any_affine_part(name: str, x: Tensor) -> None:
    affine, gamma, beta = AFFINE[name]
    assert_found_as(lambda m, x: affine(m, _deviations(x)), x, rms=False, gamma=gamma, beta=beta)


def test_gamma_and_beta_are_not_confused_when_equal_in_shape(x: Tensor) -> None:
    norm = the_norm(lambda m, x: m.a + _deviations(x) * m.b, x, a=parameter(K), b=parameter(K))
    assert norm is not None and norm.gamma is not None and norm.beta is not None
    assert (norm.gamma.name, norm.beta.name) == ("b", "a")


def test_one_parameter_in_two_roles_is_no_norm(x: Tensor) -> None:
    """y * a + a is no norm that the ops know: its one parameter would have two roles."""
    fc, a = nn.Linear(K, 8), parameter(K)
    result = rewritten(Model(lambda m, x: m.fc(_deviations(x) * m.a + m.a), fc=fc, a=a), x)
    assert result.counts == {"linear": 1} and result.refused("norm") == ["read by add"]
    assert_near(result.got, result.want, linear_bound(_deviations(x) * a + a, fc.weight))


# Whole norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.25])
def test_whole_norms_keep_their_eps(eps: float, x: Tensor) -> None:
    layer = the_norm(lambda m, x: m.norm(x), x, norm=nn.LayerNorm(K, eps=eps))
    rms = the_norm(lambda m, x: m.norm(x), x, norm=nn.RMSNorm(K, eps=eps))
    assert layer is not None and rms is not None
    assert (layer.eps, layer.rms) == (rms.eps, not rms.rms) == (eps, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_eps_has_that_of_its_type(dtype: torch.dtype) -> None:
    x = (torch.randn(4, K) * torch.finfo(dtype).eps ** 0.5).to(dtype)  # where eps matters
    norm = the_norm(lambda m, x: m.norm(x), x, norm=nn.RMSNorm(K).to(dtype))
    assert norm is not None and norm.rms
    want = nn.RMSNorm(K).to(dtype)(x).float()
    got = F.rms_norm(x.float(), (K,), eps=norm.eps)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_norm_over_two_dims_is_unusable_for_a_reason(x: Tensor) -> None:
    seen = found(Model(lambda m, x: m.norm(x), norm=nn.LayerNorm((5, K))), x)
    assert not seen.norms
    assert list(seen.unusable.values()) == ["normalizes over 2 dims; int8 scales are per row"]


def test_a_whole_norm_reads_what_stands_before_a_widening_cast(x: Tensor) -> None:
    norm = the_norm(lambda m, x: F.layer_norm(x.float(), (K,)), x.bfloat16())
    assert norm is not None and norm.x.name == "args_0"


@settings(max_examples=settings().max_examples // 3)
@given(
    eps=st.floats(1e-14, 0.0999),
    rms=st.booleans(),
    root=st.sampled_from(["rsqrt", "sqrt"]),
)
def test_any_eps_is_read_off_exactly(eps: float, rms: bool, root: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        d = x if rms else x - x.mean(-1, keepdim=True)
        v = d.square().mean(-1, keepdim=True) + eps
        return d * v.rsqrt() if root == "rsqrt" else d / v.sqrt()

    norm = the_norm(forward, torch.randn(2, K))
    assert norm is not None and (norm.eps, norm.rms) == (eps, rms)


# What only looks like a norm ---------------------------------------------------------------------


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


NOT_NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "std": lambda m, x: (x - _mean(x)) / (x.std(-1, keepdim=True) + 1e-6),
    "unbiased var": lambda m, x: (x - _mean(x)) / (x.var(-1, keepdim=True) + EPS).sqrt(),
    "eps outside the root": lambda m, x: x / (x.square().mean(-1, keepdim=True).sqrt() + EPS),
    "tiny eps outside": lambda m, x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-7),
    "sum": lambda m, x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS),
    "l2": lambda m, x: F.normalize(x, dim=-1),
    "no root": lambda m, x: x / (x.square().mean(-1, keepdim=True) + EPS),
    "mean, not of squares": lambda m, x: x * torch.rsqrt(_mean(x).square() + EPS),
    "over tokens": lambda m, x: x * torch.rsqrt(x.square().mean(-2, keepdim=True) + EPS),
    "over samples": lambda m, x: x * torch.rsqrt(x.square().mean(0, keepdim=True) + EPS),
    "over tokens and channels": lambda m, x: (
        x * torch.rsqrt(x.square().mean((1, 2), keepdim=True) + EPS)
    ),
    "over samples and channels": lambda m, x: (
        x * torch.rsqrt(x.square().mean((0, 2), keepdim=True) + EPS)
    ),
    "over everything": lambda m, x: x * torch.rsqrt(x.square().mean() + EPS),
    "two eps": lambda m, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS + 1e-2),
    "eps in the deviation too": lambda m, x: (
        (x - _mean(x) + 1e-2) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)
    ),
    "rms of deviations, scaled x": lambda m, x: (
        x * torch.rsqrt((x - _mean(x)).square().mean(-1, keepdim=True) + EPS)
    ),
    "a number for each token": lambda m, x: m.tokens * _deviations(x),
    "another activation as gamma": lambda m, x: _deviations(x) * x.sin(),
    "twice as large": lambda m, x: _deviations(x) * 2,
    "a function of it": lambda m, x: _deviations(x.sin()).cos(),
    "rounded in between": lambda m, x: (
        x.to(torch.int32) * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    ),
}
# These hold a layer norm, and are none.
INNER = {
    "a number for each token",
    "another activation as gamma",
    "twice as large",
    "a function of it",
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_a_near_miss_is_not_taken_for_a_norm(name: str) -> None:
    x = 3 * torch.randn(3, 5, K)
    model = Model(
        lambda m, x: m.fc(NOT_NORMS[name](m, x)), fc=nn.Linear(K, 8), tokens=torch.randn(5, 1)
    )
    assert len(found(model, x).norms) == (name in INNER)
    result = rewritten(model, x)
    assert result.counts == {"linear": 1}
    assert_near(result.got, result.want, linear_bound(NOT_NORMS[name](model, x), model.fc.weight))


# Activations -------------------------------------------------------------------------------------

ACTS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": {
        "F.gelu": F.gelu,
        "0.5 x (1 + erf(x / sqrt 2))": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "x 0.5 (1 + erf(x sqrt 0.5))": lambda x: x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5))),
        "x (erf + 1) / 2": lambda x: x * (torch.erf(x / 2**0.5) + 1) / 2,
        "x / 2 + x / 2 erf": lambda x: x / 2 + x / 2 * torch.erf(x * 0.7071067811865476),
        "x Phi": lambda x: x * (0.5 + 0.5 * torch.erf(x / math.sqrt(2.0))),
    },
    "gelu_tanh": {
        "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
        "NewGELU": lambda x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        ),
        "FastGELU": lambda x: (
            0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
        ),
        "x x x": lambda x: (
            x * 0.5 * (torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)) + 1)
        ),
        "2 sigmoid(2 y) - 1": lambda x: (
            x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))
        ),
    },
    "quick_gelu": {
        "x sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
        "sigmoid(x 1.702) x": lambda x: torch.sigmoid(x * 1.702) * x,
        "x / (1 + exp)": lambda x: x / (1 + torch.exp(-1.702 * x)) + 0 * torch.sigmoid(x),
    },
    "silu": {
        "F.silu": F.silu,
        "x sigmoid(x)": lambda x: x * torch.sigmoid(x),
        "sigmoid(x) x": lambda x: x.sigmoid().mul(x),
        "tanh": lambda x: x * 0.5 * (1 + torch.tanh(x / 2)),
    },
    "relu": {"F.relu": F.relu, "x.relu()": lambda x: x.relu()},
    "relu2": {
        "relu(x) ** 2": lambda x: F.relu(x) ** 2,
        "square": lambda x: torch.square(F.relu(x)),
        "relu * relu": lambda x: F.relu(x) * F.relu(x),
        "relu * x": lambda x: F.relu(x) * x,
    },
}


@pytest.mark.parametrize(("act", "name"), [(a, n) for a in ACTS for n in ACTS[a]])
def test_an_activation_is_found_however_it_is_spelled(act: str, name: str) -> None:
    x, fc = 2 * torch.randn(3, 5, K), nn.Linear(K, 8)
    spelled = ACTS[act][name]
    result = rewritten(Model(lambda m, x: m.fc(spelled(x)), fc=fc), x)
    assert result.counts == {"act_linear": 1}
    made = result.one("quantize")
    assert argument(made, "act") == act
    assert argument(made, "x").name == "args_0"
    assert_near(result.got, result.want, linear_bound(spelled(x), fc.weight))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_casts_in_between_do_not_hide_an_activation(act: str) -> None:
    x = torch.randn(3, 5, K).bfloat16()
    for spelled in ACTS[act].values():
        fc = nn.Linear(K, 8).bfloat16()
        model = Model(lambda m, x, f=spelled: m.fc(f(x.float()).to(x.dtype)), fc=fc)
        result = rewritten(model, x)
        assert result.counts == {"act_linear": 1}
        made = result.one("quantize")
        assert (argument(made, "act"), argument(made, "x").name) == (act, "args_0")


NOT_ACTS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "x sigmoid(1.7 x)": (lambda x: x * torch.sigmoid(1.7 * x), []),
    "x sigmoid(2 x)": (lambda x: x * torch.sigmoid(2 * x), []),
    "gelu with a constant of 0.0447": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.0447 * x.pow(3)))),
        [],
    ),
    "gelu with 0.8 for sqrt(2 / pi)": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3)))),
        [],
    ),
    "gelu without a half": (lambda x: x * (1 + torch.erf(x / math.sqrt(2))), []),
    "erf without sqrt 2": (lambda x: 0.5 * x * (1 + torch.erf(x)), []),
    "tanh": (torch.tanh, []),
    "sigmoid": (torch.sigmoid, []),
    "mish": (F.mish, []),
    "mish spelled out": (lambda x: x * torch.tanh(F.softplus(x)), []),
    "leaky relu": (F.leaky_relu, []),
    "elu": (F.elu, []),
    "relu6": (F.relu6, []),
    "hardswish": (F.hardswish, []),
    "softplus": (F.softplus, []),
    "relu(x + 1)": (lambda x: F.relu(x + 1), ["relu"]),
    "2 relu(x)": (lambda x: 2 * F.relu(x), ["relu"]),
    "relu of integers": (lambda x: F.relu(x.to(torch.int32)).float(), ["relu"]),
    "relu rounded": (lambda x: F.relu(x).to(torch.int32).float(), ["relu"]),
    "relu cubed": (lambda x: F.relu(x) ** 3, ["relu"]),
}


@pytest.mark.parametrize("name", NOT_ACTS)
def test_a_near_miss_is_not_taken_for_an_activation(name: str) -> None:
    """Some hold a relu, which is one: what must not be is the whole."""
    spelled, inner = NOT_ACTS[name]
    x, fc = 3 * torch.randn(3, 5, K), nn.Linear(K, 8)
    model = Model(lambda m, x: m.fc(spelled(x)), fc=fc)
    assert [a.act for a in found(model, x).activations.values()] == inner
    result = rewritten(model, x)
    assert result.counts == ({"act_linear": 1} if name == "relu(x + 1)" else {"linear": 1})
    assert_near(result.got, result.want, linear_bound(spelled(x), fc.weight))


def test_a_product_of_two_values_is_no_activation() -> None:
    seen = found(Model(lambda m, x, y: x * torch.sigmoid(y)), torch.randn(4, K), torch.randn(4, K))
    assert not seen.activations


# All of a type's range ---------------------------------------------------------------------------


def traced(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Recognized, Node, Node]:
    """What is recognized in f(x), and the nodes of x and f(x)."""
    graph = make_fx(f, tracing_mode="fake", pre_dispatch=True)(x).graph
    (given,), (out,) = graph.find_nodes(op="placeholder"), graph.output_node().all_input_nodes
    return recognize(graph, Constants(())), given, out


def whole(f: Callable[[Tensor], Tensor], x: Tensor | None = None) -> str | None:
    """Which activation, or "norm", the whole of f is taken for."""
    seen, given, out = traced(f, torch.randn(2, K) if x is None else x)
    if (norm := seen.norms.get(out)) is not None:
        return "norm" if norm.x is given else None
    act = seen.activations.get(out)
    return act.act if act is not None and act.x is given else None


FORMS = {act: [*forms.values()][-1] for act, forms in ACTS.items()} | {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)
}

ALSO_NOT_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": lambda x: F.relu(x) - F.relu(x - 6),
    "relu20": lambda x: F.relu(x) - F.relu(x - 20),
    "relu clipped at 1e30": lambda x: F.relu(x) - F.relu(x - 1e30),
    "relu clipped at 1e-30": lambda x: F.relu(x) - F.relu(x - 1e-30),
    "relu with a cut": lambda x: F.relu(x - 1e-12),
    "a power that shows beyond 1e3": lambda x: F.relu(x) + 1e-14 * x**10,
    "a slope that shows below zero": lambda x: F.relu(x) + 1e-13 * x,
    "an offset that shows near zero": lambda x: F.relu(x) + 1e-9,
    "a bump between samples": lambda x: F.relu(x) + torch.exp(-1e4 * (x - 1234.5678) ** 2) * 100,
    "a dent without a sign change": lambda x: (
        F.relu(x) + torch.exp(-1e4 * (x * x - 246.9 * x + 123.45**2)) * 10
    ),
    "a clamp of the argument": lambda x: x * torch.sigmoid(x - F.relu(x - 30) * 2),
    "silu that returns": lambda x: x * torch.sigmoid(x - 1e-6 * x**3),
    "gelu of float32's constants": lambda x: 0.5 * x * (1 + torch.erf(x * 0.70711)),
    "gelu with a floor": lambda x: (
        F.relu(x) - F.relu(-x) * 0.5 * (1 - torch.erf(-x * 0.5**0.5)) * 2
    ),
    "a float8 inside": lambda x: (
        0.5 * x * (1 + torch.erf(x / 2**0.5).to(torch.float8_e4m3fn).float())
    ),
    "a float16 that overflows inside": lambda x: F.relu(x).to(torch.float16).float() * 1,
}


@pytest.mark.parametrize("name", ALSO_NOT_ACTS)
def test_what_differs_far_away_or_close_to_zero_is_another_function(name: str) -> None:
    assert whole(ALSO_NOT_ACTS[name]) is None


@pytest.mark.parametrize("act", FORMS)
def test_a_form_of_an_activation_is_found_without_an_export(act: str) -> None:
    """So that what follows can fail."""
    assert whole(FORMS[act]) == act


OTHERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "x": lambda x, c: x,
    "x^2": lambda x, c: x * x,
    "x^10": lambda x, c: x**10,
    "one": lambda x, c: torch.exp(0 * x),
    "a ramp to -c": lambda x, c: F.relu(-c - x),
    # beside x, and so large that they show there
    "a ramp from c": lambda x, c: 1e4 * F.relu(x - c),
    "a step at c": lambda x, c: 1e4 * c * torch.sigmoid(x - c),
}


@settings(max_examples=settings().max_examples // 4)
@given(
    act=st.sampled_from(sorted(FORMS)),
    other=st.sampled_from(sorted(OTHERS)),
    how_much=st.floats(-9, 1),
    c=st.floats(-3, 20),
)
def test_an_activation_and_a_little_of_something_else_is_another_function(
    act: str, other: str, how_much: float, c: float
) -> None:
    """1e-9 of it, where the activation is near zero; 1e-5 of the activation, where it is not."""

    def near(x: Tensor) -> Tensor:
        return FORMS[act](x) + 10**how_much * OTHERS[other](x, 10**c)

    beside_a_square = act == "relu2" and other in ("a ramp from c", "a step at c")
    assert whole(near) is None or beside_a_square


@settings(max_examples=settings().max_examples // 4)
@given(
    act=st.sampled_from(sorted(FORMS)),
    where=st.floats(-20, 20),
    width=st.floats(1e-3, 1),
    sign=st.sampled_from([-1, 1]),
)
def test_a_bump_anywhere_is_another_function(
    act: str, where: float, width: float, sign: int
) -> None:
    """A triangle of the width of a thousandth of where it stands, and as high as that is wide."""
    c, w = sign * 10**where, width * 10**where

    def near(x: Tensor) -> Tensor:
        bump = F.relu(x - c) - 2 * F.relu(x - c - w) + F.relu(x - c - 2 * w)
        return FORMS[act](x) + bump * (1 + F.relu(FORMS[act](x)) / 10**where)

    assert whole(near) is None


@settings(max_examples=settings().max_examples // 4)
@given(
    act=st.sampled_from(sorted(FORMS)),
    inside=st.booleans(),
    factor=st.floats(1e-5, 1.0),
    sign=st.sampled_from([-1, 1]),
)
def test_a_scaled_activation_is_another_function(
    act: str, inside: bool, factor: float, sign: int
) -> None:
    k = 1 + sign * factor / 2
    assert whole(lambda x: FORMS[act](k * x) if inside else FORMS[act](x) * k) is None


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def _saturated(v: Tensor, top: float) -> Tensor:
    return v - F.relu(v - top)


ALSO_NOT_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "a denominator that saturates at 50": lambda x: (
        x * torch.rsqrt(_saturated(_mean_square(x), 50) + EPS)
    ),
    "a denominator that saturates at 1e20": lambda x: (
        x * torch.rsqrt(_saturated(_mean_square(x), 1e20) + EPS)
    ),
    "a smooth saturation": lambda x: x * torch.rsqrt(1e6 * torch.tanh(_mean_square(x) / 1e6) + EPS),
    "a bump of the mean square": lambda x: (
        x * torch.rsqrt(_mean_square(x) * (1 + torch.exp(-((_mean_square(x) - 777) ** 2))) + EPS)
    ),
    "clipped rows": lambda x: (y := x * torch.rsqrt(_mean_square(x) + EPS)) + F.relu(-5 - y),
    "a mean that saturates": lambda x: (
        (x - (d := _mean(x)) + F.relu(d - 1e3) * 1e-3)
        * torch.rsqrt((x - _mean(x)).square().mean(-1, keepdim=True) + EPS)
    ),
    "a float16 mean square": lambda x: x * torch.rsqrt(_mean_square(x).half().float() + EPS),
    "a float8 root": lambda x: x * torch.rsqrt(_mean_square(x) + EPS).to(torch.float8_e5m2).float(),
    "a tiny addend": lambda x: x * torch.rsqrt(_mean_square(x) + EPS) + 1e-9 * x,
}


@pytest.mark.parametrize("name", ALSO_NOT_NORMS)
def test_what_is_a_norm_only_of_rows_near_one_is_none(name: str) -> None:
    x = torch.randn(2, 64)
    assert whole(lambda x: x * torch.rsqrt(_mean_square(x) + EPS), x) == "norm"
    assert whole(ALSO_NOT_NORMS[name], x) is None


@settings(max_examples=settings().max_examples // 3)
@given(
    rms=st.booleans(),
    top=st.floats(-12, 20),
    low=st.booleans(),
    K=st.sampled_from([1, 2, 3, 64, 257]),
)
def test_a_norm_with_a_bounded_denominator_is_none(
    rms: bool, top: float, low: bool, K: int
) -> None:
    """Bounded below is eps by another name, but not under the root."""

    def near(x: Tensor) -> Tensor:
        d = x if rms else x - _mean(x)
        v = _mean_square(d)
        v = F.relu(v - 10**top) + 10**top if low else _saturated(v, 10**top)
        return d * torch.rsqrt(v + 1e-14)

    assert whole(near, torch.randn(2, K)) is None or (K == 1 and not rms)


def test_a_narrow_type_is_compared_in_its_own_range() -> None:
    """No float16 number tells these apart, and some bfloat16 numbers do."""

    def bumpy(x: Tensor) -> Tensor:
        return F.relu(x) + torch.exp(-((x - 1e5) ** 2))

    assert whole(bumpy, torch.randn(2, K).half()) == "relu"
    assert whole(bumpy, torch.randn(2, K).bfloat16()) is None


def test_equal_layers_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "graphquant.passes.recognize._which_activation", lambda region: seen.append(region.text)
    )

    def layers(x: Tensor) -> Tensor:
        for _ in range(4):
            x = (x * torch.sigmoid(1.702 * x)).sin()
        return x

    traced(layers, torch.randn(2, K))
    assert seen and len(seen) == len(set(seen))
