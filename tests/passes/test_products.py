"""A product with a parameter is a linear, however it is spelled and wherever its result lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.graphs import Model, assert_near, compiled, linear_bound, parameter

K, H, D = 24, 4, 6


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


def bound(x: Tensor, weight: Tensor, out: tuple[int, ...]) -> Tensor:
    """Of a linear over rows [..., K] of x with weight [N, K], whatever shape its result has."""
    return linear_bound(x.reshape(-1, weight.shape[1]), weight).amax().expand(out)


# name: (what is computed, the weight as [N, K], from which of the parts)
PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Tensor]]] = {
    "a projection to heads": (
        lambda m, x: torch.einsum("bsk,khd->bshd", x, m.khd),
        lambda m: m.khd.reshape(K, -1).T,
    ),
    "heads in front": (
        lambda m, x: torch.einsum("bsk,khd->bhsd", x, m.khd),
        lambda m: m.khd.reshape(K, -1).T,
    ),
    "the channel in the middle of the weight": (
        lambda m, x: torch.einsum("bsk,hkd->bshd", x, m.hkd),
        lambda m: m.hkd.transpose(1, 2).reshape(-1, K),
    ),
    "the weight first": (
        lambda m, x: torch.einsum("khd, bsk -> bshd", m.khd, x),
        lambda m: m.khd.reshape(K, -1).T,
    ),
    "an ellipsis": (lambda m, x: torch.einsum("...k,kn->...n", x, m.kn), lambda m: m.kn.T),
    "no arrow": (lambda m, x: torch.einsum("abz,zn", x, m.kn), lambda m: m.kn.T),
    "transposed": (lambda m, x: torch.einsum("bsk,nk->nsb", x, m.nk), lambda m: m.nk),
    "heads that are summed": (
        lambda m, x: torch.einsum("bshd,hdn->bsn", x.view(2, 5, H, D), m.hdn),
        lambda m: m.hdn.reshape(K, -1).T,
    ),
    "heads in front that are summed": (
        lambda m, x: torch.einsum("bhsd,hdn->bsn", x.view(2, 5, H, D).transpose(1, 2), m.hdn),
        lambda m: m.hdn.reshape(K, -1).T,
    ),
    "tensordot": (lambda m, x: torch.tensordot(x, m.kn, 1), lambda m: m.kn.T),
    "tensordot of dims": (
        lambda m, x: torch.tensordot(x, m.hkd, dims=([2], [1])),
        lambda m: m.hkd.transpose(1, 2).reshape(-1, K),
    ),
    "tensordot of two dims": (
        lambda m, x: torch.tensordot(x.view(2, 5, H, D), m.hdn, 2),
        lambda m: m.hdn.reshape(K, -1).T,
    ),
    "inner": (lambda m, x: torch.inner(x, m.nk), lambda m: m.nk),
    "inner with three dims": (
        lambda m, x: torch.inner(x, m.nk.view(2, 4, K)),
        lambda m: m.nk,
    ),
    "matmul for all heads": (
        lambda m, x: x[:, None] @ m.hkd,
        lambda m: m.hkd.transpose(1, 2).reshape(-1, K),
    ),
    "matmul of two dims for all heads": (
        lambda m, x: x[0] @ m.hkd,
        lambda m: m.hkd.transpose(1, 2).reshape(-1, K),
    ),
    "matmul for heads of heads": (
        lambda m, x: x[:, None, None] @ m.hkd.view(2, 2, K, D),
        lambda m: m.hkd.transpose(1, 2).reshape(-1, K),
    ),
    "addmm with factors": (
        lambda m, x: torch.addmm(m.n, x.view(10, K), m.kn, beta=0.3, alpha=2.5),
        lambda m: 2.5 * m.kn.T,
    ),
    "addmm without its bias": (
        lambda m, x: torch.addmm(x.new_zeros(8), x.view(10, K), m.kn, beta=0, alpha=-1),
        lambda m: -m.kn.T,
    ),
}


def parts() -> dict[str, Any]:
    return {
        "khd": parameter(K, H, D),
        "hkd": parameter(H, K, D),
        "hdn": parameter(H, D, 8),
        "kn": parameter(K, 8),
        "nk": parameter(8, K),
        "n": parameter(8),
    }


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_one_matrix_for_all_rows_is_a_linear(name: str, x: Tensor) -> None:
    forward, weight = PRODUCTS[name]
    model = Model(forward, **parts())
    result = compiled(model, x)
    assert result.report.coverage == 1.0 and len(result.report.linears) == 1
    assert result.got.stride() == result.want.stride()
    assert_near(result.got, result.want, bound(x, weight(model), result.want.shape))


@pytest.mark.parametrize("name", PRODUCTS)
def test_in_float_it_is_the_same_product(name: str, x: Tensor) -> None:
    result = compiled(Model(PRODUCTS[name][0], **parts()), x, quantize=False)
    assert result.got.stride() == result.want.stride()
    torch.testing.assert_close(result.got, result.want, rtol=1e-5, atol=1e-4)


STAY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a matrix for each head": lambda m, x: torch.einsum(
        "bshd,hdn->bshn", x.view(2, 5, H, D), m.hdn
    ),
    "a matrix for each head by matmul": lambda m, x: x.view(2, 5, H, D).transpose(1, 2) @ m.hdn,
    "a matrix for each sample": lambda m, x: torch.bmm(x, m.hkd[:2]),
    "a diagonal": lambda m, x: torch.einsum("bss,sn->bsn", x[:, :, :5], m.nk[:5]),
    "a sum over rows": lambda m, x: torch.einsum("bsk,kn->n", x, m.kn),
    "a sum over the weight": lambda m, x: torch.einsum("bsk,kn->bs", x, m.kn),
    "an outer product": lambda m, x: torch.einsum("bsk,n->bskn", x, m.n),
    "a vector": lambda m, x: torch.einsum("bsk,k->bs", x, m.kn[:, 0]),
    "tokens that are mixed": lambda m, x: torch.einsum("bsk,st->btk", x, m.nk[:5]),
    "three factors": lambda m, x: torch.einsum("bsk,kn,n->bsn", x, m.kn, m.n),
    "two inputs": lambda m, x: torch.einsum("bsk,btk->bst", x, x),
    "a bias for each row": lambda m, x: torch.addmm(x[0, :, :8], x[0], m.kn, beta=2),
    "baddbmm": lambda m, x: torch.baddbmm(x[:, :, :6], x, m.hkd[:2]),
    "bilinear": lambda m, x: F.bilinear(x, x, m.hkd[:, :, :1].expand(H, K, K).contiguous()),
}


@pytest.mark.parametrize("name", STAY)
def test_any_other_product_stays_and_is_right(name: str, x: Tensor) -> None:
    result = compiled(Model(STAY[name], **parts()), x)
    assert not any(o.int8 for o in result.report.linears)
    torch.testing.assert_close(result.got, result.want, rtol=1e-5, atol=1e-4)


def test_heads_projected_by_einsum_are_siblings(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        q, k, v = (torch.einsum("bsk,khd->bhsd", h, w) for w in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + torch.einsum("bhsd,hdk->bsk", y, m.o)

    weights = {n: parameter(K, H, D) for n in "qkv"} | {"o": parameter(H, D, K)}
    model = Model(forward, norm=nn.LayerNorm(K), **weights)
    for w in model.parameters():
        w.data.mul_(0.2) if w.dim() == 3 else None
    result = compiled(model, x)
    assert result.counts == {"stack_siblings + norm_linear": 3, "linear + residual": 1}
    torch.testing.assert_close(result.got, result.want, rtol=0, atol=0.05)


def test_sizes_may_be_dynamic() -> None:
    model = Model(lambda m, x: torch.einsum("bsk,khd->bhsd", x, m.khd), **parts()).eval()
    options = {"inner": "eager"}
    run = torch.compile(model, backend="graphquant", fullgraph=True, options=options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 5), (3, 7), (4, 2)):
            x = torch.randn(batch, tokens, K)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            got, want = run(x), model(x)
            assert got.stride() == want.stride()
            assert_near(got, want, bound(x, model.khd.reshape(K, -1).T, want.shape))


def test_autocast_gives_the_type_that_the_model_gives(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.einsum("bsk,khd->bhsd", x, m.khd)

    result = compiled(Model(forward, **parts()), x)
    assert result.got.dtype == result.want.dtype == torch.bfloat16
    assert result.report.coverage == 1.0


# 1x1 convolutions --------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[nn.Module, Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "tokens": (
        nn.Conv1d(K, 8, 1),
        lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
        (2, 5, K),
    ),
    "an image of channels last": (
        nn.Conv2d(K, 8, 1),
        lambda m, x: m.conv(x.permute(0, 3, 1, 2)),
        (2, 3, 4, K),
    ),
    "no bias": (
        nn.Conv2d(K, 8, 1, bias=False),
        lambda m, x: m.conv(x.permute(0, 3, 1, 2)),
        (2, 3, 4, K),
    ),
    "padding by its name": (
        nn.Conv2d(K, 8, 1, padding="same"),
        lambda m, x: m.conv(x.permute(0, 3, 1, 2)),
        (2, 3, 4, K),
    ),
    "a video": (
        nn.Conv3d(K, 8, 1),
        lambda m, x: m.conv(x.permute(0, 4, 1, 2, 3)),
        (2, 2, 3, 4, K),
    ),
    "one pixel": (
        nn.Conv2d(K, 8, 1),
        lambda m, x: m.conv(x[:, :, None, None])[..., 0, 0],
        (7, K),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_1x1_convolution_of_channels_that_lie_together_is_a_linear(name: str) -> None:
    conv, forward, size = CONVOLUTIONS[name]
    x = torch.randn(*size)
    result = compiled(Model(forward, conv=conv), x)
    assert result.report.coverage == 1.0 and result.report.linears[0].path == "conv"
    assert result.got.stride() == result.want.stride()
    assert_near(result.got, result.want, bound(x, conv.weight.flatten(1), result.want.shape))


OTHER: dict[str, nn.Module] = {
    "stride": nn.Conv2d(K, 8, 1, 2),
    "padding": nn.Conv2d(K, 8, 1, padding=1),
    "groups": nn.Conv2d(K, 8, 1, groups=4),
    "a window": nn.Conv2d(K, 8, (1, 3)),
}


@pytest.mark.parametrize("name", OTHER)
def test_any_other_convolution_stays(name: str) -> None:
    x = torch.randn(2, 3, 4, K)
    model = Model(lambda m, x: m.conv(x.permute(0, 3, 1, 2)), conv=OTHER[name])
    result = compiled(model, x)
    assert not result.report.linears
    torch.testing.assert_close(result.got, result.want)


def test_an_image_of_channels_first_stays() -> None:
    """It would have to be transposed first."""
    x = torch.randn(2, K, 3, 4)
    result = compiled(Model(lambda m, x: m.conv(x), conv=nn.Conv2d(K, 8, 1)), x)
    assert not result.report.linears
    torch.testing.assert_close(result.got, result.want)


def test_a_convolution_that_is_trained_stays_one() -> None:
    conv, x = nn.Conv2d(K, 8, 1), torch.randn(2, 3, 4, K)
    with torch.enable_grad():
        result = compiled(Model(lambda m, x: m.conv(x.permute(0, 3, 1, 2)), conv=conv), x)
        assert not result.report.linears
        result.got.sum().backward()
