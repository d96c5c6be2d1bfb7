"""On Hopper, attention with a mask calls our kernel if it is the fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from graphquant import ops
from graphquant.ir.graph import SDPA
from graphquant.ops.attention.hopper_tiles import MASKED
from graphquant.ops.runtime.device import GpuProperties
from graphquant.passes.attention import kernels as attention_kernels
from graphquant.passes.attention import masked
from graphquant.passes.attention.masked import choose_masked_kernels
from tests.passes.graphs import Model, compiled, exported

B, H, S, D = 5, 4, 9, 16


class Clock:
    """Says which kernel is the fastest, and keeps what was asked."""

    def __init__(self, fastest: str) -> None:
        self.fastest = fastest
        self.questions: list[str] = []

    def __call__(self, question: str, device: torch.device, candidates: Any) -> dict[str, float]:
        self.questions.append(question)
        self.shapes = {name: call().shape for name, call in candidates.items()}
        return {name: 1.0 if name == self.fastest else 2.0 for name in candidates}


@pytest.fixture
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock(getattr(request, "param", "graphquant"))
    monkeypatch.setattr(masked, "times", stand_in)
    monkeypatch.setattr(attention_kernels, "MEASURED", ("cpu",))
    for kernel in ("flash", "cudnn", "mem_efficient"):
        monkeypatch.setattr(torch._C, f"_get_{kernel}_sdp_enabled", lambda: True)
    return stand_in


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*(shape or (B, H, S, D)), generator=g).to(dtype) for _ in range(3)]


def masks() -> Tensor:
    """[B, S] int64: all valid, padded on the right, on the left, with holes, one token."""
    valid = torch.ones(B, S, dtype=torch.int64)
    valid[1, 5:] = valid[2, :3] = valid[3, 1::2] = valid[4, 1:] = 0
    return valid


def chosen(
    see: Callable[..., Any], *more: Tensor, q: list[Tensor] | None = None, **how: Any
) -> Any:
    """(the graph of attention with the mask see(valid, *more), after the choice; its inputs)"""
    parts = {k: how.pop(k) for k in ("bias",) if k in how}

    def attend(m: Any, valid: Tensor, *inputs: Tensor) -> Tensor:
        mask = see(valid, *inputs[3:], **({"bias": m.bias} if parts else {}))
        return F.scaled_dot_product_attention(*inputs[:3], mask, **how).sin()

    inputs = (masks(), *(q or qkv()), *more)
    captured = exported(Model(attend, **parts), *inputs)
    choose_masked_kernels(captured, set())
    captured.gm.graph.eliminate_dead_code()
    captured.gm.graph.lint()
    captured.gm.recompile()
    return captured, inputs


def our_call(captured: Any) -> Node:
    (node,) = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
    assert not captured.gm.graph.find_nodes(op="call_function", target=SDPA)
    found: Node = node
    return found


def assert_same(captured: Any, inputs: Any, want: Callable[..., Tensor]) -> None:
    """Each query, those at padding as well, has the result of the model."""
    mask = want(inputs[0], *inputs[4:])
    q, k, v = (t.float() for t in inputs[1:4])
    y = F.scaled_dot_product_attention(q, k, v, mask if mask.dtype == torch.bool else mask.float())
    got = captured.gm(*inputs)
    torch.testing.assert_close(got.float(), y.sin(), rtol=2**-7, atol=2**-7)


def keys_of(valid: Tensor) -> Tensor:
    return (valid != 0)[:, None, None].expand(B, 1, S, S)


def near(valid: Tensor) -> Tensor:
    i = torch.arange(S, device=valid.device)
    return keys_of(valid) & ((i - i[:, None]).abs() <= 2)


def causal(valid: Tensor) -> Tensor:
    return keys_of(valid) & torch.ones(S, S, dtype=torch.bool, device=valid.device).tril()


def added(valid: Tensor) -> Tensor:
    """For which every number but 0 is the same."""
    lowest = torch.finfo(torch.bfloat16).min
    return torch.where(keys_of(valid), 0.0, lowest).to(torch.bfloat16)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Any, ...]]] = {
    "keys": (keys_of, ()),
    "one row": (lambda valid: (valid != 0)[:, None, None], ()),
    "inverted": (lambda valid: ~(valid == 0)[:, None, None], ()),
    "added": (added, ()),
    "window": (near, (False, 2)),
    "causal": (causal, (True,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_told_in_the_kernels_words(clock: Clock, form: str) -> None:
    see, rest = FORMS[form]
    captured, inputs = chosen(see)
    node = our_call(captured)
    keys, *others = node.args[5:]
    assert node.args[3:5] == (D**-0.5, MASKED) and tuple(others) == rest
    assert isinstance(keys, Node) and keys.meta["val"].shape == (B, S)
    assert keys.meta["val"].dtype == torch.bool
    assert clock.shapes == {"torch": (B, H, S, D), "graphquant": (B, H, S, D)}
    assert_same(captured, inputs, see)
    real = ops.attention(*inputs[1:4], *node.args[3:5], inputs[0] != 0, *others)
    traced = node.meta["val"]
    assert (traced.shape, traced.stride(), traced.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_a_bias_of_positions_is_an_argument(clock: Clock, dims: int) -> None:
    bias = torch.randn(1, H, S, S).to(torch.bfloat16)[:, : H if dims > 2 else 1]
    bias = bias.reshape(bias.shape[4 - dims :])

    def see(valid: Tensor, bias: Tensor) -> Tensor:
        return bias.expand(B, H, S, S) + added(valid)

    captured, inputs = chosen(see, bias=bias)
    node = our_call(captured)
    keys, is_causal, window, given = node.args[5:]
    assert keys is not None and (is_causal, window) == (False, None)
    assert given.meta["val"].shape == (1, H if dims > 2 else 1, S, S)
    assert_same(captured, inputs, lambda valid: see(valid, bias))


BIASES: dict[str, Callable[..., Tensor]] = {
    "of each sentence": lambda valid, x: x,
    "of keys": lambda valid, x: x[:, :, :1],
    "of heads": lambda valid, x: x[0],
    "of all": lambda valid, x: x[0, 0],
    "of sentences": lambda valid, x: x[:, :1],
    "that sees a 2": lambda valid, x: ((1 - valid) * -1e4)[:, None, None].to(torch.bfloat16),
    "that hides rows": lambda valid, x: added(valid).where(valid[:, None, :, None] != 0, -1e4),
}


@pytest.mark.parametrize("name", BIASES)
def test_any_other_mask_of_numbers_is_a_bias(clock: Clock, name: str) -> None:
    captured, inputs = chosen(BIASES[name], torch.randn(B, H, S, S).to(torch.bfloat16))
    node = our_call(captured)
    assert node.args[5:8] == (None, False, None)
    assert_same(captured, inputs, BIASES[name])


def test_layers_share_the_mask(clock: Clock) -> None:
    def two(m: Any, valid: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = keys_of(valid)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return F.scaled_dot_product_attention(y, k, v, mask)

    captured = exported(Model(two), masks(), *qkv())
    choose_masked_kernels(captured, set())
    first, second = captured.gm.graph.find_nodes(op="call_function", target=ops.attention.target)
    assert first.args[5] is second.args[5]


def test_heads_in_groups(clock: Clock) -> None:
    q, k, v = qkv()
    captured, inputs = chosen(keys_of, q=[q, k[:, :2], v[:, :2]], enable_gqa=True)
    our_call(captured)
    k, v = (t.repeat_interleave(2, 1) for t in inputs[2:4])
    y = F.scaled_dot_product_attention(inputs[1].float(), k.float(), v.float(), keys_of(inputs[0]))
    got = captured.gm(*inputs).float()
    torch.testing.assert_close(got, y.sin(), rtol=2**-7, atol=2**-7)


def documents(valid: Tensor) -> Tensor:
    return (valid[:, None] == valid[:, :, None])[:, None]


LEFT_ALONE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dropout": (keys_of, {"dropout_p": 0.1}),
    "documents": (documents, {}),
    "no keys of pads": (lambda valid: keys_of(valid) & (valid != 0)[:, None, :, None], {}),
    "float32": (keys_of, {"q": qkv(dtype=torch.float32)}),
    "wide heads": (keys_of, {"q": qkv(B, H, S, 136)}),
    "narrow heads": (keys_of, {"q": qkv(B, H, S, 12)}),
    "scale": (keys_of, {"scale": -1.0}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_the_kernel_does_not_compute_is_left_alone(name: str, clock: Clock) -> None:
    see, how = LEFT_ALONE[name]
    captured, _ = chosen(see, **how)
    assert captured.gm.graph.find_nodes(op="call_function", target=SDPA)
    assert not clock.questions


@pytest.mark.parametrize("clock", ["torch"], indirect=True)
def test_a_slower_kernel_is_not_called(clock: Clock) -> None:
    captured, _ = chosen(keys_of)
    assert captured.gm.graph.find_nodes(op="call_function", target=SDPA) and clock.questions


@pytest.mark.parametrize("sm", [80, 89, 100])
def test_it_is_for_hopper_alone(clock: Clock, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = GpuProperties(sm, 108, 166_912)
    monkeypatch.setattr(masked, "gpu_properties", lambda device: found)
    chosen(keys_of)
    assert not clock.questions


def test_gradients_and_masks_that_are_written_stay(clock: Clock) -> None:
    def write(valid: Tensor) -> Tensor:
        mask = keys_of(valid)
        valid.mul_(0)
        return mask

    captured, _ = chosen(write)
    assert captured.gm.graph.find_nodes(op="call_function", target=SDPA)
    model = Model(lambda m, valid, *qkv: F.scaled_dot_product_attention(*qkv, keys_of(valid)))
    captured = exported(model, masks(), *qkv())
    choose_masked_kernels(captured, set(captured.gm.graph.nodes))
    assert captured.gm.graph.find_nodes(op="call_function", target=SDPA) and not clock.questions


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_the_model_does(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, with probabilities rounded to it: some 2^-8 of a value of one."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper")
    monkeypatch.setattr(masked, "times", Clock("graphquant"))
    see, _ = FORMS[form]

    def attend(m: Any, valid: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, see(valid))

    inputs = [t.cuda() for t in (masks(), *qkv())]
    with torch.inference_mode():
        result = compiled(Model(attend), *inputs, select="faster")
    mask = see(masks())
    q, k, v = (t.cpu().double() for t in inputs[1:])
    mask = mask if mask.dtype == torch.bool else mask.double()
    want = F.scaled_dot_product_attention(q, k, v, mask)
    assert (result.got.cpu() - want).abs().max() < 0.03
