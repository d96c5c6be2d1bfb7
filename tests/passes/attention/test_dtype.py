"""Attention between int8 linears runs in bfloat16 on CPUs that multiply it. As if on one, here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphquant
from graphquant import Config, Report
from graphquant.ir.graph import SDPA, arguments
from graphquant.ops import int8_linear
from graphquant.passes.attention import dtype as attention_dtype
from graphquant.passes.attention.dtype import with_bfloat16_attention
from graphquant.passes.pipeline import rewrite
from graphquant.report import Quiet
from tests.passes.graphs import Model, exported, honest, spec, text

B, T, H, D = 2, 9, 3, 16
C = H * D
LOWEST = torch.finfo(torch.float32).min
NOTE = "attention of 1 layer runs in bfloat16"


@pytest.fixture(autouse=True)
def _on_a_processor_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dtype, "has_bfloat16", lambda: True)


# Models ------------------------------------------------------------------------------------------


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], -1, D).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def separate(m: Any, x: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """BERT's spelling; the three linears become one."""
    q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
    return m.out(joined(F.scaled_dot_product_attention(q, k, v, mask, **how)))


def fused(m: Any, x: Tensor) -> Tensor:
    """timm's spelling."""
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))


def chunked(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(heads, m.qkv(x).chunk(3, dim=-1))
    return m.out(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def split(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(heads, m.qkv(x).split([C, C, C], dim=-1))
    return m.out(joined(F.scaled_dot_product_attention(q, k, v, scale=0.3)))


def cross(m: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Three products, each of its own input."""
    q, k, v = heads(m.q(x)), heads(m.k(y)), heads(m.v(z))
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))


def grouped(m: Any, x: Tensor) -> Tensor:
    """One head of k and v for all of q, as transformers' repeat_kv spells it."""
    q, k, v = heads(m.q(x)), heads(m.k1(x)), heads(m.v1(x))
    k, v = (t[:, :, None].expand(-1, 1, H, -1, -1).reshape(q.shape) for t in (k, v))
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))


def sub_norm(m: Any, x: Tensor) -> Tensor:
    """A norm between attention and its output linear, as in BEiT-3."""
    q, k, v = (heads(f(x)) for f in (m.q, m.k, m.v))
    return m.out(m.norm(joined(F.scaled_dot_product_attention(q, k, v))))


def parts() -> dict[str, nn.Module]:
    linears = {name: nn.Linear(C, C) for name in ("q", "k", "v", "out")}
    few = {name: nn.Linear(C, D) for name in ("k1", "v1")}
    return {**linears, **few, "qkv": nn.Linear(C, 3 * C), "norm": nn.LayerNorm(C)}


def model(forward: Callable[..., Tensor]) -> nn.Module:
    return Model(forward, **parts()).eval().requires_grad_(False)


class Layer(nn.Module):
    """A post-norm (BERT) or pre-norm (ViT) layer."""

    def __init__(self, *, pre: bool) -> None:
        super().__init__()
        self.attention, self.pre = model(separate), pre
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.pre:
            x = x + self.attention(self.norms[0](x), mask)
            return x + self.mlp(self.norms[1](x))
        x = self.norms[0](x + self.attention(x, mask))
        return self.norms[1](x + self.mlp(x))


class Encoder(nn.Module):
    def __init__(self, *, pre: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(pre=pre) for _ in range(2))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def x(*size: int) -> Tensor:
    return torch.randn(*(size or (B, T, C)))


@dataclass
class Changed:
    """A rewritten graph after the pass, and the report's note about it."""

    captured: Any
    graph: Graph
    report: Report

    @property
    def attention(self) -> list[torch.dtype]:
        nodes = self.graph.find_nodes(op="call_function", target=SDPA)
        return [n.meta["val"].dtype for n in nodes]

    @property
    def products(self) -> list[torch.dtype]:
        nodes = self.graph.find_nodes(op="call_function", target=int8_linear.target)
        return [arguments(n).dtype for n in nodes]


def changed(
    module: nn.Module, *args: Any, sizes: Any = None, select: str = "always", **options: Any
) -> Changed:
    captured = exported(module.eval(), *args, sizes=sizes)
    rewritten = rewrite(captured, Config(select="always", **options)).report
    before = spec(captured.gm.graph)
    report = with_bfloat16_attention(rewritten, captured, Config(select=select, **options))
    honest(captured)
    assert spec(captured.gm.graph) == before
    return Changed(captured, captured.gm.graph, report)


def run(module: nn.Module, *args: Any, **options: Any) -> tuple[Any, Report]:
    """Compiled: (result, report)."""
    torch._dynamo.reset()
    reports: list[Report] = []
    options = {"inner": "eager", "on_report": reports.append, **options}
    result = torch.compile(module, backend="graphquant", options=options)(*args)
    return result, Report.merge(reports)


def noted(report: Report) -> list[str]:
    return [n for n in report.notes if "bfloat16" in n]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# Where it applies --------------------------------------------------------------------------------

SPELLINGS: dict[str, tuple[Callable[..., Tensor], int, int]] = {  # with inputs, products
    "three linears": (separate, 1, 1),
    "one linear": (fused, 1, 1),
    "chunks": (chunked, 1, 1),
    "parts": (split, 1, 1),
    "cross-attention": (cross, 3, 3),
    "shared heads": (grouped, 1, 1),
    "norm": (sub_norm, 1, 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_only_attention_and_the_products_that_it_reads_change(name: str) -> None:
    forward, inputs, products = SPELLINGS[name]
    module, args = model(forward), [x() for _ in range(inputs)]
    result = changed(module, *args)
    assert result.attention == [torch.bfloat16]
    assert result.products == [torch.bfloat16] * products + [torch.float32]  # the last is `out`
    assert noted(result.report) == [NOTE]
    off = changed(module, *args, attention_dtype="float32")
    assert off.attention == [torch.float32] and set(off.products) == {torch.float32}
    ours, theirs = (text(r.graph) for r in (result, off))
    differ = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert [a.replace("bfloat16", "float32") for a, _ in differ] == [b for _, b in differ]
    assert len(differ) == products


@pytest.mark.parametrize("pre", [False, True], ids=["bert", "vit"])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_int8_is_as_accurate_as_with_float32_attention(pre: bool, inner: str) -> None:
    """q, k, v and the result are rounded to 8 bits, each element for itself: 0.2 % of a value at
    most, beside int8's 1 %."""
    encoder, batch = Encoder(pre=pre), x(4, 16, C)
    want = encoder(batch)
    on, report = run(encoder, batch, inner=inner)
    off, _ = run(encoder, batch, inner=inner, attention_dtype="float32")
    assert noted(report) == [NOTE.replace("1 layer", "2 layers")]
    assert on.dtype == torch.float32 and 0 < error(on, off) < 2**-8
    assert error(on, want) == pytest.approx(error(off, want), rel=0.05)


def test_inductor_runs_it() -> None:
    module, batch = model(separate), x()
    got, report = run(module, batch, inner="inductor")
    want, _ = run(module, batch)
    assert noted(report) == [NOTE]
    torch.testing.assert_close(got, want, rtol=0, atol=2**-7 * float(want.abs().max()))


def test_torchs_own_attention_module() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.attend(x, x, x, need_weights=False)[0] + x  # type: ignore[no-any-return]

    module = Model(forward, attend=nn.MultiheadAttention(C, H, batch_first=True))
    result = changed(module.eval().requires_grad_(False), x())
    assert result.attention == [torch.bfloat16]
    assert result.products == [torch.bfloat16, torch.float32]


def test_any_length() -> None:
    module = model(separate)
    length = torch.export.Dim("length", min=2, max=64)
    result = changed(module, x(), sizes={"args": ({1: length},)})
    assert result.attention == [torch.bfloat16]
    off = changed(module, x(), sizes={"args": ({1: length},)}, attention_dtype="float32")
    for n in (T, 2, 40):
        batch = x(B, n, C)
        want = off.captured.gm(batch)
        assert 0 < error(result.captured.gm(batch), want) < 2**-7


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_again_for_another_length(dynamic: bool) -> None:
    module = model(separate)
    fast = torch.compile(module, backend="graphquant", dynamic=dynamic, options={"inner": "eager"})
    for n in (T, 17):
        assert error(fast(batch := x(B, n, C)), module(batch)) < 0.03


# Masks -------------------------------------------------------------------------------------------


def masked(kind: str) -> Tensor:
    """The last keys are masked; so are all keys of the third query, and all of the last sample."""
    kept = torch.ones(B, 1, T, T, dtype=torch.bool)
    kept[..., T - 3 :] = False
    kept[:, :, 2] = False
    kept[-1] = False
    if kind == "bool":
        return kept
    return torch.zeros(kept.shape).masked_fill(~kept, {"lowest": LOWEST, "inf": -torch.inf}[kind])


@pytest.mark.parametrize("kind", ["bool", "lowest", "inf"])
def test_rows_that_are_masked_altogether_give_what_they_give_in_float32(kind: str) -> None:
    """With float32's lowest number that is the mean of all values, with -inf and bool it is 0. A
    mask in bfloat16 would round the lowest number to -inf."""
    module, args = model(separate), (x(), masked(kind))
    result = changed(module, *args)
    assert result.attention == [torch.bfloat16]
    got, want = (
        result.captured.gm(*args),
        changed(module, *args, attention_dtype="float32").captured.gm(*args),
    )
    assert bool(want.isfinite().all()) and bool(got.isfinite().all())
    assert float((got - want).abs().max()) < 2**-6 * float(want.abs().max())
    constant = (want[-1] - module.out.bias).abs().max() < 1e-6
    assert bool(constant) == (kind != "lowest")


def test_layers_share_a_float_mask_as_it_is() -> None:
    encoder, mask = Encoder(pre=True), masked("lowest")
    result = changed(encoder, x(), mask)
    given = result.graph.find_nodes(op="placeholder")[-1]
    for node in result.graph.find_nodes(op="call_function", target=SDPA):
        assert arguments(node).attn_mask is given
    assert given.meta["val"].dtype == torch.float32
    assert result.attention == [torch.bfloat16] * 2


# Where it does not -------------------------------------------------------------------------------


def _qkv(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(m.q(x)), heads(m.k(x)), heads(m.v(x))


def result_returned(m: Any, x: Tensor) -> Any:
    y = joined(F.scaled_dot_product_attention(*_qkv(m, x)))
    return m.out(y), y


def result_added(m: Any, x: Tensor) -> Tensor:
    y = joined(F.scaled_dot_product_attention(*_qkv(m, x)))
    return m.out(y) + y


def key_returned(m: Any, x: Tensor) -> Any:
    q, k, v = _qkv(m, x)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v))), k


def value_added(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v) + v))


def query_scaled(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    return m.out(joined(F.scaled_dot_product_attention(q * 0.5, k, v)))


def key_not_of_a_linear(m: Any, x: Tensor) -> Tensor:
    return m.out(joined(F.scaled_dot_product_attention(heads(m.q(x)), heads(x), heads(m.v(x)))))


def residual(m: Any, x: Tensor, y: Tensor) -> Tensor:
    q = heads(m.q(x) + y)
    return m.out(joined(F.scaled_dot_product_attention(q, heads(m.k(x)), heads(m.v(x)))))


def own_mask(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    mask = heads(m.q(x))[..., :T]
    return m.out(joined(F.scaled_dot_product_attention(q, k, v, mask)))


def activated(m: Any, x: Tensor) -> Tensor:
    return m.out(F.gelu(joined(F.scaled_dot_product_attention(*_qkv(m, x)))).sin())


def half(m: Any, x: Tensor) -> Tensor:
    """Another linear of the same input, stacked with q, k and v, that something else reads."""
    return separate(m, x) * m.qkv(x)[..., :C]


LEFT_ALONE: dict[str, tuple[Callable[..., Any], int, dict[str, Any]]] = {
    "the result is returned": (result_returned, 1, {}),
    "the result is added": (result_added, 1, {}),
    "the result is computed with": (activated, 1, {}),
    "k is returned": (key_returned, 1, {}),
    "v is added": (value_added, 1, {}),
    "q is scaled": (query_scaled, 1, {}),
    "k is an input": (key_not_of_a_linear, 1, {}),
    "q has a residual": (residual, 2, {}),
    "q is the mask": (own_mask, 1, {}),
    "stacked with others": (half, 1, {}),
    "dropout": (lambda m, x: separate(m, x, dropout_p=0.1), 1, {}),
    "q, k, v in float": (separate, 1, {"exclude": ["q", "k", "v"]}),
    "k in float": (separate, 1, {"exclude": ["k"]}),
    "out in float": (separate, 1, {"exclude": ["out"]}),
    "the option": (separate, 1, {"attention_dtype": "float32"}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_attention_that_anything_else_takes_part_in_stays_float32(name: str) -> None:
    forward, inputs, options = LEFT_ALONE[name]
    result = changed(model(forward), *(x() for _ in range(inputs)), **options)
    assert result.attention == [torch.float32]
    assert set(result.products) == {torch.float32}
    assert not noted(result.report)


def test_other_dtypes_stay_as_they_are() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        result = changed(model(separate).to(dtype), x().to(dtype))
        assert result.attention == [dtype] and not noted(result.report)


def autocast(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    with torch.autocast("cpu", torch.float16):
        y = F.scaled_dot_product_attention(q, k, v)
    return m.out(joined(y.float()))


def autocast_off(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    with torch.autocast("cpu", enabled=False):
        y = F.scaled_dot_product_attention(q, k, v)
    return m.out(joined(y))


def pinned(m: Any, x: Tensor) -> Tensor:
    q, k, v = _qkv(m, x)
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(q, k, v)
    return m.out(joined(y))


@pytest.mark.parametrize("forward", [autocast, autocast_off, pinned])
def test_contexts_of_the_model_decide(forward: Callable[..., Tensor]) -> None:
    _, report = run(model(forward), x())
    assert all(o.int8 for o in report.linears) and len(report.linears) == 4
    assert not noted(report)


def test_all_of_the_model_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, report = run(model(separate), x())
    assert not noted(report)


def test_a_mask_that_is_trained() -> None:
    """q, k and v are int8, for they need no gradient; what reads attention needs one."""
    module, mask = model(separate), torch.randn(T, T, requires_grad=True)
    with torch.enable_grad():
        got, report = run(module, x(), mask)
        got.sum().backward()
        assert not noted(report)
        assert mask.grad is not None and bool(mask.grad.any())
        _, report = run(module, x(), mask.detach())
        assert noted(report) == [NOTE]


@pytest.mark.parametrize(
    ("capabilities", "want"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_vnni": True}, False),
        ({}, False),
    ],
    ids=str,
)
def test_the_processor_must_multiply_bfloat16(
    capabilities: dict[str, bool], want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    result = changed(model(separate), x())
    assert (result.attention == [torch.bfloat16]) is bool(noted(result.report)) is want


# Measured ----------------------------------------------------------------------------------------


class Clock:
    """Runs what it is asked to time, and returns times chosen by the test."""

    def __init__(self, **microseconds: float) -> None:
        self.microseconds = microseconds
        self.questions: list[str] = []
        self.results: list[dict[str, Any]] = []

    def __call__(self, question: str, device: torch.device, candidates: Any) -> Any:
        assert device == torch.device("cpu") and list(candidates) == ["float32", "bfloat16"]
        self.questions.append(question)
        self.results.append({name: call() for name, call in candidates.items()})
        return self.microseconds


def test_it_is_bfloat16_if_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dtype, "times", clock := Clock(float32=4400.0, bfloat16=1900.0))
    result = changed(Encoder(pre=True), x(), select="faster")
    assert result.attention == [torch.bfloat16] * 2
    (note,) = noted(result.report)
    assert note.endswith(
        "2 layers runs in bfloat16: measured 3.80 ms with q, k and v, in float32 8.80 ms"
    )
    assert len(clock.questions) == 2 and len(set(clock.questions)) == 1  # one answer for both
    before, after = clock.questions[0].split("\n->\n")
    assert before != after == before.replace("None, torch.float32)", "None, torch.bfloat16)")
    for op in ("int8_linear", "scaled_dot_product_attention", "quantize"):
        assert op in before
    ours, theirs = clock.results[0]["bfloat16"], clock.results[0]["float32"]
    changed_types = {
        (a.dtype, b.dtype) for a, b in zip(ours, theirs, strict=True) if torch.is_tensor(a)
    }
    assert (torch.bfloat16, torch.float32) in changed_types


@pytest.mark.parametrize(
    "answer",
    [{"float32": 20.0, "bfloat16": 19.9}, {"float32": 20.0}, {"bfloat16": 1.0}],
    ids=["no gain", "bfloat16 failed", "float32 failed"],
)
def test_it_is_as_before_if_not(answer: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dtype, "times", clock := Clock(**answer))
    module, batch = model(separate), x()
    result = changed(module, batch, select="faster")
    assert len(clock.questions) == 1 and not noted(result.report)
    off = changed(module, batch, attention_dtype="float32")
    assert text(result.graph) == text(off.graph)
    assert result.attention == [torch.float32]


def test_a_mask_belongs_to_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dtype, "times", clock := Clock(float32=2.0, bfloat16=1.0))
    for args in ((x(),), (x(), masked("bool")), (x(), masked("inf")), (x(B, T + 1, C),)):
        changed(model(separate), *args, select="faster")
    assert len(set(clock.questions)) == 4


# Around it ---------------------------------------------------------------------------------------


def test_explain_says_it_quietly() -> None:
    report = graphquant.explain(model(separate), x())
    (note,) = (n for n in report.notes if "bfloat16" in n)
    assert note == NOTE and isinstance(note, Quiet)
    options = {"attention_dtype": "float32"}
    assert not noted(graphquant.explain(model(separate), x(), options=options))


def test_compare_measures_what_runs() -> None:
    """The errors of linears on the float model's values are those of int8 alone."""
    encoder, batches = Encoder(pre=False), [x(4, 16, C)]
    on = graphquant.compare(encoder, batches)
    off = graphquant.compare(encoder, batches, options={"attention_dtype": "float32"})
    assert [s.local for s in on.sites] == [s.local for s in off.sites]
    assert [s.accumulated for s in on.sites] != [s.accumulated for s in off.sites]
    (got,), (want,) = on.outputs, off.outputs
    assert got.error.relative == pytest.approx(want.error.relative, rel=0.05)
    assert got.error.relative != want.error.relative


def test_an_export_keeps_float32() -> None:
    module = model(separate)
    program = graphquant.export(module, (x(),))
    dtypes = {
        n.meta["val"].dtype for n in program.graph.find_nodes(op="call_function", target=SDPA)
    }
    assert dtypes == {torch.float32}
    with pytest.raises(graphquant.OptionError, match="attention_dtype is an option of torch"):
        graphquant.export(module, (x(),), attention_dtype="float32")
