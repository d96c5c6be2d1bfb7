"""On a CPU our attention is called in place of torch's where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphquant
from graphquant import Config, ops
from graphquant.ir.graph import SDPA
from graphquant.passes.attention import dtype as attention_dtype
from graphquant.passes.attention import on_cpu
from graphquant.passes.attention.dtype import with_bfloat16_attention
from graphquant.passes.attention.on_cpu import choose_attention
from graphquant.passes.pipeline import rewrite
from tests.passes.graphs import Model, compiled, exported, honest, spec

B, H, S, D = 2, 3, 70, 16
FASTER = Config(select="faster")
OURS = {"torch": 2.0, "graphquant": 1.0}


class Clock:
    """Runs what it is asked to time, and returns times chosen by the test."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.questions: list[str] = []
        self.results: list[dict[str, Any]] = []

    def __call__(self, question: str, device: torch.device, candidates: Any) -> Any:
        assert device == torch.device("cpu") and list(candidates) == ["torch", "graphquant"]
        self.questions.append(question)
        self.results.append({name: call() for name, call in candidates.items()})
        return self.answer


@pytest.fixture
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock(getattr(request, "param", OURS))
    monkeypatch.setattr(on_cpu, "times", stand_in)
    return stand_in


def chosen(model: nn.Module, *args: Any, sizes: Any = None, config: Config = FASTER) -> Any:
    """The graph after the choice."""
    captured = exported(model.eval(), *args, sizes=sizes)
    before = spec(captured.gm.graph)
    choose_attention(captured, config)
    honest(captured)
    assert spec(captured.gm.graph) == before
    return captured


def attention(**how: Any) -> nn.Module:
    return Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv, **how))


def heads(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, H, S, D] as linears make them: in memory, heads of a token are side by side."""
    b, h, s, d = size or (B, H, S, D)
    return torch.randn(b, s, h, d).to(dtype).transpose(1, 2)


def qkv(*size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [heads(*size, dtype=dtype) for _ in range(3)]


def is_ours(captured: Any) -> bool:
    left, ours = (
        len(captured.gm.graph.find_nodes(op="call_function", target=target))
        for target in (SDPA, ops.attention.target)
    )
    assert left + ours == 1
    return bool(ours)


# Where it is called ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_ours_is_called_if_it_is_faster(
    dtype: torch.dtype, scale: float | None, clock: Clock
) -> None:
    model, inputs = attention(scale=scale), qkv(dtype=dtype)
    captured = chosen(model, *inputs)
    assert is_ours(captured)
    (node,) = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    assert node.args == (*placeholders, scale or D**-0.5)
    got, want = captured.gm(*inputs), model(*inputs)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=eps, atol=max(2 * eps, 1e-5))


@pytest.mark.parametrize(
    "clock",
    [{"torch": 1.0, "graphquant": 0.99}, {"torch": 1.0}, {"graphquant": 1.0}, {}, None],
    ids=["no gain", "ours failed", "torch failed", "both failed", "unknown"],
    indirect=True,
)
def test_torchs_stays_if_not(clock: Clock) -> None:
    assert not is_ours(chosen(attention(), *qkv()))
    assert len(clock.questions) == 1


def test_both_candidates_compute_attention_on_values_like_those_of_the_graph(clock: Clock) -> None:
    chosen(attention(scale=0.3), heads(), *qkv(B, H, S + 5, D)[1:])
    (results,) = clock.results
    assert results["graphquant"].shape == (B, H, S, D)
    assert results["graphquant"].stride() == results["torch"].stride()
    assert results["torch"].std() > 0.05
    torch.testing.assert_close(results["graphquant"], results["torch"], rtol=1e-5, atol=1e-5)


def test_equal_sizes_ask_the_same_question_and_others_do_not(clock: Clock) -> None:
    for inputs in (
        *(qkv(), qkv(), qkv(B, H, S + 1, D), qkv(dtype=torch.bfloat16)),
        [t.contiguous() for t in qkv()],
    ):
        chosen(attention(), *inputs)
    assert clock.questions[0] == clock.questions[1]
    assert len(set(clock.questions)) == 4


def test_sizes_that_are_symbols_are_measured_as_they_were_seen(clock: Clock) -> None:
    batch, length = (torch.export.Dim(n, min=2, max=999) for n in ("batch", "length"))
    sizes = {"args": ({0: batch, 2: length},) * 3}
    captured = chosen(attention(), *qkv(), sizes=sizes)
    assert is_ours(captured)
    chosen(attention(), *qkv())
    assert len(set(clock.questions)) == 1
    inputs = qkv(5, H, 200, D)
    got, want = captured.gm(*inputs), attention()(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_heads_that_share_a_key_are_read_where_they_are(clock: Clock) -> None:
    q, k = heads(), heads(B, 1, S, D).expand(B, H, S, D)
    model = attention()
    captured = chosen(model, q, k, k)
    assert is_ours(captured)
    torch.testing.assert_close(captured.gm(q, k, k), model(q, k, k), rtol=1e-5, atol=1e-5)


def test_it_is_compiled_for_any_length(clock: Clock) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (m.q, m.k, m.v))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    linears = {name: nn.Linear(H * D, H * D) for name in ("q", "k", "v", "out")}
    model = Model(forward, **linears).eval().requires_grad_(False)
    options = {"quantize": False, "select": "faster"}
    run = torch.compile(model, backend="graphquant", dynamic=True, options=options)
    for n in (S, 9):
        x = torch.randn(B, n, H * D)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(clock.questions) == 1


# Where it is not ---------------------------------------------------------------------------------


def with_autocast(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)


def with_math(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


LEFT_ALONE: dict[str, tuple[Callable[[], list[Tensor]], dict[str, Any]]] = {
    "dropout": (qkv, {"dropout_p": 0.1}),
    "mask": (qkv, {"attn_mask": torch.ones(S, S, dtype=torch.bool).tril()}),
    "causal": (qkv, {"is_causal": True}),
    "grouped queries": (qkv, {"enable_gqa": True}),
    "negative scale": (qkv, {"scale": -1.0}),
    "float64": (lambda: qkv(dtype=torch.float64), {}),
    "three dims": (lambda: [t[0] for t in qkv()], {}),
    "five dims": (lambda: [t[None] for t in qkv()], {}),
    "one batch of keys": (lambda: [heads(), heads(1, H, S, D), heads(1, H, S, D)], {}),
    "one head of keys": (lambda: [heads(), heads(B, 1, S, D), heads(B, 1, S, D)], {}),
    "other values": (lambda: [heads(), heads(), heads(B, H, S, 8)], {}),
    "any width": (qkv, {"sizes": {"args": ({3: torch.export.Dim("width", min=2, max=99)},) * 3}}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_kernel_does_not_compute_is_left_alone(name: str, clock: Clock) -> None:
    make, how = LEFT_ALONE[name]
    sizes = how.get("sizes")
    model = attention(**{k: v for k, v in how.items() if k != "sizes"})
    assert not is_ours(chosen(model, *make(), sizes=sizes))
    assert not clock.questions


@pytest.mark.parametrize("forward", [with_autocast, with_math])
def test_contexts_of_the_model_decide(forward: Callable[..., Tensor], clock: Clock) -> None:
    model, inputs = Model(forward), qkv()
    result = compiled(model, *inputs, select="faster")
    assert not clock.questions
    assert torch.equal(result.got, result.want)


def test_what_the_user_switched_off_is_not_called(clock: Clock) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert not is_ours(chosen(attention(), *qkv()))
    assert not clock.questions


def test_attention_that_needs_a_gradient_is_left_alone(clock: Clock) -> None:
    q, k, v = qkv()
    q.requires_grad_(True)
    with torch.enable_grad():
        result = compiled(attention(), q, k, v, select="faster")
        result.got.sum().backward()
    assert not clock.questions and q.grad is not None


def test_without_kernels_nothing_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu.cpu, "missing", lambda: "no compiler")
    assert not is_ours(chosen(attention(), *qkv()))
    assert not clock.questions


def test_nothing_is_chosen_with_select_always(clock: Clock) -> None:
    assert not is_ours(chosen(attention(), *qkv(), config=Config(select="always")))
    compiled(attention(), *qkv(), select="always")
    assert not clock.questions


# Around it ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two layers of attention between linears, without an MLP."""

    def __init__(self) -> None:
        super().__init__()
        C = H * D
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(C, C) for _ in range(2))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


def test_it_follows_the_choice_of_the_dtype(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dtype, "has_bfloat16", lambda: True)
    encoder, x = Encoder(), torch.randn(B, S, H * D)

    def run(config: Config) -> Tensor:
        captured = exported(encoder, x)
        report = rewrite(captured, Config(select="always")).report
        with_bfloat16_attention(report, captured, Config(select="always"))
        choose_attention(captured, config)
        honest(captured)
        found = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
        assert [n.meta["val"].dtype for n in found] == [torch.bfloat16] * (
            2 * (config.select == "faster")
        )
        y: Tensor = captured.gm(x)
        return y

    got, want = run(FASTER), run(Config(select="always"))
    assert len(clock.questions) == 2 and len(set(clock.questions)) == 1
    assert "bfloat16" in clock.questions[0]
    assert float((got - want).norm() / want.norm()) < 2**-8


def test_exports_keep_torchs_attention(clock: Clock) -> None:
    program = graphquant.export(Encoder(), (torch.randn(B, S, H * D),), select="faster")
    assert len(program.graph.find_nodes(op="call_function", target=SDPA)) == 2
    assert not clock.questions


def test_compare_measures_what_runs(clock: Clock) -> None:
    batches = [torch.randn(B, S, H * D)]
    graphquant.compare(Encoder(), batches, options={"quantize": False, "select": "faster"})
    assert len(clock.questions) == 2


# Masks -------------------------------------------------------------------------------------------


def padded(make: Callable[[Tensor], Tensor]) -> nn.Module:
    """Self-attention with a mask made of which tokens are valid, [B, S] int64."""
    return Model(lambda m, q, k, v, valid: F.scaled_dot_product_attention(q, k, v, make(valid)))


KEY_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda valid: valid.bool()[:, None, None].expand(-1, 1, S, S),
    "not expanded": lambda valid: valid.bool()[:, None, None],
    "additive": lambda valid: torch.where(valid.bool()[:, None, None], 0.0, -1e38),
}
OTHER_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": lambda valid: valid.bool()[:, None, None] & torch.ones(S, S, dtype=torch.bool).tril(),
    "window": lambda valid: (
        valid.bool()[:, None, None] & ((torch.arange(S)[:, None] - torch.arange(S)).abs() <= 3)
    ),
    "bias": lambda valid: torch.where(
        valid.bool()[:, None, None], torch.arange(S).float() / 9, -torch.inf
    ),
    "of pairs": lambda valid: valid.bool()[:, None, None] & valid.bool()[:, None, :, None],
    "documents": lambda valid: valid[:, None, None] == valid[:, None, :, None],
}


@pytest.fixture
def valid() -> Tensor:
    made = torch.ones(B, S, dtype=torch.int64)
    made[0, 40:] = 0
    made[1, :7] = 0
    return made


@pytest.mark.parametrize("name", KEY_MASKS)
def test_a_mask_of_keys_leaves_the_others_out(name: str, valid: Tensor, clock: Clock) -> None:
    model = padded(KEY_MASKS[name])
    captured = chosen(model, *qkv(), valid)
    assert is_ours(captured)
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = (*qkv(), valid.roll(seed, 1))
        torch.testing.assert_close(captured.gm(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_masks_stay_torchs(name: str, valid: Tensor, clock: Clock) -> None:
    assert not is_ours(chosen(padded(OTHER_MASKS[name]), *qkv(), valid))
    assert not clock.questions


def test_a_mask_in_a_question_makes_it_another(valid: Tensor, clock: Clock) -> None:
    chosen(attention(), *qkv())
    for make in KEY_MASKS.values():
        chosen(padded(make), *qkv(), valid)
    assert len(set(clock.questions)) == 4


def test_sentences_of_any_length_have_the_models_results(valid: Tensor, clock: Clock) -> None:
    batch, length = (torch.export.Dim(n, min=2, max=999) for n in ("batch", "length"))
    sizes = {"args": (*({0: batch, 2: length},) * 3, {0: batch, 1: length})}
    model = Model(
        lambda m, *args: F.scaled_dot_product_attention(*args[:3], args[3].bool()[:, None, None])
    )
    captured = chosen(model, *qkv(), valid, sizes=sizes)
    assert is_ours(captured)
    inputs = (*qkv(5, H, 90, D), torch.rand(5, 90).round().long())
    torch.testing.assert_close(captured.gm(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_layers_share_the_mask_of_keys(valid: Tensor, clock: Clock) -> None:
    def forward(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        mask = KEY_MASKS["bool"](valid)
        for _ in range(3):
            x = x + F.scaled_dot_product_attention(x, x, x, mask)
        return x

    captured = chosen(Model(forward), heads(), valid)
    ours = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
    assert len(ours) == 3 and len({n.args[5] for n in ours}) == 1
