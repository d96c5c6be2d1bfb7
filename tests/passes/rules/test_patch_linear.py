"""A patch embedding's convolution becomes a float linear; any other convolution stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant
from tests.passes.graphs import Model, rewritten


def embedding(conv: nn.Module) -> Model:
    return Model(lambda m, x: m.conv(x).flatten(2).transpose(1, 2), conv=conv)


def assert_close(got: Tensor, want: Tensor, terms: int) -> None:
    """Two orders of one float32 sum of products around 1."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * terms**0.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("padding", [0, "valid"])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 4)])
def test_patches_of_an_image(
    size: tuple[int, int], padding: Any, quantize: bool, bias: bool
) -> None:
    conv, x = nn.Conv2d(3, 24, 4, 4, padding, bias=bias), torch.randn(2, 3, *size)
    result = rewritten(embedding(conv), x, quantize=quantize)
    assert result.ops()["linear"] == 1 and not result.ops().keys() & {"conv2d", "int8_linear"}
    assert_close(result.got, result.want, 48)


def test_patches_of_a_video() -> None:
    conv, x = nn.Conv3d(2, 24, (2, 4, 3), (2, 4, 3)), torch.randn(2, 2, 4, 8, 6)
    result = rewritten(embedding(conv), x)
    assert result.ops()["linear"] == 1 and "conv3d" not in result.ops()
    assert_close(result.got, result.want, 48)


def test_patches_that_are_not_square() -> None:
    result = rewritten(embedding(nn.Conv2d(3, 8, (2, 4), (2, 4))), torch.randn(1, 3, 6, 8))
    assert result.ops()["linear"] == 1
    assert_close(result.got, result.want, 24)


def test_the_result_may_be_read_as_an_image() -> None:
    conv = nn.Conv2d(3, 8, 4, 4)
    result = rewritten(
        Model(lambda m, x: m.conv(x).relu()[:, :, 1:], conv=conv), torch.randn(2, 3, 12, 8)
    )
    assert result.ops()["linear"] == 1
    assert_close(result.got, result.want, 48)


STAY = {
    "overlapping windows": nn.Conv2d(3, 8, 4, 2),
    "pixels between windows": nn.Conv2d(3, 8, 3, 4),
    "padding": nn.Conv2d(3, 8, 4, 4, 2),
    "padding to the same size": nn.Conv2d(3, 8, 1, padding="same"),
    "dilation": nn.Conv2d(3, 8, 2, 2, dilation=2),
    "groups": nn.Conv2d(3, 9, 4, 4, groups=3),
    "a rest at the edge": nn.Conv2d(3, 8, 3, 3),
    "one pixel": nn.Conv2d(3, 8, 1),
    "channels first in one dimension": nn.Conv1d(3, 8, 4, 4),
}


@pytest.mark.parametrize("conv", STAY.values(), ids=STAY.keys())
def test_other_convolutions_stay(conv: nn.Module) -> None:
    x = torch.randn(2, 3, 8) if isinstance(conv, nn.Conv1d) else torch.randn(2, 3, 8, 8)
    result = rewritten(embedding(conv), x)
    assert "linear" not in result.ops()
    assert torch.equal(result.got, result.want)


def test_an_image_without_a_batch_stays() -> None:
    result = rewritten(
        Model(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 8, 4, 4)), torch.randn(3, 8, 8)
    )
    assert "linear" not in result.ops()


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    options = {"inner": "eager", **options}
    return torch.compile(model, backend="graphquant", fullgraph=True, options=options)


def test_a_batch_of_any_size_is_one_compile() -> None:
    model = embedding(nn.Conv2d(3, 8, 4, 4)).eval()
    run = compiled(model)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5, 3):
            x = torch.randn(batch, 3, 8, 8)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(run(x), model(x), 48)


@pytest.mark.parametrize("free_weights", [True, False])
def test_the_weight_is_read_where_it_lies(free_weights: bool) -> None:
    """No copy of it is packed: what is written to it is seen, and it is never released."""
    model = Model(
        lambda m, x: m.fc(m.conv(x).flatten(2).transpose(1, 2)),
        conv=nn.Conv2d(3, 32, 4, 4),
        fc=nn.Linear(32, 8),
    )
    x = torch.randn(2, 3, 8, 8)
    run = compiled(model, free_weights=free_weights, exclude="fc")
    with torch.inference_mode():
        assert_close(run(x), model(x), 48)
        model.conv.weight.mul_(2)
        assert_close(run(x), model(x), 48)
    assert model.conv.weight.untyped_storage().nbytes() > 0
    graphquant.refresh(model)


def test_training_keeps_the_convolution_and_its_gradient() -> None:
    model = embedding(nn.Conv2d(3, 8, 4, 4))
    x = torch.randn(2, 3, 8, 8)
    with torch.enable_grad():
        compiled(model)(x).sum().backward()
        got, model.conv.weight.grad = model.conv.weight.grad, None
        model(x).sum().backward()
    assert torch.equal(got, model.conv.weight.grad)
