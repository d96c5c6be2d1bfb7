"""SmoothQuant in the graph: exact but for int8, free behind a norm, and said where it is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from graphquant import ops
from graphquant.ir.graph import LITERAL
from graphquant.ops.numerics import ACTIVATIONS
from graphquant.passes.policy import speed
from graphquant.passes.policy.smoothing import SIGMAS, searched_smoothing, smoothing
from graphquant.passes.policy.smoothquant import ALPHA, NO_NORM
from graphquant.passes.prepack import Packing, prepack
from graphquant.passes.record import Times
from tests.models import relative
from tests.passes.graphs import Model, Rewritten, argument, compiled, parameter, rewritten
from tests.passes.test_random_encoders import Encoder, EncoderModel, encoders
from tests.seen import seen

K, N = 40, 24
EXACT = 1e-5


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K) * 2 + 1


class Statistics:
    """Made-up statistics of any linear, with channels of very different sizes."""

    def __init__(self, K: int = K, only: tuple[str, ...] = (), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._absmax = torch.randn(K, generator=generator).mul(2).exp()
        self._only = only

    def absmax(self, path: str) -> Tensor | None:
        return self._absmax if path in self._only or not self._only else None

    def range(self, path: str) -> None:
        return None


def norm(*size: int) -> nn.Module:
    made = nn.LayerNorm(size or (K,))
    for p in made.parameters():
        p.add_(torch.randn_like(p))
    return made


class _Exact(Interpreter):
    """A rewritten graph with quantizers and products that do not round, in float64."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        exact = _EXACT.get(target)
        return super().call_function(target, args, kwargs) if exact is None else exact(*args)


def exact(graph: GraphModule, *args: Any) -> Any:
    return _Exact(graph).run(*args)


def _whole(y: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y * factor as (xq, x_scale, x_shift)."""
    y = y.double() if factor is None else y.double() * factor.double()
    column = torch.ones_like(y[..., :1])
    return y, column, 0 * column


def _product(x: Tensor, up: Tensor | None, act: str | None) -> Tensor:
    y = x.double() if act is None else ACTIVATIONS[act](x.double())
    return y if up is None else y * up.double()


def _norm(x: Tensor, gamma: Any, beta: Any, eps: float, rms: bool) -> Tensor:
    gamma, beta = (None if v is None else v.double() for v in (gamma, beta))
    if rms:
        return F.rms_norm(x.double(), x.shape[-1:], gamma, eps)
    return F.layer_norm(x.double(), x.shape[-1:], gamma, beta, eps)


def _linear(xq: Tensor, x_scale: Any, x_shift: Any, wq: Any, w_scale: Any, w_sum: Any, *rest: Any):
    bias, residual, dtype = rest
    y = (xq * x_scale) @ wq.T * w_scale + x_shift * w_sum
    for term in (bias, residual):
        y = y if term is None else y + term.double()
    return y.to(dtype)


_EXACT: dict[Any, Any] = {
    ops.quantize.target: lambda x, up=None, act=None, *a: _whole(_product(x, up, act), *a),
    ops.quantize_weight.target: lambda w, *_: (
        w.double(),
        torch.ones(len(w), dtype=torch.float64),
        w.double().sum(1),
    ),
    ops.norm_quantize.target: lambda *a: _whole(_norm(*a[:5]), *a[5:]),
    ops.norm_quantize_keep.target: lambda *a: (
        (y := _norm(*a[:5])).to(a[5]),
        *_whole(y, *a[6:]),
    ),
    ops.int8_linear.target: _linear,
}


@settings(max_examples=settings().max_examples * 25 // 60)
@given(encoder=encoders, smooth=st.sampled_from([0.1, 0.5, 0.9, "auto", "norm"]))
def test_a_random_encoder_is_the_same_in_float(encoder: Encoder, smooth: Any) -> None:
    encoder = dataclasses.replace(encoder, dtype=torch.float32, autocast=False)
    torch.manual_seed(encoder.seed)
    model = EncoderModel(encoder).eval()
    for name, p in model.named_parameters():  # channels of very different sizes
        if "norm" in name:
            p.mul_(torch.randn_like(p).exp())
    x = torch.randn(encoder.batch, encoder.tokens, encoder.inputs)
    calibration = None if smooth == "norm" else seen(model, x, rows=True)
    result = rewritten(model, x, smooth=smooth, calibration=calibration)
    smoothed = [o.smoothed for o in result.report.linears if o.int8]
    assert any(smoothed) if smooth == "norm" else all(smoothed), result.report
    for got, want in zip(exact(result.captured.gm, x), result.want, strict=True):
        assert relative(got, want) < EXACT


def packed_graph(result: Rewritten) -> list[Packing]:
    """Takes the weights out of the graph, as the backend does."""
    graph = result.graph
    last = graph.find_nodes(op="placeholder")[-1]

    def new_input(name: str) -> Node:
        with graph.inserting_after(last):
            return graph.placeholder(name)

    return prepack(result.captured, new_input)


def computed(result: Rewritten, packing: Packing) -> list[Tensor]:
    parameters = result.captured.parameters
    return packing.recipe.compute([parameters[r] for r in packing.roots])


def norm_linear() -> nn.Module:
    return Model(lambda m, x: m.fc(m.norm(x)), norm=norm(), fc=nn.Linear(K, N))


def test_behind_a_norm_it_costs_nothing(x: Tensor) -> None:
    model = norm_linear()
    plain, smooth = rewritten(model, x), rewritten(model, x, smooth=0.5, calibration=Statistics())
    assert argument(smooth.one("norm_quantize"), "factor") is None
    for result in (plain, smooth):
        packed_graph(result)
    assert plain.ops() == smooth.ops()


def test_the_norm_and_the_weight_take_the_scale(x: Tensor) -> None:
    model, statistics = norm_linear(), Statistics()
    result = rewritten(model, x, smooth=0.3, calibration=statistics)
    (packing,) = packed_graph(result)
    wq, w_scale, w_sum, gamma, beta = computed(result, packing)
    s = smoothing(model.fc.weight, statistics.absmax(""), 0.3)
    torch.testing.assert_close(gamma, model.norm.weight / s)
    torch.testing.assert_close(beta, model.norm.bias / s)
    for got, want in zip(
        (wq, w_scale, w_sum), ops.quantize_weight(model.fc.weight * s), strict=True
    ):
        torch.testing.assert_close(got, want)


NORMS: dict[str, Any] = {
    "layer norm": norm,
    "layer norm without bias": lambda: nn.LayerNorm(K, bias=False),
    "layer norm without affine": lambda: nn.LayerNorm(K, elementwise_affine=False),
    "rms norm": lambda: nn.RMSNorm(K, eps=1e-3),
    "broadcast": lambda: Model(
        lambda m, x: (
            (d := x - x.mean(-1, True)) * torch.rsqrt(d.square().mean(-1, True) + 1e-5) * m.weight
            + m.bias
        ),
        weight=parameter(1, 1, K),
        bias=parameter(1, 1, K),
    ),
    "rms norm without affine": lambda: nn.RMSNorm(K, elementwise_affine=False),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("keep", [False, True], ids=["alone", "kept"])
def test_by_the_norm_alone(name: str, keep: bool, x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return m.fc(h) + (h if keep else 0)

    model = Model(forward, norm=NORMS[name](), fc=nn.Linear(K, K))
    for p in model.norm.parameters():
        p.add_(torch.randn_like(p))
    result = rewritten(model, x, smooth="norm")
    assert [o.smoothed for o in result.report.linears] == [f"norm, alpha {ALPHA}"]
    assert relative(exact(result.captured.gm, x), result.want) < EXACT
    gamma, beta = (getattr(model.norm, n, None) for n in ("weight", "bias"))
    absmax = SIGMAS * (torch.ones(K) if gamma is None else gamma.abs().flatten())
    absmax = absmax if beta is None else absmax + beta.abs().flatten()
    s = smoothing(model.fc.weight, absmax, ALPHA)
    (packing,) = packed_graph(result)
    want = ops.quantize_weight(model.fc.weight * s)
    assert any(torch.equal(t, want[1]) for t in computed(result, packing))


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.fc(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def post_norm(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return h + m.fc(h)


QUANTIZERS: dict[str, tuple[str, Any]] = {
    "attention's values": ("quantize", attention),
    "activation": ("quantize", lambda m, x: m.fc(F.gelu(m.q(x)))),
    "gated activation": ("quantize", lambda m, x: m.fc(F.silu(m.q(x)) * m.k(x))),
    "kept norm": ("norm_quantize_keep", post_norm),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_quantizers_take_a_factor(name: str, x: Tensor) -> None:
    op, forward = QUANTIZERS[name]
    linears = {n: nn.Linear(K, K) for n in ("q", "k", "v", "fc")}
    model, statistics = Model(forward, norm=norm(), **linears), Statistics(only=("fc",))
    result = rewritten(model, x, smooth=0.5, calibration=statistics)
    fc = next(o for o in result.report.linears if o.path == "fc")
    assert fc.smoothed == "alpha 0.5"
    (quantizer,) = (
        n
        for n in result.graph.nodes
        if n.target is ops.OPS[op].target and argument(n, "factor") is not None
    )
    assert relative(exact(result.captured.gm, x), result.want) < EXACT
    packed_graph(result)
    factor = argument(quantizer, "factor")
    assert factor.op == "placeholder", "computed when the model runs"
    s = smoothing(model.fc.weight, statistics.absmax("fc"), 0.5)
    assert s.max() > 10 * s.min()


def test_a_norm_by_the_input_is_smoothed_by_statistics_alone(x: Tensor) -> None:
    """An adaptive norm has no gamma that could be changed ahead."""

    def forward(m: Any, x: Tensor, gamma: Tensor) -> Tensor:
        return m.fc(F.layer_norm(x, (K,), gamma + 1, m.beta))

    model = Model(forward, fc=nn.Linear(K, N), beta=parameter(K))
    gamma = torch.randn(K)
    result = rewritten(model, x, gamma, smooth=0.5, calibration=Statistics())
    assert argument(result.one("norm_quantize"), "factor") is not None
    assert relative(exact(result.captured.gm, x, gamma), result.want) < EXACT
    packed_graph(result)
    assert "reciprocal" not in result.ops(), "computed when the model runs"
    result = rewritten(model, x, gamma, smooth="norm")
    assert [o.not_smoothed for o in result.report.linears] == [NO_NORM]


def test_a_norm_whose_gamma_is_written_is_left_alone(x: Tensor) -> None:
    """Packed ahead, the fold would not see it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        gamma = m.gamma * 1
        m.gamma.add_(1)
        return m.fc(F.layer_norm(x, (K,), gamma, m.beta))

    model = Model(forward, fc=nn.Linear(K, N), gamma=torch.randn(K), beta=torch.randn(K))
    result = rewritten(model, x, smooth="norm")
    assert not any(o.smoothed for o in result.report.linears)
    assert relative(result.got, result.want) < 0.03


def siblings() -> nn.Module:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        h = m.norm(x)
        return m.q(h), m.k(h), m.v(h)

    return Model(forward, norm=norm(), **{n: nn.Linear(K, N) for n in "qkv"})


def test_linears_that_read_one_value_share_what_is_known_of_it(x: Tensor) -> None:
    statistics = Statistics(only=("k",))
    result = rewritten(siblings(), x, smooth=0.5, calibration=statistics)
    assert [o.smoothed for o in result.report.linears] == ["alpha 0.5"] * 3
    for got, want in zip(exact(result.captured.gm, x), result.want, strict=True):
        assert relative(got, want) < EXACT


def test_what_is_not_known_is_said(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.d(m.c(m.b(m.a(x))))

    model = Model(forward, **{n: nn.Linear(K, K) for n in "abcd"})
    statistics, few = Statistics(only=("a",)), torch.ones(K // 2)
    absmax = statistics.absmax
    statistics.absmax = lambda path: few if path == "b" else absmax(path)  # type: ignore[method-assign]
    result = rewritten(model, x, smooth=0.5, calibration=statistics, exclude="d")
    a, b, c, d = result.report.linears
    assert [o.smoothed for o in (a, b, c, d)] == ["alpha 0.5", "", "", ""]
    assert a.not_smoothed == d.not_smoothed == "" and not d.int8
    assert b.not_smoothed == f"the calibration saw {K // 2} channels, it has {K}"
    assert c.not_smoothed == "the calibration has no statistics of it"
    assert result.report.notes == tuple(
        f"1 of 3 int8 linears are not smoothed: {o.not_smoothed}" for o in (b, c)
    )
    text = str(result.report)
    assert "smoothed (alpha 0.5)" in text and f"not smoothed: {c.not_smoothed}" in text


def test_linears_behind_no_norm_are_a_note_only_if_nothing_else_is(x: Tensor) -> None:
    linears = {n: nn.Linear(K, K) for n in "ab"}
    model = Model(lambda m, x: m.b(m.a(m.norm(x))), norm=norm(), **linears)
    result = rewritten(model, x, smooth="norm")
    assert [o.not_smoothed for o in result.report.linears] == ["", NO_NORM]
    assert result.report.notes == ()
    bare = Model(lambda m, x: m.fc(x), fc=nn.Linear(K, N))
    assert rewritten(bare, x, smooth="norm").report.notes == (
        f"1 of 1 int8 linears are not smoothed: {NO_NORM}",
    )


def test_auto_searches_where_there_are_rows(x: Tensor) -> None:
    model = norm_linear()
    notes = [
        rewritten(model, x, smooth="auto", calibration=c).report.linears[0].smoothed
        for c in (seen(model, x, rows=True), seen(model, x))
    ]
    assert notes == ["alpha searched", "alpha 0.5: the calibration has no rows to search on"]


def test_auto_packs_what_the_search_found(x: Tensor) -> None:
    model = norm_linear()
    calibration = seen(model, x, rows=True)
    rows, absmax = calibration.sample("fc"), calibration.absmax("fc")
    assert rows is not None and absmax is not None
    result = rewritten(model, x, smooth="auto", calibration=calibration)
    s = searched_smoothing(model.fc.weight, absmax, rows)
    (packing,) = packed_graph(result)
    want = ops.quantize_weight(model.fc.weight * s)[0]
    assert torch.equal(computed(result, packing)[0], want)


@pytest.mark.parametrize("smooth", [0.5, "norm"])
def test_without_int8_nothing_is_smoothed(smooth: Any, x: Tensor) -> None:
    model = siblings()
    plain = rewritten(model, x, quantize=False)
    result = rewritten(model, x, quantize=False, smooth=smooth, calibration=Statistics())
    assert result.ops() == plain.ops() and result.report.notes == ()
    assert not any(o.smoothed or o.not_smoothed for o in result.report.linears)
    assert all(torch.equal(g, w) for g, w in zip(result.got, plain.got, strict=True))


def test_one_graph_serves_every_batch() -> None:
    model = norm_linear()
    batch = torch.export.Dim("batch")
    x = torch.randn(3, 5, K)
    result = rewritten(model, x, sizes={"args": ({0: batch},)}, smooth="norm")
    wide = torch.randn(7, 5, K)
    assert relative(exact(result.captured.gm, wide), model(wide)) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_scaled_in_float32(dtype: torch.dtype, x: Tensor) -> None:
    model = norm_linear().to(dtype)
    x = x.to(dtype)
    result = rewritten(model, x, smooth=0.5, calibration=Statistics())
    (packing,) = packed_graph(result)
    _, w_scale, _, gamma, beta = computed(result, packing)
    s = smoothing(model.fc.weight, Statistics().absmax(""), 0.5)
    torch.testing.assert_close(gamma, model.norm.weight.float() / s)
    torch.testing.assert_close(beta, model.norm.bias.float() / s)
    torch.testing.assert_close(w_scale, (model.fc.weight.float() * s).abs().amax(1) / 127)


def test_statistics_leave_nothing_behind(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def attributes(result: Rewritten) -> list[str]:
        return [n for n, _ in result.captured.gm.named_buffers() if "literal" in n]

    model = norm_linear()
    taken = rewritten(model, x, smooth=0.5, calibration=Statistics())
    assert len(attributes(taken)) == 1
    packed_graph(taken)
    assert attributes(taken) == []
    monkeypatch.setattr(speed, "measure", lambda *_: Times(1.0, 2.0))
    refused = rewritten(model, x, smooth=0.5, calibration=Statistics(), select="faster")
    assert not any(o.int8 or o.smoothed for o in refused.report.linears)
    assert attributes(refused) == []
    assert not any(LITERAL in n.meta for n in refused.graph.nodes)


def test_recipes_are_equal_if_the_statistics_are(x: Tensor) -> None:
    model = norm_linear()

    def recipe(seed: int, smooth: float = 0.5) -> Any:
        result = rewritten(model, x, smooth=smooth, calibration=Statistics(seed=seed))
        (packing,) = packed_graph(result)
        return packing.recipe

    first, same = recipe(0), recipe(0)
    assert first == same and hash(first) == hash(same)
    assert first not in (recipe(1), recipe(0, 0.4))


def test_what_needs_a_gradient_is_left_alone(x: Tensor) -> None:
    model = norm_linear()
    with torch.enable_grad():
        result = compiled(model, x, smooth="norm")
    (linear,) = result.report.linears
    assert not linear.int8 and not linear.smoothed
    assert result.got.requires_grad and torch.equal(result.got, result.want)


@pytest.mark.parametrize("keep", [False, True], ids=["alone", "kept"])
def test_a_static_range_is_that_of_the_smoothed_input(keep: bool, x: Tensor) -> None:
    """What is known of a channel, however large, is in [-1, 1] when it is smoothed."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.norm(x)
        return (m.fc(h), h) if keep else (m.fc(h),)

    model = Model(forward, norm=norm(), fc=nn.Linear(K, K))
    for p in model.norm.parameters():
        p[3] *= 50
    model.fc.weight[:, 3] /= 50
    calibration: Any = seen(model, x)
    result = rewritten(model, x, smooth=0.5, calibration=calibration, activation="static")
    (quantizer,) = (n for n in result.graph.nodes if "norm_quantize" in str(n.target))
    assert (argument(quantizer, "low"), argument(quantizer, "high")) == (-1.0, 1.0)
    assert not result.report.notes
    plain = rewritten(model, x, calibration=calibration, activation="static")
    want = result.want[0]
    assert relative(result.got[0], want) < 0.2 * relative(plain.got[0], want)


def test_without_statistics_a_static_range_is_that_of_the_input(x: Tensor) -> None:
    """Where linears have a range and no channels, they are not smoothed."""
    calibration = seen(norm_linear(), x)
    calibration.largest.clear()
    result = rewritten(norm_linear(), x, smooth=0.5, calibration=calibration, activation="static")
    assert [o.smoothed for o in result.report.linears] == [""]
    quantizer = result.one("norm_quantize")
    assert (argument(quantizer, "low"), argument(quantizer, "high")) == calibration.ranges["fc"]


def test_an_activation_keeps_its_static_range(x: Tensor) -> None:
    """It uses one side of it; smoothed, nobody knows how far it goes to the other."""
    model = Model(lambda m, x: m.fc(F.gelu(x)), fc=nn.Linear(K, N))
    calibration = seen(model, x)
    calibration.ranges["fc"] = (-0.17, 7.0)
    options: Any = {"smooth": 0.5, "calibration": calibration}
    static = rewritten(model, x, activation="static", **options)
    assert [o.smoothed for o in static.report.linears] == [""]
    assert "an activation would use half of the range (-1.0, 1.0)" in static.report.notes[0]
    quantizer = static.one("quantize")
    assert (argument(quantizer, "low"), argument(quantizer, "high")) == (-0.17, 7.0)
    assert [o.smoothed for o in rewritten(model, x, **options).report.linears] == ["alpha 0.5"]
