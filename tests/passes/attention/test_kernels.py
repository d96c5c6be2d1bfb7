"""On CUDA the fastest attention kernel is called, torch's or ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphquant import ops
from graphquant.ir.graph import SDPA
from graphquant.ops.runtime.device import GpuProperties
from graphquant.passes.attention import kernels as attention_kernels
from graphquant.passes.attention.kernels import KERNELS, choose_kernels
from tests.passes.graphs import Model, argument, compiled, exported, rewritten

B, H, T, D = 2, 3, 5, 16


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
    monkeypatch.setattr(attention_kernels, "times", stand_in)
    monkeypatch.setattr(attention_kernels, "MEASURED", ("cpu",))
    for kernel in ("flash", "cudnn", "mem_efficient"):
        monkeypatch.setattr(torch._C, f"_get_{kernel}_sdp_enabled", lambda: True)
    monkeypatch.setattr(attention_kernels, "KERNELS", switched(lambda name: True))
    return stand_in


OF_TORCH = [
    name for name, kernel in KERNELS.items() if isinstance(kernel, attention_kernels.TorchKernel)
]
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
    assert list(clock.bound[0]) == ([*OF_TORCH, OURS[-1]] if causal else list(KERNELS))


@pytest.mark.parametrize("sm", [80, 89, 100])
def test_our_kernel_is_for_hopper_alone(
    clock: Clock, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention_kernels, "gpu_properties", lambda device: GpuProperties(sm, 108, 166_912)
    )
    chosen(*(t.transpose(1, 2) for t in qkv(B, T, H, D)))
    assert list(clock.bound[0]) == OF_TORCH


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
    chosen(*qkv(), scale=-1.0)
    chosen(*qkv(1, 1, T, 264))
    assert [list(b) for b in clock.bound] == [OF_TORCH] * 2


@pytest.mark.parametrize("clock", OURS[-1:], indirect=True)
def test_one_of_ours_computes_in_causal_order(clock: Clock) -> None:
    inputs = qkv()
    captured = chosen(*inputs, is_causal=True)
    (node,) = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
    assert node.args[3:] == (D**-0.5, "64x64", None, True)
    want = F.scaled_dot_product_attention(*inputs, is_causal=True).sin()
    torch.testing.assert_close(captured.gm(*inputs), want, rtol=2**-10, atol=2e-3)


def test_candidates_are_bound_to_values_like_those_of_the_graph(clock: Clock) -> None:
    """Heads are views of [B, T, H D]; a key that all heads share is expanded."""
    q = torch.randn(B, T, H, D, dtype=torch.bfloat16).transpose(1, 2)
    k = torch.randn(B, 1, T, D, dtype=torch.bfloat16).expand(B, H, T, D)
    chosen(q, k, k, is_causal=True)
    (bound,) = clock.bound
    for name, call in bound.items():
        kernel, inputs, causal, scale = call.args
        assert kernel is attention_kernels.KERNELS[name] and (causal, scale) == (True, D**-0.5)
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
    monkeypatch.setattr(attention_kernels, "KERNELS", switched(lambda name: name == left))
    chosen(*qkv(), is_causal=True)
    assert list(clock.bound[-1]) == [left, OURS[-1]]
    chosen(*qkv())
    assert list(clock.bound[-1]) == [left, *OURS]
    monkeypatch.setattr(attention_kernels, "KERNELS", switched(lambda name: name != left))
    chosen(*qkv())
    assert list(clock.bound[-1]) == [name for name in KERNELS if name != left]


@pytest.mark.parametrize("answer", [None, {}])
def test_without_times_torch_chooses(
    answer: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "times", lambda *_: answer)
    assert chosen(*qkv()).gm.graph.find_nodes(op="call_function", target=SDPA)


def test_nothing_is_chosen_on_a_cpu_or_with_select_always(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = qkv()
    model = Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv))
    rewritten(model, *half, select="always")
    monkeypatch.setattr(attention_kernels, "MEASURED", ("cuda",))
    rewritten(model, *half, select="faster")
    assert not clock.questions


@pytest.mark.cuda
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_each_kernel_computes_attention(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, with probabilities rounded to it: some 2^-8 of a value of one."""
    monkeypatch.setattr(attention_kernels, "times", Clock(name))
    q, k, v = (torch.randn(2, 100, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [t.transpose(1, 2) for t in (q, k, v)]
    model = Model(lambda m, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal))
    with torch.inference_mode():
        result = compiled(model, *inputs, select="faster")
        want = F.scaled_dot_product_attention(*(t.double() for t in inputs), is_causal=causal)
    assert result.got.stride() == result.want.stride()
    assert (result.got - want).abs().max() < 0.03
