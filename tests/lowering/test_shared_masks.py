"""Masks that several attentions read are computed and written once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from graphquant.ir.graph import SDPA, arguments, calls
from graphquant.lowering import inductor, inner
from graphquant.lowering.shared_masks import MATERIALIZE, share_masks
from tests.passes.graphs import Model, exported
from tests.small import NEAR, error, seeded

B, H, S, D = 2, 3, 8, 16
LAYERS = 3


def attending(mask: Callable[..., Any], prepare: Callable[..., Any] | None = None) -> nn.Module:
    """Layers of attention; `mask(m, x, valid, shared, layer)` is traced in each."""

    def forward(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        shared = None if prepare is None else prepare(m, x, valid)
        for layer in range(LAYERS):
            x = x + F.scaled_dot_product_attention(x, x, x, mask(m, x, valid, shared, layer))
        return x

    return Model(forward, bias=nn.Parameter(torch.randn(H, S, S), requires_grad=False))


def key_mask(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    return (valid & (torch.arange(S) >= 0))[:, None, None, :]


def given(m: Any, x: Tensor, valid: Tensor, shared: Tensor, layer: int) -> Tensor:
    return shared


SHARED: dict[str, nn.Module] = {
    "one bool mask": attending(given, key_mask),
    "views of a bool mask": attending(
        lambda m, x, valid, shared, layer: shared.expand(B, H, S, S), key_mask
    ),
    "a bool input": attending(lambda m, x, valid, *_: valid[:, None, None, :].expand(B, 1, S, S)),
    "one float mask": attending(
        given,
        lambda m, x, valid: torch.where(valid[:, None, None, :], 0.0, -1e30).expand(B, 1, S, S),
    ),
    "a bias, a mask added in each layer": attending(
        lambda m, x, valid, shared, layer: torch.where(
            shared, m.bias.transpose(1, 2), -1e30
        ).contiguous(),
        key_mask,
    ),
}
OWN: dict[str, nn.Module] = {
    "another mask in each layer": attending(
        lambda m, x, valid, shared, layer: shared & (torch.arange(S) != layer), key_mask
    ),
    "random": attending(
        lambda m, x, valid, *_: torch.rand(B, 1, S, S) * valid[:, None, None, :], None
    ),
    "float input": Model(
        lambda m, x, valid: F.scaled_dot_product_attention(
            F.scaled_dot_product_attention(x, x, x, x[:, :, :, :S]), x, x, x[:, :, :, :S]
        )
    ),
    "written between two layers": attending(
        lambda m, x, valid, shared, layer: shared.logical_and_(torch.arange(S) != layer), key_mask
    ),
}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 5:] = False
    return torch.randn(B, H, S, D), valid


@pytest.mark.parametrize("name", SHARED)
def test_layers_read_one_mask(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    gm = exported(SHARED[name], *inputs).gm
    want = gm(*inputs)
    share_masks(gm.graph)
    gm.recompile()
    (made,) = calls(gm.graph, lambda n: n.target is MATERIALIZE)
    assert made.meta["val"].dtype == torch.float32
    masks = [arguments(n).attn_mask for n in calls(gm.graph, lambda n: n.target is SDPA)]
    assert all(m.meta["val"].dtype == torch.float32 for m in masks)
    assert torch.equal(gm(*inputs), want)


@pytest.mark.parametrize("name", OWN)
def test_masks_that_differ_stay_apart(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    gm = exported(OWN[name], *inputs).gm
    share_masks(gm.graph)
    assert not list(calls(gm.graph, lambda n: n.target is MATERIALIZE))


def test_queries_of_two_dtypes_read_two_masks(inputs: tuple[Tensor, Tensor]) -> None:
    def forward(m: Any, x: Tensor, valid: Tensor) -> Any:
        mask = key_mask(m, x, valid)
        low = x.to(torch.bfloat16)
        return [F.scaled_dot_product_attention(t, t, t, mask) for t in (x, low, x, low)]

    gm = exported(Model(forward), *inputs).gm
    want = gm(*inputs)
    share_masks(gm.graph)
    gm.recompile()
    made = calls(gm.graph, lambda n: n.target is MATERIALIZE)
    assert {n.meta["val"].dtype for n in made} == {torch.float32, torch.bfloat16}
    assert all(map(torch.equal, gm(*inputs), want))


def test_a_bias_that_is_trained_gets_its_gradient(inputs: tuple[Tensor, Tensor]) -> None:
    def forward(m: Any, x: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
        masked = bias + torch.where(key_mask(m, x, valid), 0, -1e3)
        return F.scaled_dot_product_attention(
            F.scaled_dot_product_attention(x, x, x, masked), x, x, masked
        )

    bias = torch.randn(H, S, S, requires_grad=True)
    with torch.enable_grad():
        gm = exported(Model(forward), *inputs, bias).gm
        (want,) = torch.autograd.grad(gm(*inputs, bias).sum(), bias)
        share_masks(gm.graph)
        gm.recompile()
        (got,) = torch.autograd.grad(gm(*inputs, bias).sum(), bias)
    assert list(calls(gm.graph, lambda n: n.target is MATERIALIZE))
    torch.testing.assert_close(got, want)


SMALL = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "vocab_size": 99}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**SMALL, num_layers=3)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=99, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            num_hidden_layers=3,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("bert", False), ("bert", True), pytest.param("t5", False, marks=pytest.mark.slow)],
)
def test_compiled_layers_read_the_same_memory(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = seeded(ENCODERS[name]).eval()
    options = {"select": "always", "inductor": {"force_disable_caches": True}}
    given = {"input_ids": torch.randint(5, 99, (B, S)), "attention_mask": torch.ones(B, S).long()}
    given["attention_mask"][1, 5:] = 0
    with torch.inference_mode():
        run = torch.compile(model, backend="graphquant", options=options, dynamic=dynamic)
        got, (code,) = run_and_get_code(run, **given)
        want = model(**given)[0]
    masks = re.findall(r"attn_mask=(?:reinterpret_tensor\()?(\w+)", code)
    assert len(masks) == 3 and len(set(masks)) == 1
    keep = given["attention_mask"].bool()
    assert error(got[0][keep], want[keep]) < 2 * NEAR


def test_other_inner_backends_get_the_graph_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(inner, "share_masks", asked.append)
    model = seeded(ENCODERS["bert"]).eval()
    with torch.inference_mode():
        run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
        run(torch.randint(5, 99, (B, S)))
    assert not asked


def test_eager_calls_of_the_op_copy(device: str) -> None:
    inductor.register()
    x = torch.randn(3, 4, device=device).t()
    y = torch.ops.graphquant.materialize(x)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr() and x.stride() == y.stride()
    torch.library.opcheck(MATERIALIZE, (x,))
