"""Masks that mask nothing are dropped, all others stay; on CUDA the fastest kernel is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphquant import ops
from graphquant.passes import attention
from graphquant.passes.attention import KERNELS, SDPA, choose_kernels, drop_empty_masks
from graphquant.passes.graph import calls, full_args
from tests.passes.graphs import Model, argument, compiled, exported, honest, rewritten

B, H, T, D = 2, 3, 5, 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, H, T, D)


def attending(mask: Callable[..., Any], **how: Any) -> nn.Module:
    """Attention of x to itself; mask(m, x) is traced with it."""
    return Model(lambda m, x: F.scaled_dot_product_attention(x, x, x, mask(m, x), **how))


def of_index(m: Any, x: Tensor) -> Tensor:
    """As transformers makes them: a condition on indices, by broadcasting."""
    queries, keys = torch.arange(T), torch.arange(T)
    seen = (queries[None, :, None] >= 0) & (keys[None, None, :] >= 0)
    return seen[:, None].expand(B, -1, -1, -1)


EMPTY: dict[str, Callable[..., Any]] = {
    "ones": lambda m, x: torch.ones(T, T, dtype=torch.bool),
    "index": of_index,
    "length of the input": lambda m, x: torch.arange(x.shape[-2])[None] < x.shape[-2],
    "padding of no tokens": lambda m, x: torch.ones(B, T, dtype=torch.bool)[:, None, None],
    "additive": lambda m, x: torch.zeros(T, T),
    "additive of a condition": lambda m, x: torch.where(of_index(m, x), 0.0, -torch.inf),
    "inverted": lambda m, x: (1.0 - torch.ones(B, 1, 1, T)) * torch.finfo(torch.float32).min,
}

SOME: dict[str, Callable[..., Any]] = {
    "causal": lambda m, x: torch.ones(T, T, dtype=torch.bool).tril(),
    "one False": lambda m, x: torch.arange(T * T).view(T, T) != 7,
    "window": lambda m, x: (torch.arange(T)[:, None] - torch.arange(T)[None]).abs() <= 2,
    "additive": lambda m, x: torch.where(torch.arange(T) < T - 1, 0.0, -torch.inf).expand(T, T),
    "distances": lambda m, x: -(torch.arange(T)[:, None] - torch.arange(T)).abs().float(),
    "not a number": lambda m, x: torch.full((T, T), torch.nan),
    "input": lambda m, x: x[0, 0, :, :T] < 100,
    "input, additive": lambda m, x: x[0, 0, :, :T] * 0,
    "random": lambda m, x: torch.rand(T, T) >= 0,
    "random, additive": lambda m, x: F.dropout(torch.zeros(T, T), 0.5, True),
}


def mask_of(graph: Any) -> Any:
    (node,) = graph.find_nodes(op="call_function", target=SDPA)
    return argument(node, "attn_mask")


# Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMPTY)
def test_a_mask_that_masks_nothing_is_dropped(name: str, x: Tensor) -> None:
    """Both are float32 softmaxes over five keys: sums of a few products, in another order."""
    result = rewritten(attending(EMPTY[name]), x)
    assert mask_of(result.graph) is None
    ops = result.ops()
    assert set(ops) == {"scaled_dot_product_attention"}, "what made the mask is still there"
    assert torch.equal(result.got, F.scaled_dot_product_attention(x, x, x))
    assert torch.allclose(result.got, result.want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_any_other_mask_stays(name: str, x: Tensor) -> None:
    model = attending(SOME[name])
    torch.manual_seed(1)
    captured = exported(model, x)
    drop_empty_masks(captured.gm.graph)
    honest(captured)
    assert isinstance(mask_of(captured.gm.graph), Node)
    torch.manual_seed(2)
    got = captured.gm(x)
    torch.manual_seed(2)
    assert torch.equal(got.nan_to_num(9.0), model(x).nan_to_num(9.0))


def written_whole(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[0, 1] = False
    return mask


def written_in_a_view(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(B, 1, 1, T)
    mask.view(-1)[-2:].fill_(-torch.inf)
    return mask


def filled(m: Any, x: Tensor) -> Tensor:
    return torch.empty(T, T).fill_(0.0).clone()


@pytest.mark.parametrize("mask", [written_whole, written_in_a_view, filled])
def test_a_mask_that_is_written_in_place_is_not_what_it_was_made_as(mask: Any, x: Tensor) -> None:
    result = rewritten(attending(mask), x)
    assert isinstance(mask_of(result.graph), Node)
    assert torch.equal(result.got, result.want)


def of_vmap(m: Any, x: Tensor) -> Tensor:
    """As transformers made them up to 4.5x."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) & (k >= 0) & (b >= 0)

    over = allowed
    for dims in [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None)]:
        over = torch.vmap(over, in_dims=dims)
    over = torch.vmap(over, in_dims=(0, None, None, None))
    return over(torch.arange(B), torch.arange(1), torch.arange(T), torch.arange(T))


def test_a_mask_made_by_vmap_stays(x: Tensor) -> None:
    """In an exported graph vmap is a row of calls that open and close it: not evaluated."""
    captured = exported(attending(of_vmap), x)
    drop_empty_masks(captured.gm.graph)
    assert isinstance(mask_of(captured.gm.graph), Node)
    assert torch.equal(captured.gm(x), attending(of_vmap)(x))


def test_a_mask_that_is_a_buffer_or_an_argument_stays(x: Tensor) -> None:
    model = Model(
        lambda m, x, a: (
            F.scaled_dot_product_attention(x, x, x, m.mask),
            F.scaled_dot_product_attention(x, x, x, a),
        ),
        mask=torch.ones(T, T, dtype=torch.bool),
    )
    result = rewritten(model, x, torch.ones(T, T, dtype=torch.bool))
    masks = [argument(n, "attn_mask") for n in calls(result.graph, lambda n: n.target is SDPA)]
    assert all(isinstance(m, Node) for m in masks)
    assert all(map(torch.equal, result.got, result.want))


def test_other_arguments_stay_as_they_are(x: Tensor) -> None:
    how = {"is_causal": False, "scale": 0.5, "enable_gqa": True}

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x[:, :1], x[:, 1:2], EMPTY["ones"](m, x), **how)

    result = rewritten(Model(forward), x)
    (node,) = result.graph.find_nodes(op="call_function", target=SDPA)
    assert full_args(node)[3:] == (None, 0.0, False, 0.5, True)
    assert torch.allclose(result.got, result.want, rtol=1e-5, atol=1e-5)


def test_causal_attention_is_left_alone(x: Tensor) -> None:
    result = rewritten(attending(lambda m, x: None, is_causal=True), x)
    (node,) = result.graph.find_nodes(op="call_function", target=SDPA)
    assert argument(node, "is_causal") is True
    assert torch.equal(result.got, result.want)


def test_layers_that_share_a_mask_all_lose_it_and_it_is_evaluated_once(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = of_index(m, x)
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, mask)
        return x

    evaluated: list[Node] = []
    real = attention._masks_nothing

    def spy(mask: Node, *rest: Any) -> bool:
        evaluated.append(mask)
        return real(mask, *rest)

    monkeypatch.setattr(attention, "_masks_nothing", spy)
    captured = exported(Model(forward), x)
    drop_empty_masks(captured.gm.graph)
    assert len(evaluated) == 1
    assert not [n for n in captured.gm.graph.nodes if "ge" in n.name or "arange" in n.name]


def test_a_mask_that_is_read_elsewhere_is_dropped_where_it_masks_nothing(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        mask = of_index(m, x)
        return F.scaled_dot_product_attention(x, x, x, mask), mask

    result = rewritten(Model(forward), x)
    assert mask_of(result.graph) is None
    assert torch.equal(result.got[1], result.want[1])


def test_a_mask_too_large_to_evaluate_stays(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_ELEMENTS", T * T - 1)
    assert mask_of(rewritten(attending(EMPTY["ones"]), x).graph) is not None
    monkeypatch.setattr(attention, "MOST_ELEMENTS", T * T)
    assert mask_of(rewritten(attending(EMPTY["ones"]), x).graph) is None


@pytest.mark.parametrize("some", [False, True])
def test_a_dynamic_batch_stays_right(some: bool, x: Tensor) -> None:
    """A mask over a batch of any size is not known; one over the tokens alone is."""

    def over_batch(m: Any, x: Tensor) -> Tensor:
        last = T - 1 if some else T
        return (torch.arange(T) < last)[None, None, None].expand(x.shape[0], 1, T, T)

    def over_tokens(m: Any, x: Tensor) -> Tensor:
        return (torch.arange(T) < (T - 1 if some else T)).expand(T, T)

    for mask in (over_batch, over_tokens):
        model = attending(mask)
        batch = torch.export.Dim("batch", min=2, max=64)
        result = rewritten(model, x, sizes={"args": ({0: batch},)})
        assert (mask_of(result.graph) is None) == (not some and mask is over_tokens)
        more = torch.randn(7, H, T, D)
        assert torch.allclose(result.captured.gm(more), model(more), rtol=1e-5, atol=1e-5)


def test_tokens_of_any_number_keep_their_mask() -> None:
    """All are seen up to eight tokens; that may not be taken for all lengths."""

    def window(m: Any, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[-2])
        return (at[:, None] - at).abs() < 8

    model = attending(window)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    result = rewritten(model, torch.randn(1, 1, 6, D), sizes={"args": ({2: tokens},)})
    longer = torch.randn(1, 1, 20, D)
    assert torch.allclose(result.captured.gm(longer), model(longer), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(longer), attending(lambda m, x: None)(longer), atol=1e-3)


@pytest.mark.parametrize("name", ["siglip", "bert", "dinov2"])
def test_models_of_transformers_lose_their_empty_masks(name: str) -> None:
    from tools import zoo

    entry = zoo.SMALL[name]
    args, kwargs = entry.inputs(2)
    seen: list[Any] = []

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = entry.build("sdpa")

        def forward(self, *args: Any) -> Any:
            return self.model(*args, **kwargs)[0]

    real = attention.drop_empty_masks

    def spy(graph: Any) -> None:
        real(graph)
        seen.extend(argument(n, "attn_mask") for n in calls(graph, lambda n: n.target is SDPA))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphquant.passes.pipeline.drop_empty_masks", spy)
        result = compiled(Wrapped(), *args, select="always")
    assert seen
    given = kwargs.get("attention_mask")
    assert all((m is None) == (given is None) for m in seen)
    assert (result.got - result.want).norm() < 0.05 * result.want.norm()


# Kernels ----------------------------------------------------------------------------------------


class Clock:
    """Says which kernel is the fastest."""

    def __init__(self, fastest: str) -> None:
        self.fastest = fastest
        self.questions: list[str] = []
        self.bound: list[dict[str, Any]] = []

    def __call__(self, question: str, device: torch.device, candidates: Any) -> dict[str, float]:
        self.questions.append(question)
        self.bound.append(candidates)
        return {name: 1.0 if name == self.fastest else 2.0 for name in candidates}


@pytest.fixture
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock(getattr(request, "param", "flash"))
    monkeypatch.setattr(attention, "times", stand_in)
    monkeypatch.setattr(attention, "MEASURED", ("cpu",))
    for kernel in ("flash", "cudnn", "mem_efficient"):
        monkeypatch.setattr(torch._C, f"_get_{kernel}_sdp_enabled", lambda: True)
    monkeypatch.setattr(attention, "KERNELS", switched(lambda name: True))
    return stand_in


OF_TORCH = [name for name, kernel in KERNELS.items() if isinstance(kernel, attention.OfTorch)]
OURS = [name for name in KERNELS if name not in OF_TORCH]


def switched(on: Callable[[str], bool]) -> dict[str, Any]:
    """KERNELS, of which torch's are allowed as on(name) says."""
    return {
        name: replace(k, allowed=partial(on, name)) if name in OF_TORCH else k
        for name, k in KERNELS.items()
    }


def chosen(*args: Tensor, needs_gradient: bool = False, sizes: Any = None, **how: Any) -> Any:
    """The graph of attention(*args), after the choice."""
    model = Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv, **how).sin())
    captured = exported(model, *args, sizes=sizes)
    every = set(captured.gm.graph.nodes) if needs_gradient else set()
    choose_kernels(captured.gm.graph, every)
    captured.gm.graph.lint()
    return captured


def qkv(*shape: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.randn(*(shape or (B, H, T, D))).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("clock", OF_TORCH, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("causal", "scale"), [(False, None), (True, 0.25)])
def test_the_fastest_kernel_is_called_in_place_of_the_choice_that_torch_would_make(
    clock: Clock, dtype: torch.dtype, causal: bool, scale: float | None
) -> None:
    captured = chosen(*qkv(dtype=dtype), is_causal=causal, scale=scale)
    graph = captured.gm.graph
    assert not graph.find_nodes(op="call_function", target=SDPA)
    op = KERNELS[clock.fastest].op
    (node,) = graph.find_nodes(op="call_function", target=op)
    q, k, v = graph.find_nodes(op="placeholder")
    assert [argument(node, name) for name in ("query", "key", "value")] == [q, k, v]
    assert argument(node, "dropout_p") == 0.0 and argument(node, "is_causal") is causal
    assert argument(node, "scale") == (scale or D**-0.5)
    names = {a.name for a in op._schema.arguments}
    if "attn_bias" in names:
        assert argument(node, "attn_bias") is None
    for log_sum_exp in names & {"compute_log_sumexp", "compute_logsumexp"}:
        assert argument(node, log_sum_exp) is False
    (first,) = node.users
    args, kwargs = torch.fx.node.map_arg(
        (node.args, node.kwargs), lambda n: n.meta["val"].to("meta")
    )
    out = op(*args, **kwargs)[0]
    assert (out.shape, out.dtype) == (first.meta["val"].shape, first.meta["val"].dtype)
    assert first.args == (node, 0) and len(first.users) == 1
    assert list(clock.bound[0]) == (OF_TORCH if causal else list(KERNELS))


@pytest.mark.parametrize("clock", OURS, indirect=True)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_our_kernel_is_called_if_it_is_the_fastest(clock: Clock, scale: float | None) -> None:
    inputs = [t.transpose(1, 2) for t in qkv(B, T, H, D)]
    captured = chosen(*inputs, scale=scale)
    graph = captured.gm.graph
    (node,) = graph.find_nodes(op="call_function", target=ops.attention.target)
    assert not graph.find_nodes(op="call_function", target=SDPA)
    q, k, v = graph.find_nodes(op="placeholder")
    tile = clock.fastest.removeprefix("graphquant ")
    assert node.args == (q, k, v, scale or D**-0.5, tile)
    got = captured.gm(*inputs)
    want = F.scaled_dot_product_attention(*inputs, scale=scale).sin()
    torch.testing.assert_close(got, want, rtol=2**-10, atol=2e-3)
    real = ops.attention(*inputs, scale or D**-0.5, tile)
    traced = node.meta["val"]
    assert (traced.shape, traced.stride(), traced.dtype) == (real.shape, real.stride(), real.dtype)


def test_our_kernel_is_not_asked_for_what_it_does_not_compute(clock: Clock) -> None:
    chosen(*qkv(), is_causal=True)
    chosen(*qkv(), scale=-1.0)
    chosen(*qkv(1, 1, T, 264))
    assert [list(b) for b in clock.bound] == [OF_TORCH] * 3


def test_candidates_are_bound_to_values_like_those_of_the_graph(clock: Clock) -> None:
    """Heads are views of [B, T, H D]; a key that all heads share is expanded."""
    q = torch.randn(B, T, H, D, dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(B, 1, T, D, dtype=torch.bfloat16).expand(B, H, T, D)
    chosen(q, k, k, is_causal=True)
    (bound,) = clock.bound
    for name, call in bound.items():
        kernel, inputs, causal, scale = call.args
        assert kernel.op is KERNELS[name].op and (causal, scale) == (True, D**-0.5)
        for made, real in zip(inputs(), (q, k, k), strict=True):
            assert (made.shape, made.stride()) == (real.shape, real.stride())
            assert made.dtype == real.dtype and made.float().std() > 0.5


def test_equal_sizes_ask_the_same_question_and_others_do_not(clock: Clock) -> None:
    chosen(*qkv())
    chosen(*qkv())
    chosen(*qkv(), is_causal=True)
    chosen(*qkv(B, H, T + 1, D))
    chosen(*qkv(dtype=torch.bfloat16))
    chosen(*[t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv()])
    assert clock.questions[0] == clock.questions[1]
    assert len(set(clock.questions)) == 5


LEFT_ALONE: dict[str, tuple[Callable[[], list[Tensor]], dict[str, Any]]] = {
    "dropout": (qkv, {"dropout_p": 0.1}),
    "mask": (qkv, {"attn_mask": torch.ones(T, T, dtype=torch.bool).tril()}),
    "grouped queries": (qkv, {"enable_gqa": True}),
    "float32": (lambda: qkv(dtype=torch.float32), {}),
    "width": (lambda: qkv(B, H, T, 12), {}),
    "three dims": (lambda: qkv(H, T, D), {}),
    "five dims": (lambda: qkv(B, 1, H, T, D), {}),
    "columns apart": (lambda: [t.transpose(2, 3) for t in qkv(B, H, 16, 16)], {}),
    "one batch of keys": (lambda: [qkv()[0], *qkv(1, H, T, D)[1:]], {}),
    "one head of keys": (lambda: [qkv()[0], *qkv(B, 1, T, D)[1:]], {}),
    "a part, causal": (lambda: [qkv()[0][:, :, 2:], *qkv()[1:]], {"is_causal": True}),
    "needs a gradient": (qkv, {"needs_gradient": True}),
    "any batch": (qkv, {"sizes": {"args": ({0: torch.export.Dim("batch", min=2, max=9)},) * 3}}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_kernels_may_not_take_or_tell_alike_is_left_alone(name: str, clock: Clock) -> None:
    make, how = LEFT_ALONE[name]
    graph = chosen(*make(), **how).gm.graph
    assert graph.find_nodes(op="call_function", target=SDPA)
    assert not clock.questions


def test_fewer_queries_than_keys_are_timed_where_nothing_is_causal(clock: Clock) -> None:
    q, k, v = qkv()
    chosen(q[:, :, 2:], k, v)
    assert len(clock.questions) == 1


@pytest.mark.parametrize("left", OF_TORCH)
def test_what_the_user_switched_off_is_not_called(
    left: str, clock: Clock, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attention, "KERNELS", switched(lambda name: name == left))
    chosen(*qkv(), is_causal=True)  # one kernel: nothing to measure
    assert not clock.questions
    chosen(*qkv())
    assert list(clock.bound[-1]) == [left, *OURS]
    monkeypatch.setattr(attention, "KERNELS", switched(lambda name: name != left))
    chosen(*qkv())
    assert list(clock.bound[-1]) == [name for name in KERNELS if name != left]


@pytest.mark.parametrize("answer", [None, {}])
def test_without_times_torch_chooses(
    answer: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "times", lambda *_: answer)
    assert chosen(*qkv()).gm.graph.find_nodes(op="call_function", target=SDPA)


def test_nothing_is_chosen_on_a_cpu_or_with_select_always(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = qkv()
    model = Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv))
    rewritten(model, *half, select="always")
    monkeypatch.setattr(attention, "MEASURED", ("cuda",))
    rewritten(model, *half, select="faster")
    assert not clock.questions


@pytest.mark.cuda
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_each_kernel_computes_attention(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, with probabilities rounded to it: some 2^-8 of a value of one."""
    monkeypatch.setattr(attention, "times", Clock(name))
    q, k, v = (torch.randn(2, 100, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [t.transpose(1, 2) for t in (q, k, v)]
    model = Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal))
    with torch.inference_mode():
        result = compiled(model, *inputs, select="faster")
        want = F.scaled_dot_product_attention(*(t.double() for t in inputs), is_causal=causal)
    assert result.got.stride() == result.want.stride()
    assert (result.got - want).abs().max() < 0.03
