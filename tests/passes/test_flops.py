"""What multiplies and is no linear is counted, and says why it stays in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from graphquant import Report
from tests.small import Model

D = 16


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def explained(forward: Any, *args: Any, **parts: Any) -> Report:
    model = Model(forward, fc=nn.Linear(D, D), **parts)
    with torch.no_grad():
        return graphquant.explain(model, *args)


B, S = 2, 5
LINEAR = 2 * B * S * D * D


@pytest.mark.parametrize(
    ("forward", "kind", "flops"),
    [
        (lambda m, x: torch.einsum("bsd,btd->bst", m.fc(x), x), "matmul", 2 * B * S * S * D),
        (lambda m, x: m.fc(x) @ x.mT, "matmul", 2 * B * S * S * D),
        (lambda m, x: torch.bmm(m.fc(x), x.mT), "matmul", 2 * B * S * S * D),
        (lambda m, x: m.fc(x) @ x[0, 0], "matmul", 2 * B * S * D),
        (lambda m, x: torch.inner(m.fc(x)[0], x[1]), "matmul", 2 * S * S * D),
        (
            lambda m, x: F.scaled_dot_product_attention(m.fc(x)[:, None], x[:, None], x[:, None]),
            "attention",
            4 * B * S * S * D,
        ),
        (
            lambda m, x: F.conv1d(m.fc(x).mT, torch.ones(4, D, 3), padding=1),
            "convolution",
            2 * B * S * 4 * D * 3,
        ),
    ],
)
def test_each_kind_has_its_flops_and_a_reason(forward: Any, kind: str, flops: int) -> None:
    report = explained(forward, torch.randn(B, S, D))
    (product,) = report.products
    assert (product.kind, product.flops) == (kind, flops) and product.refused
    assert report.coverage == 1.0
    assert report.total_coverage == pytest.approx(LINEAR / (LINEAR + flops))
    assert f"and {report.total_coverage:.1%} of all products'" in report.summary()
    assert f"1 {kind}" in str(report) and product.refused in " ".join(str(report).split())
    assert Report.from_json(report.to_json()) == report


def test_what_is_no_product_is_not_counted() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.layer_norm(m.fc(x) * x + x, (D,))
        return torch.where(y > 0, y, torch.cat([x, x])[: len(y)]).softmax(-1)

    report = explained(forward, torch.randn(B, S, D))
    assert report.products == () and report.total_coverage == report.coverage == 1.0
    assert "products" not in report.summary()


def test_counting_adds_no_guard_on_a_dynamic_size() -> None:
    x = torch.randn(B, S, D)
    torch._dynamo.mark_dynamic(x, 1)
    seen: list[Report] = []
    model = Model(lambda m, x: torch.einsum("bsd,btd->bst", m.fc(x), x), fc=nn.Linear(D, D))
    options = {"inner": "eager", "on_report": seen.append}
    with torch.no_grad():
        run = torch.compile(model, backend="graphquant", options=options)
        run(x)
        run(torch.randn(B, S + 2, D))
    assert len(seen) == 1 and seen[0].products[0].flops == 2 * B * S * S * D
