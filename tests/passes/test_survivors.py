"""What changes of the code went unnoticed without: each test fails under one that once did.

`tools/mutate.py` makes such changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.ops.int8_linear.op import EXACT_K, exact_matmul
from graphquant.ops.numerics import quantize_rows
from tests.passes.graphs import Model, compiled, rewritten
from tests.seen import Seen
from tests.small import int8

K = 16
NEAR = 0.05  # relative: int8 costs about 1 %, a wrong value about 100 %


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, K)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def fc() -> nn.Linear:
    return nn.Linear(K, K)


def right(model: nn.Module, *args: Any) -> Any:
    """What the backend gives is what eager gives, but for int8."""
    result = compiled(model, *args)
    got, want = (torch.stack(r) if isinstance(r, tuple) else r for r in (result.got, result.want))
    assert relative(got, want) < NEAR
    return result


@pytest.mark.parametrize("own", [True, False])
def test_siblings_whose_input_is_written_in_between_read_it_each_at_their_time(
    own: bool, x: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = x.sin() if own else x
        q = m.q(x)
        x[:, 1:].mul_(-2)  # through a view: the second one reads a value of the same name
        return q.sin(), m.k(x).sin()

    right(Model(forward, q=fc(), k=fc()), x)


def test_a_sibling_that_is_written_before_the_next_one_is_not_read_from_a_stack(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q = m.q(x)
        kept = q[:, 0].sin()
        q[:, 0] = 3.0
        return q.sin(), m.k(x).sin() + kept.unsqueeze(1)

    right(Model(forward, q=fc(), k=fc()), x)


@pytest.mark.parametrize("act", [F.gelu, F.silu, F.relu])
def test_an_activation_whose_input_is_written_later_read_it_before(
    act: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = act(x)
        x.mul_(-2)
        return m.fc(h)

    right(Model(forward, fc=fc()), x)


@pytest.mark.parametrize("which", [0, 1])
def test_a_gated_activation_of_which_one_factor_is_written_later_read_it_before(
    which: int, x: Tensor
) -> None:
    def forward(m: Any, *both: Tensor) -> Tensor:
        h = F.silu(both[0]) * both[1]
        both[which].mul_(-2)
        return m.fc(h)

    right(Model(forward, fc=fc()), x, torch.randn_like(x))


@pytest.mark.parametrize(
    "view",
    [lambda t: t.transpose(0, 1), lambda t: t.permute(1, 0, 2)],
    ids=["transpose", "permute"],
)
def test_a_gate_that_is_viewed_before_the_product_is_not_taken_unviewed(
    view: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """As many rows as columns of rows: the shapes say nothing."""
    model = Model(lambda m, x, up: m.fc(view(F.silu(x)) * up), fc=fc())
    right(model, x, torch.randn_like(x))


def test_a_norm_of_a_stacked_linears_result_reads_the_stack(x: Tensor) -> None:
    """As query and key norms do: the value that was there when norms were found is gone."""

    def forward(m: Any, x: Tensor) -> Any:
        return m.out(m.norm(m.q(x))), m.k(x).sin()

    result = rewritten(Model(forward, q=fc(), k=fc(), norm=nn.LayerNorm(K), out=fc()).eval(), x)
    assert {"stack_siblings + linear": 2, "norm_linear": 1}.items() <= result.counts.items()
    for got, want in zip(result.got, result.want, strict=True):
        assert relative(got, want) < NEAR


def test_what_stands_for_a_value_that_is_written_is_written_as_well(x: Tensor) -> None:
    """The first norm's linear is int8 before the second norm is looked at, which reads its result
    before the write."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.fc1(m.norm1(x))
        h = m.norm2(y)
        y.as_strided(y.shape, y.stride()).mul_(-2)  # stays a write in place
        return m.fc2(h), y

    parts = {"norm1": nn.LayerNorm(K), "norm2": nn.LayerNorm(K), "fc1": fc(), "fc2": fc()}
    result = right(Model(forward, **parts), x)
    assert {"norm_linear": 1, "linear": 1}.items() <= result.counts.items()


def test_an_activation_of_a_stacked_linears_result_reads_the_stack(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.down(F.silu(m.gate(x)) * m.up(x))

    result = rewritten(Model(forward, gate=fc(), up=fc(), down=fc()).eval(), x)
    assert result.counts["act_linear"] == 1
    assert relative(result.got, result.want) < 2 * NEAR


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(1, 2),
        lambda t: t.transpose(-1, -2),
        lambda t: t.permute(0, 2, 1),
        lambda t: t.mT,
    ],
    ids=["transpose", "negative dims", "permute", "mT"],
)
@pytest.mark.parametrize("first", [nn.LayerNorm(K), nn.GELU()], ids=["norm", "activation"])
def test_a_transpose_of_a_square_does_not_keep_rows(
    view: Callable[[Tensor], Tensor], first: nn.Module
) -> None:
    model = Model(lambda m, x: m.fc(view(m.first(x))), first=first, fc=fc())
    right(model, torch.randn(2, K, K))


def test_a_second_residual_does_not_replace_the_first(x: Tensor) -> None:
    """Not in a later pass over the graph either: `rewritten` makes a second one."""
    model = Model(lambda m, x, r: m.fc(x) + x.sin() + r, fc=fc())
    result = rewritten(model, x, torch.randn_like(x))
    assert result.counts == {"linear + residual": 1}
    assert relative(result.got, result.want) < NEAR


@pytest.mark.parametrize("K", [EXACT_K + 1, 2 * EXACT_K, 4096, 5000])
def test_sums_beyond_two_to_the_24_are_exact(K: int) -> None:
    draw = torch.Generator().manual_seed(K)
    xq = torch.randint(120, 128, (3, K), generator=draw, dtype=torch.int8)
    wq = torch.randint(120, 128, (5, K), generator=draw, dtype=torch.int8)
    want = xq.long() @ wq.long().T
    assert int(want.min()) > 2**24 * (K // (2 * EXACT_K))
    assert torch.equal(exact_matmul(xq, wq), want.float())  # rounded once


@pytest.mark.parametrize("how", ["data", "set_"])
def test_other_data_is_noticed_though_the_old_is_kept(how: str) -> None:
    """Nothing but the address tells: the object and its version stay, and nothing is freed."""
    model, x = fc().eval(), torch.randn(8, K)
    run = int8(model)
    with torch.no_grad():
        run(x)
        old, new = model.weight.data, torch.randn(K, K)
        if how == "data":
            model.weight.data = new
        else:
            model.weight.set_(new)  # type: ignore[call-overload]
        assert relative(run(x), F.linear(x, new, model.bias)) < NEAR
        model.weight.data = old
        assert relative(run(x), F.linear(x, old, model.bias)) < NEAR


def test_small_rows_keep_their_values() -> None:
    """Far below what any layer computes, but far above the floor that stands for zero."""
    x = torch.linspace(-1, 1, 64)
    for size in (1e-3, 1e-6, 1e-12, 1e-18):
        xq, scale, shift = quantize_rows(size * x)
        assert relative(xq * scale + shift, size * x) < NEAR


def test_siblings_are_smoothed_by_the_largest_of_what_is_known_of_each(x: Tensor) -> None:
    def smoothed(**largest: Tensor) -> Any:
        torch.manual_seed(0)
        model = Model(lambda m, x: (m.q(x).sin(), m.k(x).sin()), q=fc(), k=fc())
        return rewritten(model, x, smooth=0.5, calibration=Seen(largest=largest)).got

    q, k = torch.linspace(0.01, 9.0, K), torch.linspace(9.0, 0.01, K)
    both = torch.maximum(q, k)
    want = smoothed(q=both, k=both)
    assert all(map(torch.equal, smoothed(q=q, k=k), want))
    assert not all(map(torch.equal, smoothed(q=q, k=q), want))


def test_what_is_packed_is_not_in_the_memory_of_a_parameter() -> None:
    """Packing again writes over the pack, which must not be what the parameter was before."""
    parts = {
        "weight": nn.Parameter(torch.randn(2 * K, K)),
        "bias": nn.Parameter(torch.randn(2 * K)),
    }
    model = Model(lambda m, x: F.linear(x, m.weight[:K], m.bias[:K]), **parts).eval()
    run, x = int8(model), torch.randn(8, K)
    run(x)
    old = model.bias.data
    kept = old.clone()
    model.bias.data = torch.randn(2 * K)
    assert relative(run(x), model(x)) < NEAR
    assert torch.equal(old, kept)
