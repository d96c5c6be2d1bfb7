"""int8 is kept where it was measured to be faster. On a CPU too here, with times of our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphquant import Config, Report
from graphquant.ir.captured import Captured
from graphquant.ops import cpu
from graphquant.ops.int8_linear import onednn
from graphquant.ops.numerics import padded, with_pads
from graphquant.ops.timing import _key
from graphquant.passes.pipeline import rewrite
from graphquant.passes.policy import speed
from graphquant.passes.policy.speed import Region, random_like
from tests.passes.graphs import Model, compiled, exported, honest, rewritten, text
from tests.seen import Seen

K, N = 40, 24


class Clock:
    """Runs what it is asked to time, and returns times chosen by the test."""

    def __init__(self, slower: Callable[[str], bool] = lambda question: False) -> None:
        self.slower = slower
        self.questions: list[str] = []
        self.results: list[dict[str, tuple[Tensor, ...]]] = []

    def __call__(self, question: str, device: torch.device, candidates: Any) -> Any:
        assert device == torch.device("cpu") and list(candidates) == ["float", "int8"]
        self.questions.append(question)
        self.results.append({name: call() for name, call in candidates.items()})
        return {"float": 20.0, "int8": 30.0 if self.slower(question) else 10.0}

    def asked(self) -> list[tuple[list[str], list[str]]]:
        """The ops of each question, float and int8."""
        return [tuple(map(ops, q.split("\n->\n"))) for q in self.questions]  # type: ignore[misc]


def ops(region: str) -> list[str]:
    return [op for op in re.findall(r"(\w+)(?:\.\w+)?>?\(\(", region) if op != "getitem"]


def inputs(region: str) -> list[str]:
    return sorted(re.findall(r"^%\d+ = (torch\.\S+ ?.*\]|\d+)$", region, re.MULTILINE))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHQUANT_SELECT", raising=False)
    monkeypatch.setattr(speed, "MEASURED", ("cpu",))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(speed, "times", stand_in)
    return stand_in


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K) * 2 + 1


def norm_linear() -> nn.Module:
    return Model(lambda m, x: m.fc(m.norm(x.sin())), norm=nn.LayerNorm(K), fc=nn.Linear(K, N))


def post_norm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.fc(h).cos() * h

    return Model(forward, norm=nn.LayerNorm(K), fc=nn.Linear(K, K))


def gated() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.silu(x.sin()) * x.cos())

    return Model(forward, fc=nn.Linear(K, N))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "norm": (norm_linear, ["layer_norm", "linear"], ["norm_quantize", "int8_linear"]),
    "spelled norm": (
        lambda: Model(
            lambda m, x: m.fc(x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()),
            fc=nn.Linear(K, N),
        ),
        ["pow", "mean", "add", "rsqrt", "mul", "linear"],
        ["norm_quantize", "int8_linear"],
    ),
    "activation": (
        lambda: Model(lambda m, x: m.fc(F.gelu(x.sin())), fc=nn.Linear(K, N)),
        ["gelu", "linear"],
        ["quantize", "int8_linear"],
    ),
    "gated": (gated, ["silu", "mul", "linear"], ["quantize", "int8_linear"]),
    "plain": (
        lambda: Model(lambda m, x: m.fc(x.sin()).cos(), fc=nn.Linear(K, N, bias=False)),
        ["linear"],
        ["quantize", "int8_linear"],
    ),
    "post norm": (post_norm, ["layer_norm", "linear"], ["norm_quantize_keep", "int8_linear"]),
    "views": (
        lambda: Model(
            lambda m, x: m.fc(m.norm(x).view(15, K)).sin(),
            norm=nn.LayerNorm(K),
            fc=nn.Linear(K, N),
        ),
        ["layer_norm", "view", "linear"],
        ["reshape", "norm_quantize", "int8_linear"],
    ),
}


# What is measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced_is_timed_against_what_replaces_it(
    name: str, x: Tensor, clock: Clock
) -> None:
    """Each reaches back to the value that both read, and no further; packing is in neither."""
    model, float_ops, int8_ops = MODELS[name]
    result = rewritten(model(), x)
    assert clock.asked() == [(float_ops, int8_ops)]
    assert all(o.int8 for o in result.report.linears)
    before, after = clock.results[0].values()
    for got, want in zip(after, before, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_both_read_what_they_would_read_in_the_model(x: Tensor, clock: Clock) -> None:
    rewritten(norm_linear(), x)
    before, after = map(inputs, clock.questions[0].split("\n->\n"))
    shared = [f"torch.float32[{K}][1]"] * 2 + [f"torch.float32[3, 5, {K}][{5 * K}, {K}, 1]"]
    bias = f"torch.float32[{N}][1]"
    assert before == sorted([*shared, bias, f"torch.float32[{N}, {K}][{K}, 1]"])
    packed_weight = [f"torch.int8[{N}, {K}][{padded(K)}, 1]", bias, bias]
    assert after == sorted([*shared, bias, *packed_weight])


def test_layouts_are_part_of_the_question_but_for_what_is_not_in_rows(clock: Clock) -> None:
    """Inductor writes that in rows before a kernel reads it."""
    plain = MODELS["plain"][0]
    for x in (
        torch.randn(3, 5, K),
        torch.randn(3, 5, 2 * K)[..., :K],
        torch.randn(3, 5, K).bfloat16(),
        torch.randn(5, 3, K).transpose(0, 1),
    ):
        model = plain().to(x.dtype)
        model._forward = lambda m, x: m.fc(x).cos()
        rewritten(model, x)
    in_rows, part, narrow, swapped = clock.questions
    assert in_rows == swapped
    assert len({in_rows, part, narrow}) == 3


class RealValues:
    """What every node of a captured graph computes, as far as it has been rewritten."""

    def __init__(self, captured: Captured, args: tuple[Tensor, ...]) -> None:
        given = [
            n
            for n in captured.gm.graph.find_nodes(op="placeholder")
            if n not in captured.parameters
        ]
        self.known: dict[Node, Any] = {
            **captured.parameters,
            **dict(zip(given, args, strict=True)),
        }

    def __call__(self, node: Node) -> Any:
        if node not in self.known:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self)
            self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.known[node]


@pytest.mark.parametrize("name", MODELS)
def test_both_compute_nearly_the_same_on_the_models_own_values(
    name: str, x: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = exported(MODELS[name][0](), x)
    value, bind = RealValues(captured, (x,)), Region.bind
    wanted: list[list[Tensor]] = []

    def bind_real(self: Region) -> Any:
        real = iter([value(n) for n in self.inputs])
        wanted.append([value(n) for n in self.outputs])
        run = bind(self)

        def call() -> object:
            with monkeypatch.context() as patch:
                patch.setattr(speed, "_value", lambda _: next(real))
                return run()

        return call

    monkeypatch.setattr(Region, "bind", bind_real)
    rewrite(captured, Config())
    (found,) = clock.results
    for results, want in zip(found.values(), wanted, strict=True):
        assert all(torch.equal(r, w) for r, w in zip(results, want, strict=True))
    for got, want in zip(found["int8"], found["float"], strict=True):
        assert (got - want).norm() < 0.03 * want.norm()  # tests/small.py: 1 % of a linear


def test_values_are_made_only_for_what_is_measured(
    x: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(speed, "_value", lambda value: made.append(value))
    monkeypatch.setattr(speed, "times", lambda question, device, both: dict.fromkeys(both, 1.0))
    rewrite(exported(MODELS["norm"][0](), x), Config())
    assert not made


class Layer(nn.Module):
    """Pre-norm attention and MLP, with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(K), nn.LayerNorm(K)
        self.q, self.k, self.v, self.out = (nn.Linear(K, K) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_equal_layers_ask_four_questions_however_many_they_are(x: Tensor, clock: Clock) -> None:
    captured = exported(nn.Sequential(*(Layer() for _ in range(5))), x)
    report = rewrite(captured, Config()).report
    assert len(clock.questions) == 5 * 4
    assert len(set(clock.questions)) == 4
    first = {after[0] for _, after in clock.asked()}
    assert first == {"norm_quantize", "quantize"}
    assert report.counts() == {
        "stack_siblings + norm_linear": 15, "linear + residual": 5,
        "norm_linear": 5, "act_linear + residual": 5,
    }  # fmt: skip


def test_layers_with_ranges_of_their_own_ask_no_more_questions(x: Tensor, clock: Clock) -> None:
    ranges = {
        f"{i}.{name}": (-1.0 - i, 2.0 + n)
        for i in range(3)
        for n, name in enumerate(("q", "k", "v", "out", "fc1", "fc2"))
    }
    options: Any = {"activation": "static", "calibration": Seen(ranges), "clip_range": 5.0}
    captured = exported(nn.Sequential(*(Layer() for _ in range(3))), x)
    report = rewrite(captured, Config(**options)).report
    assert not report.notes
    assert len(clock.questions) == 3 * 4
    static = set(clock.questions)
    assert len(static) == 4
    clock.questions.clear()
    rewrite(exported(Layer(), x), Config())
    assert len(clock.questions) == 4
    assert not static & set(clock.questions), "a static kernel is another one than a dynamic one"


def test_float_fusing_and_epilogues_are_not_measured(x: Tensor, clock: Clock) -> None:
    siblings = Model(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(K, N), b=nn.Linear(K, N))
    assert rewritten(siblings, x, quantize=False).counts == {"stack_siblings": 2}
    assert not clock.questions
    scaled = Model(
        lambda m, x: x + m.fc(x.sin()) * m.scale, fc=nn.Linear(K, K), scale=nn.Parameter(x[0, 0])
    )
    assert rewritten(scaled, x).counts == {"linear + layer_scale + residual": 1}
    assert clock.asked() == [(["linear"], ["quantize", "int8_linear"])]


def test_sizes_that_may_change_are_measured_as_they_are_seen_first(clock: Clock) -> None:
    sizes = {"args": ({0: torch.export.Dim("batch", min=2, max=1000), 1: torch.export.Dim.AUTO},)}
    model = Model(
        lambda m, x: m.fc(m.norm(x).flatten(0, 1)), norm=nn.LayerNorm(K), fc=nn.Linear(K, N)
    )
    result = rewritten(model, torch.randn(7, 5, K), sizes=sizes)
    assert result.counts == {"norm_linear": 1}
    assert f"torch.float32[7, 5, {K}][{5 * K}, {K}, 1]" in clock.questions[0]
    assert not re.search(r"\bs\d+\b", clock.questions[0])
    batch = torch.randn(2, 5, K)
    got = result.captured.gm(batch)
    assert (got - model(batch)).norm() < 0.03 * got.norm()


def test_a_region_that_is_too_large_is_not_measured(
    x: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MAX_NODES", 2)
    assert rewritten(MODELS["activation"][0](), x).counts == {"act_linear": 1}
    assert not clock.questions


@pytest.mark.parametrize("answer", [None, {}, {"float": 1.0}, {"int8": 1.0}])
def test_without_both_times_the_rewrite_stays(
    answer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a CUDA graph records, say, nothing can be measured."""
    monkeypatch.setattr(speed, "times", lambda *_: answer)
    result = rewritten(MODELS["norm"][0](), x)
    assert result.counts == {"norm_linear": 1}
    assert result.report.linears[0].float_us == result.report.linears[0].int8_us == 0.0


def refuses_to_measure(*_: Any) -> Any:
    raise AssertionError("measured")


@pytest.mark.parametrize("where", ["option", "environment", "cpu"])
def test_nothing_is_measured_if_it_is_not_asked_for(
    where: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "times", refuses_to_measure)
    options = {"select": "always"} if where == "option" else {}
    if where == "environment":
        monkeypatch.setenv("GRAPHQUANT_SELECT", "always")
    if where == "cpu":
        monkeypatch.setattr(speed, "MEASURED", ("cuda",))
    assert rewritten(norm_linear(), x, **options).counts == {"norm_linear": 1}
    monkeypatch.setattr(speed, "MEASURED", ("cpu",))
    with pytest.raises(AssertionError, match="measured"):
        rewritten(norm_linear(), x, select="faster")


def test_without_a_compiler_what_onednn_computes_is_measured(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its times are not those of the kernels."""
    asked: list[str] = []
    calls: list[int] = []

    def times(question: str, device: torch.device, both: Any) -> dict[str, float]:
        asked.append(_key(question, device))
        product = onednn._product
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "_product", lambda *a: calls.append(1) or product(*a))
            for _ in range(3):
                both["int8"]()
        return {"float": 2.0, "int8": 1.0}

    monkeypatch.setattr(speed, "times", times)
    rewritten(norm_linear(), x)
    assert not calls or cpu.missing() is not None
    calls.clear()
    monkeypatch.setattr(cpu, "missing", lambda: "no compiler")
    monkeypatch.setattr(onednn, "missing", lambda: None)
    rewritten(norm_linear(), x)
    assert len(calls) == 1 + 3  # recorded, then repeated
    assert len(set(asked)) == 2
    monkeypatch.setattr(onednn, "missing", lambda: "it saturates")
    asked.clear()
    assert rewritten(norm_linear(), x).report.reasons() == {speed.NO_KERNELS: 1}
    assert not asked


# What is done with the times --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_where_int8_is_slower_the_graph_stays_as_it_was(
    name: str, x: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name][0]()
    left = exported(model, x)
    rewrite(left, Config(exclude="*"))  # all that is no rule's work
    clock.slower = lambda question: True
    captured = exported(model, x)
    report = rewrite(captured, Config()).report
    honest(captured)
    assert text(captured.gm.graph) == text(left.gm.graph)
    assert torch.equal(captured.gm(x), model(x))
    assert clock.questions and not any(o.applied for o in report.outcomes)
    (linear,) = report.linears
    said = "measured: int8 takes 30.0 us, float 20.0 us"
    assert set(linear.refused.split("; ")) == {said}
    assert (linear.float_us, linear.int8_us) == (20.0, 30.0)


def test_what_is_slower_in_a_chain_may_be_faster_alone(x: Tensor, clock: Clock) -> None:
    clock.slower = lambda question: "norm_quantize" in question
    result = rewritten(norm_linear(), x)
    assert result.counts == {"linear": 1}
    assert result.ops()["layer_norm"] == 1 and "norm_quantize" not in result.ops()
    (norm,) = [o for o in result.report.outcomes if o.kind == "norm"]
    assert norm.refused == "measured: int8 takes 30.0 us, float 20.0 us"
    (linear,) = result.report.linears
    assert (linear.float_us, linear.int8_us, linear.refused) == (20.0, 10.0, "")


def test_some_layers_may_stay_in_float_while_others_do_not(x: Tensor, clock: Clock) -> None:
    clock.slower = lambda question: f"[{N}, {K}]" in question
    result = rewritten(nn.Sequential(*(Layer() for _ in range(2))), x)
    assert result.counts == {
        "stack_siblings + norm_linear": 6, "linear + residual": 2, "act_linear + residual": 2,
    }  # fmt: skip
    assert [o.path for o in result.report.linears if not o.int8] == ["0.fc1", "1.fc1"]


@pytest.mark.parametrize(
    ("times", "kept"), [((100.0, 97.9), True), ((100.0, 98.0), True), ((100.0, 98.1), False)]
)
def test_what_only_draws_level_stays_in_float(
    times: tuple[float, float], kept: bool, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "times", lambda *_: dict(zip(("float", "int8"), times, strict=True)))
    assert rewritten(MODELS["plain"][0](), x).report.linears[0].int8 is kept


def test_the_report_has_both_times_of_a_chain_and_not_of_its_epilogue(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([{"float": 20.0, "int8": 10.0}, {"float": 2.0, "int8": 1.0}])
    monkeypatch.setattr(speed, "times", lambda *_: next(answers))
    model = Model(lambda m, x: x + m.fc(m.norm(x)), norm=nn.LayerNorm(K), fc=nn.Linear(K, K))
    report = rewrite(exported(model, x), Config()).report
    assert [(o.kind, o.float_us, o.int8_us) for o in report.outcomes] == [
        ("norm", 20.0, 10.0),
        ("linear", 20.0, 10.0),
    ]
    assert str(report.linears[0]).endswith("norm_linear + residual (10.0 us, float 20.0 us)")
    assert "norm_linear + residual (10.0 us, float 20.0 us)" in str(report)
    assert Report.from_json(report.to_json()) == report


def test_it_works_through_torch_compile(x: Tensor, clock: Clock) -> None:
    clock.slower = lambda question: "gelu" in question
    model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, N), nn.GELU(), nn.Linear(N, K))
    result = compiled(model, x)
    assert result.counts == {"norm_linear": 1, "linear": 1}
    assert (result.got - result.want).norm() < 0.03 * result.want.norm()


def test_measuring_leaves_random_numbers_alone(x: Tensor, clock: Clock) -> None:
    captured = exported(norm_linear(), x)
    before = torch.get_rng_state()
    rewrite(captured, Config())
    assert clock.questions and torch.equal(torch.get_rng_state(), before)


# Random values ----------------------------------------------------------------------------------


def layouts() -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool):
        yield torch.empty(3, 5, 64, dtype=dtype)
        yield torch.empty(5, 3, 64, dtype=dtype).transpose(0, 1)
        yield torch.empty(3, 5, 128, dtype=dtype)[..., 64:]
        yield torch.empty(1, 64, dtype=dtype).expand(5, 64)  # a class token
        yield torch.empty(0, 5, 64, dtype=dtype)
        yield torch.empty((), dtype=dtype)


@pytest.mark.parametrize("value", [*layouts()], ids=lambda v: f"{v.dtype}{tuple(v.stride())}")
def test_random_values_have_the_layout_of_the_real_ones(value: Tensor) -> None:
    made = random_like(value)
    assert (made.shape, made.stride(), made.dtype) == (value.shape, value.stride(), value.dtype)
    assert torch.equal(made, random_like(value))
    if value.numel() > 1:
        assert len(made[0].unique()) > 1
        assert (made != 0).float().mean() > 0.4


def test_a_region_reads_rows_numbers_and_scalars() -> None:
    columns = speed._value(torch.empty(3, 64, 5).transpose(1, 2))
    assert isinstance(columns, Tensor) and columns.is_contiguous() and columns.shape == (3, 5, 64)
    scalar = speed._value(torch.empty(()))
    assert isinstance(scalar, Tensor) and scalar.shape == ()
    assert speed._value(7) == 7


def test_random_int8_rows_have_pads_to_the_end_of_their_storage() -> None:
    """Without those of the last row the kernels would copy a weight in every timed call."""
    packed_weight = torch.empty(N, padded(K), dtype=torch.int8)[:, :K]
    assert with_pads(random_like(packed_weight)).shape == (N, padded(K))


def test_a_linear_on_an_expanded_value_is_measured(clock: Clock) -> None:
    """No random number can be written where one element is read in many places."""
    model = Model(lambda m, x: m.fc(x.expand(4, 5, K)).sin(), fc=nn.Linear(K, N))
    rewritten(model, torch.randn(1, 5, K))
    model = Model(lambda m, x: m.fc(x.sin()), fc=nn.Linear(K, N))
    rewritten(model, torch.randn(1, 5, K).expand(4, 5, K))
    assert len(clock.questions) == 2


@pytest.mark.cuda
def test_never_slower_on_a_gpu(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 15 rows come to depends on the GPU; 16384 of 4096 are faster in int8 on all of them."""
    monkeypatch.setattr(speed, "MEASURED", ("cuda",))
    model = MODELS["plain"][0]().to("cuda")
    large = Model(lambda m, x: m.fc(m.norm(x)), norm=nn.LayerNorm(4096), fc=nn.Linear(4096, 16384))
    with torch.inference_mode():
        small = compiled(model, x.cuda())
        rows = torch.randn(16384, 4096, device="cuda", dtype=torch.float16)
        result = compiled(large.to("cuda", torch.float16), rows)
    (linear,) = small.report.linears
    assert linear.float_us > 0 and linear.int8 == (linear.int8_us <= 0.98 * linear.float_us)
    (linear,) = result.report.linears
    assert linear.int8 and 0 < linear.int8_us < linear.float_us
