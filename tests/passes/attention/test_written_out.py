"""Attention between two products is one call of SDPA, if it is that and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphquant import Config
from graphquant.ir.graph import SDPA, arguments, aten
from graphquant.passes import pipeline
from graphquant.passes.attention.written_out import fuse_written_out
from graphquant.passes.pipeline import prepare
from tests.passes.graphs import Model, compiled, exported

B, H, S, D = 3, 2, 7, 16
LOWEST = torch.finfo(torch.float32).min


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=g).to(dtype) for _ in range(3)]


def valid() -> Tensor:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 4:] = mask[2, :3] = False
    return mask


def biases() -> Tensor:
    return torch.randn(1, H, S, S, generator=torch.Generator().manual_seed(1))


def causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def hidden(mask: Tensor) -> Tensor:
    """[B, 1, 1, S]: what transformers adds to logits."""
    return (1.0 - mask[:, None, None].float()) * LOWEST


def attend(logits: Callable[..., Tensor]) -> nn.Module:
    """softmax(logits(q k^T, valid, bias)) v."""

    def forward(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        score = q @ k.transpose(-1, -2)
        return (logits(score, mask, bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    return Model(forward)


def whole(forward: Callable[..., Tensor]) -> nn.Module:
    return Model(lambda m, *inputs: forward(*inputs))


def given_to(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (*qkv(dtype), valid(), biases().to(dtype))


def fused(model: nn.Module, *inputs: Tensor, sizes: Any = None) -> tuple[Any, list[Any]]:
    """(the graph, its SDPAs), when results were compared."""
    captured = exported(model, *inputs, sizes=sizes)
    prepare(captured, Config())
    captured.gm.graph.lint()
    captured.gm.recompile()
    want, got = (run(*(t.clone() for t in inputs)) for run in (model, captured.gm))
    near = 1e-5 if want.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got, want, rtol=near, atol=near, equal_nan=True)
    assert got.stride() == want.stride()
    return captured, captured.gm.graph.find_nodes(op="call_function", target=SDPA)


def softmaxes(captured: Any) -> int:
    targets = (aten.softmax.int, aten._softmax.default)
    return sum(len(captured.gm.graph.find_nodes(op="call_function", target=t)) for t in targets)


SCALE = D**-0.5
FUSED: dict[str, tuple[Callable[..., Tensor], float]] = {
    "nothing": (lambda s, m, b: s, 1.0),
    "multiplied": (lambda s, m, b: s * SCALE, SCALE),
    "divided": (lambda s, m, b: s / D**0.5, SCALE),
    "times two, then divided": (lambda s, m, b: s * 2 / 3, 2 / 3),
    "bias": (lambda s, m, b: s * SCALE + b, SCALE),
    "bias first": (lambda s, m, b: b + s, 1.0),
    "bias of rows": (lambda s, m, b: s + b[0, 0], 1.0),
    "bias of heads": (lambda s, m, b: s + b[0], 1.0),
    "bias of keys": (lambda s, m, b: s + b[0, 0, 0], 1.0),
    "bias of queries": (lambda s, m, b: s + b[:, :, :, :1], 1.0),
    "bias in the scale": (lambda s, m, b: (s + b) * SCALE, SCALE),
    "bias, divided": (lambda s, m, b: (s / 3 + b) / 2, 1 / 6),
    "twice a bias": (lambda s, m, b: torch.add(s, b, alpha=2), 1.0),
    "less a bias": (lambda s, m, b: s - b, 1.0),
    "less twice a bias": (lambda s, m, b: torch.sub(s, b, alpha=2), 1.0),
    "two biases": (lambda s, m, b: s * SCALE + b + b.flip(1), SCALE),
    "bias of scores' size": (lambda s, m, b: s + b.expand(B, -1, -1, -1), 1.0),
    "mask": (lambda s, m, b: s * SCALE + hidden(m), SCALE),
    "mask and bias": (lambda s, m, b: s * SCALE + b + hidden(m), SCALE),
    "masked_fill": (lambda s, m, b: s.masked_fill(~m[:, None, None], LOWEST), 1.0),
    "masked_fill of a billion": (lambda s, m, b: s.masked_fill(~m[:, None, None], -1e9), 1.0),
    "masked_fill, then a bias": (lambda s, m, b: s.masked_fill(~m[:, None, None], LOWEST) + b, 1.0),
    "bias, then masked_fill": (lambda s, m, b: (s + b).masked_fill(~m[:, None, None], -1e30), 1.0),
    "masked_fill, scaled": (lambda s, m, b: s.masked_fill(~m[:, None, None], -1e30) * 0.1, 0.1),
    "causal": (lambda s, m, b: s.masked_fill(~causal(), -torch.inf), 1.0),
    "where": (lambda s, m, b: torch.where(m[:, None, None], s, LOWEST), 1.0),
    "where of a tensor": (
        lambda s, m, b: torch.where(causal(), s, torch.full((), LOWEST)),
        1.0,
    ),
    "where not": (lambda s, m, b: torch.where(~m[:, None, None], LOWEST, s), 1.0),
    "where not, of a tensor": (
        lambda s, m, b: torch.where(~causal(), torch.scalar_tensor(LOWEST), s),
        1.0,
    ),
    "a number added": (lambda s, m, b: s * SCALE + 3.0, SCALE),
    "no dropout": (lambda s, m, b: F.dropout(s, 0.5, False) * SCALE, SCALE),
    "copies": (lambda s, m, b: (s.contiguous() * SCALE).clone(), SCALE),
}


@pytest.mark.parametrize("name", FUSED)
def test_scaled_scores_with_what_is_added_are_one_call(name: str) -> None:
    logits, scale = FUSED[name]
    captured, (node,) = fused(attend(logits), *given_to())
    assert softmaxes(captured) == 0
    assert arguments(node).scale == pytest.approx(scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["multiplied", "bias", "bias in the scale", "two biases"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    captured, (node,) = fused(attend(FUSED[name][0]), *given_to(dtype))
    assert node.meta["val"].dtype == dtype and softmaxes(captured) == 0


def in_float32(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """As transformers writes it: only the softmax is in float32."""
    score = torch.matmul(q, k.transpose(2, 3)) * SCALE
    return torch.matmul(F.softmax(score, dim=-1, dtype=torch.float32).to(q.dtype), v)


def keys_by_columns(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """The keys come as [B, H, D, S]."""
    return (q @ k.reshape(B, H, D, S) * SCALE).softmax(-1) @ v


def permuted_keys(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    k = k.permute(0, 2, 1, 3).contiguous().permute(0, 2, 3, 1)
    return (q @ k * SCALE).softmax(-1) @ v


def both_scaled(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return ((q * 0.5) @ (k / 2).transpose(-1, -2)).softmax(3) @ v


def scaled_queries_and_a_bias(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor
) -> Tensor:
    """As timm writes it: the scale is not the bias's."""
    return ((q * SCALE) @ k.transpose(-2, -1) + bias).softmax(-1) @ v


def read_elsewhere(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """The scaled queries are read once more."""
    q = q * SCALE
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v + q


@pytest.mark.parametrize(
    ("forward", "scale"),
    [
        (in_float32, SCALE),
        (keys_by_columns, SCALE),
        (permuted_keys, SCALE),
        (both_scaled, 0.25),
        (scaled_queries_and_a_bias, SCALE),
        (read_elsewhere, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_spellings(forward: Any, scale: float, dtype: torch.dtype) -> None:
    captured, (node,) = fused(whole(forward), *given_to(dtype))
    assert arguments(node).scale == scale and softmaxes(captured) == 0


def drops(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, True) @ v * 0


def of_queries(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def one_head_of_keys(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return (q @ k[:, :1].transpose(-1, -2)).softmax(-1) @ v[:, :1]


def more_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """A bias that makes a batch of scores larger."""
    score = q[:1] @ k[:1].transpose(-1, -2) + bias.expand(B, -1, -1, -1)
    return score.softmax(-1) @ v


def cast_probabilities(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """All are 0 but those that are 1."""
    return (q @ k.transpose(-1, -2) * 99).softmax(-1).to(torch.int32).float() @ v


def probabilities_in_float8(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1).to(torch.float8_e4m3fn).float() @ v


def another_dtype_inside(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        score = q @ k.transpose(-1, -2)
    return score.float().softmax(-1) @ v


def probabilities_are_read(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return p @ v + p.sum(-1, keepdim=True)


UNLIKE: dict[str, Callable[..., Tensor]] = {
    "a negative scale": lambda s, m, b: s * -SCALE,
    "no scale": lambda s, m, b: s * 0,
    "from a bias": lambda s, m, b: b - s,
    "a scale for each head": lambda s, m, b: s * b[:, :, :1, :1],
    "a scale that is a tensor": lambda s, m, b: s * b[0, 0, 0, 0],
    "divided by a tensor": lambda s, m, b: s / (b[:, :, :1, :1] + 9),
    "soft cap": lambda s, m, b: (s / 30).tanh() * 30,
    "clamped": lambda s, m, b: s.clamp(max=1.0),
    "squared": lambda s, m, b: s * s,
    "twice the scores": lambda s, m, b: s + s,
    "scores of other queries": lambda s, m, b: s + s.flip(2),
    "replaced by a low number": lambda s, m, b: s.masked_fill(~m[:, None, None], -1e4),
    "replaced by zero": lambda s, m, b: s.masked_fill(~m[:, None, None], 0.0),
    "replaced by a high number": lambda s, m, b: s.masked_fill(~m[:, None, None], torch.inf) * 0,
    "replaced by a bias": lambda s, m, b: torch.where(m[:, None, None], s, b),
    "replaced by a bias where true": lambda s, m, b: torch.where(m[:, None, None], b, s),
    "a bias of another dtype": lambda s, m, b: (s + b.double()).float(),
    "a bias of integers": lambda s, m, b: s + (b * 2).long(),
    "a bias of bools": lambda s, m, b: s + m[:, None, None],
    "rounded": lambda s, m, b: s.to(torch.int32).float(),
    "in float8": lambda s, m, b: s.to(torch.float8_e5m2).float(),
}
LEFT: dict[str, nn.Module] = {
    **{name: attend(logits) for name, logits in UNLIKE.items()},
    **{f.__name__: whole(f) for f in (drops, of_queries, one_head_of_keys, more_scores)},
    **{f.__name__: whole(f) for f in (another_dtype_inside, probabilities_are_read)},
    **{f.__name__: whole(f) for f in (cast_probabilities, probabilities_in_float8)},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_more_than_that_stays(name: str) -> None:
    captured, found = fused(LEFT[name], *given_to())
    assert not found and softmaxes(captured) == 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many attentions were written out in each graph, before and after."""
    counts: list[int] = []

    def counted(captured: Any) -> None:
        counts.append(softmaxes(captured))
        fuse_written_out(captured)
        counts.append(softmaxes(captured))

    monkeypatch.setattr(pipeline, "fuse_written_out", counted)
    return counts


def test_what_needs_a_gradient_stays(seen: list[int]) -> None:
    q, *rest = given_to()
    model = attend(FUSED["bias"][0])
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    with torch.no_grad():
        run(q, *rest)
    assert seen == [1, 0]
    with torch.enable_grad():
        got = run(q.requires_grad_(), *rest)
    assert got.requires_grad and seen[2:] == [1, 1]


def test_sizes_that_depend_on_data_stay(seen: list[int]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        q, k, v = (t[mask.all(1)] for t in (q, k, v))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = compiled(whole(forward), *given_to())
    assert seen == [1, 1]
    torch.testing.assert_close(found.got, found.want)


def test_what_the_model_chose_a_kernel_for_stays(seen: list[int]) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    compiled(whole(forward), *given_to())
    assert seen == [1, 1]


def test_a_mask_that_is_written_before_its_sum_is_read_stays() -> None:
    """SDPA would read it later than the model does."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        added = bias.clone()
        logits = q @ k.transpose(-1, -2) + added
        p = logits.softmax(-1)
        added.add_(100 * torch.arange(S))
        return p @ v + added.sum()

    captured, found = fused(whole(forward), *given_to())
    assert len(found) == (softmaxes(captured) == 0)  # nobody writes where the write was removed


def test_queries_that_are_written_after_they_were_scaled_are_read_scaled() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        score = (q * SCALE) @ k.transpose(-1, -2)
        q.add_(9)
        return score.softmax(-1) @ v

    captured, _ = fused(whole(forward), *given_to())
    assert captured.gm.graph.find_nodes(op="call_function", target=aten.add_.Tensor)


@pytest.mark.parametrize("name", ["masked_fill", "masked_fill of a billion", "mask", "where"])
def test_queries_whose_keys_are_all_masked_have_the_same_mean(name: str) -> None:
    *inputs, mask, bias = given_to()
    mask[0] = False
    _, (node,) = fused(attend(FUSED[name][0]), *inputs, mask, bias)
    assert arguments(node).attn_mask is not None


def test_layers_share_the_sum_of_their_masks() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        for _ in range(3):
            logits = q @ k.transpose(-1, -2) * SCALE + bias + hidden(mask)
            q = logits.softmax(-1) @ v
        return q

    _, found = fused(whole(forward), *given_to())
    assert len(found) == 3
    assert len({arguments(n).attn_mask for n in found}) == 3, "each adds a mask of its own"

    def shared(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        added = hidden(mask)
        for _ in range(3):
            q = (q @ k.transpose(-1, -2) * SCALE + bias + added).softmax(-1) @ v
        return q

    _, found = fused(whole(shared), *given_to())
    assert len({arguments(n).attn_mask for n in found}) == 1


def test_a_mask_that_masks_nothing_is_dropped() -> None:
    model = whole(
        lambda q, k, v, *_: (
            (
                (q @ k.transpose(-1, -2)).masked_fill(torch.zeros(S, S, dtype=torch.bool), LOWEST)
            ).softmax(-1)
            @ v
        )
    )
    _, (node,) = fused(model, *given_to())
    assert arguments(node).attn_mask is None


def test_dynamic_sizes() -> None:
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    sizes = ({0: batch, 2: length},) * 3

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = torch.arange(q.shape[2])
        bias = -(near - near[:, None]).abs().float()[None] * torch.tensor([[[0.5]], [[2.0]]])
        return (q @ k.transpose(-1, -2) * SCALE + bias).softmax(-1) @ v

    captured, found = fused(whole(forward), *qkv(), sizes=(sizes,))
    assert len(found) == 1
    more = [torch.randn(5, H, 11, D) for _ in range(3)]
    got = captured.gm(*more)
    torch.testing.assert_close(got, forward(*more), rtol=1e-5, atol=1e-5)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("times"), st.sampled_from([0.25, 3.0, -1.0, 2])),
        st.tuples(st.just("over"), st.sampled_from([0.5, 4.0])),
        st.tuples(st.just("plus"), st.integers(0, 3)),
        st.tuples(st.just("less"), st.integers(0, 3)),
        st.tuples(st.just("from"), st.integers(0, 3)),
        st.tuples(st.just("fill"), st.sampled_from([-torch.inf, -1e9, -1e30, -5.0])),
        st.tuples(st.just("tanh"), st.none()),
        st.tuples(st.just("copy"), st.none()),
    ),
    max_size=5,
)


@given(STEPS, st.booleans(), st.sampled_from([1, 0.25, -2]), st.sampled_from([1, 0.5]))
def test_any_logits(
    steps: list[tuple[str, Any]], of_numbers: bool, of_q: float, of_k: float
) -> None:
    """Whatever the logits are: if the attention is one call, its results are the same."""

    def logits(score: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        added = (bias, bias[0, 0], hidden(mask), bias[:, :1] * 3)
        x = score
        for kind, value in steps:
            if kind == "times":
                x = value * x if of_numbers else x * value
            elif kind == "over":
                x = x / value
            elif kind == "plus":
                x = x + added[value]
            elif kind == "less":
                x = x - added[value].clamp(min=-9)
            elif kind == "from":
                x = added[value].clamp(min=-9) - x
            elif kind == "fill":
                x = x.masked_fill(~causal(), value)
            elif kind == "tanh":
                x = x.tanh()
            else:
                x = x.clone()
        return x

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        q, k = (q if of_q == 1 else q * of_q), (k if of_k == 1 else k * of_k)
        return logits(q @ k.transpose(-1, -2), mask, bias).softmax(-1) @ v

    captured, found = fused(whole(forward), *given_to())
    assert len(found) + softmaxes(captured) == 1


def test_models_of_transformers_that_write_it_out() -> None:
    from transformers import MPNetConfig, MPNetModel

    config = MPNetConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128
    )
    model = MPNetModel(config).eval().requires_grad_(False)
    ids = torch.randint(5, 1000, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [5], [9]])).long()
    wrapped = Model(lambda m, ids, mask: m.model(ids, attention_mask=mask)[0], model=model)
    with torch.no_grad():
        captured = exported(wrapped, ids, mask)
        prepare(captured, Config())
        captured.gm.recompile()
        got = captured.gm(ids, mask)
        torch.testing.assert_close(got, wrapped(ids, mask), rtol=1e-4, atol=1e-5)
    assert softmaxes(captured) == 0
    found = captured.gm.graph.find_nodes(op="call_function", target=SDPA)
    assert len(found) == 2 and len({arguments(n).attn_mask for n in found}) == 1
