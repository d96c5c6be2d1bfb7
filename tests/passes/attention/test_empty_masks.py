"""Attention masks that mask nothing are dropped, all others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphquant.ir.graph import SDPA, calls, full_args
from graphquant.passes.attention import empty_masks
from graphquant.passes.attention.empty_masks import drop_empty_masks
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


def written_undeclared(m: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(T, T)
    torch.einsum("ij->ji", mask)[0, 1:].fill_(-torch.inf)
    return mask


@pytest.mark.parametrize("mask", [written_whole, written_in_a_view, written_undeclared])
def test_a_mask_that_is_written_in_place_is_not_what_it_was_made_as(mask: Any, x: Tensor) -> None:
    result = rewritten(attending(mask), x)
    assert isinstance(mask_of(result.graph), Node)
    assert torch.equal(result.got, result.want)


def test_a_mask_that_is_written_and_masks_nothing_goes(x: Tensor) -> None:
    def filled(m: Any, x: Tensor) -> Tensor:
        mask = torch.empty(T, T)
        mask[:, 1:].fill_(0.0)
        mask[:, :1].copy_(torch.zeros(T, 1))
        return mask

    result = rewritten(attending(filled), x)
    assert mask_of(result.graph) is None
    assert torch.allclose(result.got, result.want, rtol=1e-5, atol=1e-5)


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
    found = [argument(n, "attn_mask") for n in calls(result.graph, lambda n: n.target is SDPA)]
    assert all(isinstance(m, Node) for m in found)
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
    real = empty_masks._masks_nothing

    def spy(mask: Node, *rest: Any) -> bool:
        evaluated.append(mask)
        return real(mask, *rest)

    monkeypatch.setattr(empty_masks, "_masks_nothing", spy)
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
    monkeypatch.setattr(empty_masks, "MAX_ELEMENTS", T * T - 1)
    assert mask_of(rewritten(attending(EMPTY["ones"]), x).graph) is not None
    monkeypatch.setattr(empty_masks, "MAX_ELEMENTS", T * T)
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
    from tests import zoo

    entry = zoo.SMALL[name]
    args, kwargs = entry.inputs(2)
    seen: list[Any] = []

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = entry.build("sdpa")

        def forward(self, *args: Any) -> Any:
            return self.model(*args, **kwargs)[0]

    real = empty_masks.drop_empty_masks

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
