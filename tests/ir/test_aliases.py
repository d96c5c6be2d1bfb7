"""A write reaches every alias of what it writes to, declared by a schema or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.ir.aliases import may_alias, written_in_place
from tests.passes.graphs import Model, compiled, exported, name_of, rewritten
from tests.passes.test_layout import relative

K = 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, K)


# A view or copy of h; what its schema says of aliases is nothing, or too little.
UNDECLARED: dict[str, Callable[[Tensor], Tensor]] = {
    "einsum": lambda h: torch.einsum("bij->bji", h),
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h, torch.zeros(1))[0],
    "meshgrid": lambda h: torch.meshgrid(h[0, 0], h[0, 1], indexing="ij")[0][:, 0],
    "cartesian_prod": lambda h: torch.cartesian_prod(h[0, 0]),
    "unsafe_chunk": lambda h: torch.unsafe_chunk(h, 2)[0],
    "unsafe_split": lambda h: torch.unsafe_split(h, 1)[1],
    "tensor_split": lambda h: torch.tensor_split(h, 2)[0],
    "lift": lambda h: torch.ops.aten.lift(h),
    "atleast_3d": lambda h: torch.atleast_3d(h),
    "real": lambda h: torch.real(h),
    "as a complex number and back": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(2, 5, K // 2, 2))
    ),
}
READ: dict[str, Callable[[Any, Tensor], Any]] = {
    "a norm": lambda m, h: m.b(m.norm(h)),
    "an activation": lambda m, h: m.b(F.gelu(h)),
    "siblings": lambda m, h: (m.b(h), m.c(h)),
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_a_write_through_an_alias_that_no_schema_declares_is_seen(name: str, x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        UNDECLARED[name](h).mul_(3.0)
        return m.b(m.norm(h)), h

    parts = {"a": nn.Linear(K, K), "b": nn.Linear(K, K), "norm": nn.LayerNorm(K)}
    for result in (compiled(Model(forward, **parts), x), rewritten(Model(forward, **parts), x)):
        assert relative(result.got, result.want) < 0.02


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("read", READ)
def test_readers_before_and_after_such_a_write_read_different_values(
    read: str, inner: str, x: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        alias = torch.einsum("bij->bji", h)
        before = READ[read](m, h)
        alias[:, ::2].mul_(-3.0)
        return before, READ[read](m, h), h

    parts = {"norm": nn.LayerNorm(K), **{name: nn.Linear(K, K) for name in "abc"}}
    result = compiled(Model(forward, **parts), x, inner=inner)
    assert relative(result.got, result.want) < 0.02


STEPS: dict[str, Callable[[Any, Tensor, Callable[[Tensor], Any]], Any]] = {
    "a copy of a norm's result": lambda m, h, write: m.b(write(m.norm(h).clone())),
    "a cast in front of a norm": lambda m, h, write: m.b(m.norm(write(h.double()).float())),
    "a cast behind a norm": lambda m, h, write: m.b(write(m.norm(h).bfloat16()).float()),
    "a step of a norm": lambda m, h, write: m.b(
        write(h - h.mean(-1, keepdim=True))
        * torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + 1e-5)
    ),
    "a step of an activation": lambda m, h, write: m.b(h * write(torch.sigmoid(h))),
    "an activation": lambda m, h, write: m.b(write(F.gelu(h))),
    "a sibling": lambda m, h, write: write(m.b(h)) + m.c(h),
    "a sum with a residual": lambda m, h, write: write(m.b(h) + h),
    "a scaled product": lambda m, h, write: write(m.b(h) * m.norm.weight),
    "patches": lambda m, h, write: m.b(
        write(F.conv2d(h.view(1, 1, 10, K), m.kernel, stride=2)).flatten(2).transpose(1, 2)
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_a_rule_would_take_over_is_not_if_it_is_written_on_the_way(
    step: str, x: Tensor
) -> None:
    def write(t: Tensor) -> Tensor:
        torch.einsum("...ij->...ji", t)[..., ::2, :].mul_(-3.0)
        return t

    parts: dict[str, Any] = {name: nn.Linear(K, K) for name in "abc"}
    norm = nn.LayerNorm(K)
    norm.weight.uniform_(1, 2)
    kernel = nn.Parameter(torch.randn(K, 1, 2, 2))
    model = Model(lambda m, x: STEPS[step](m, m.a(x), write), norm=norm, kernel=kernel, **parts)
    for result in (compiled(model, x), rewritten(model, x)):
        assert relative(result.got, result.want) < 0.02


def test_an_input_that_is_written_through_an_undeclared_alias_is_read_in_time(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        first = m.a(x)
        torch.einsum("bij->bji", x).mul_(2)
        return first, m.b(x)

    result = compiled(Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, K)), x)
    assert result.counts == {"linear": 2}
    assert relative(result.got, result.want) < 0.02


def test_two_inputs_on_one_storage_are_aliases() -> None:
    memory = torch.randn(3, 4, K)

    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        first = m.a(x)
        y.mul_(2)
        return first, m.b(x)

    model = Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, K))
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    mine, theirs = memory.clone(), memory.clone()
    got, want = run(mine[:2], mine[1:]), model(theirs[:2], theirs[1:])
    assert relative(got, want) < 0.02 and torch.equal(mine, theirs)


def test_a_gradient_is_found_through_an_undeclared_alias(x: Tensor) -> None:
    weight = nn.Parameter(torch.randn(K))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.sin()
        torch.einsum("bij->bji", h).mul_(weight[:, None])
        return m.a(h).sum()

    model = Model(forward, a=nn.Linear(K, K).requires_grad_(False))
    with torch.enable_grad():
        run = torch.compile(model, backend="graphquant", options={"inner": "aot_eager"})
        (got,) = torch.autograd.grad(run(x), weight)
        (want,) = torch.autograd.grad(model(x), weight)
    torch.testing.assert_close(got, want)


def test_a_write_inside_a_checkpoint_is_a_write(x: Tensor) -> None:
    def inside(h: Tensor) -> Tensor:
        return h.view(-1).mul_(2).sum()

    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        total = torch.utils.checkpoint.checkpoint(inside, h, use_reentrant=False)
        return m.b(h), m.c(h), total

    parts = {name: nn.Linear(K, K) for name in "abc"}
    result = compiled(Model(forward, **parts), x)
    assert relative(result.got, result.want) < 0.02


def test_an_alias_is_what_shares_memory(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = x.sin()
        view, copied = torch.einsum("bij->bji", h), torch.einsum("bij,bij->bij", h, h)
        view.mul_(2)
        return copied, h, view

    graph = exported(Model(forward), x).gm.graph
    named = {name_of(n): n for n in graph.nodes if n.op == "call_function"}
    views = [n for n in graph.nodes if name_of(n) == "einsum"]
    assert named["sin"] in may_alias(views[0]) and not may_alias(views[1])
    assert {named["sin"], views[0]} <= written_in_place(graph)
    assert views[1] not in written_in_place(graph)


# Writes that become values -----------------------------------------------------------------------


def _sliced(m: Any, x: Tensor) -> Tensor:
    b = m.bias.clone()
    b[4:8].zero_()
    return F.linear(x, m.w, b)


def _viewed(m: Any, x: Tensor) -> Tensor:
    b = m.bias.clone()
    b.view(4, 4)[1].fill_(2.0)
    return F.linear(x, m.w, b)


def _in_pieces(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    q, k, _, o = w.chunk(4)
    k.zero_()
    o.copy_(q)
    first, second = w.unbind(1)[:2]
    first.add_(second)
    return F.linear(x, w)


def _transposed(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w.t()[2:5].mul_(2)
    w.permute(1, 0).diagonal().zero_()
    return F.linear(x, w)


def _joined(m: Any, x: Tensor) -> Tensor:
    w = torch.zeros_like(m.w)
    w[:8].copy_(m.w[8:])
    w[8:, :4] += m.w[:8, :4]
    return F.linear(x, w)


@pytest.mark.parametrize("forward", [_sliced, _viewed, _in_pieces, _transposed, _joined])
def test_a_copy_of_a_parameter_that_is_written_is_packed(forward: Any, x: Tensor) -> None:
    """As torchvision's swin_v2 clears the bias of its keys."""
    model = Model(forward, w=nn.Parameter(torch.randn(K, K)), bias=nn.Parameter(torch.randn(K)))
    for result in (compiled(model, x), rewritten(model, x)):
        assert result.counts == {"linear": 1}
        assert relative(result.got, result.want) < 0.02


def test_such_a_copy_follows_its_parameter(x: Tensor) -> None:
    model = Model(_sliced, w=nn.Parameter(torch.randn(K, K)), bias=nn.Parameter(torch.randn(K)))
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    run(x)
    model.bias.mul_(-50)
    assert relative(run(x), model(x)) < 0.02


def _old_views(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    first, turned, flat = y[0], torch.einsum("bij->bji", y), y.view(-1, K)
    y.mul_(2)
    first[:, 0] = 7
    return m.b(m.norm(y)), first, turned, flat, first.view(-1)


def _rows_of_copies(m: Any, x: Tensor) -> Any:
    z = torch.zeros(2, 5, 2 * K)
    z[..., :K] = m.a(x)
    z[..., K:].copy_(x[:1])
    return m.b(z[..., :K]), z


def _narrower(m: Any, x: Tensor) -> Any:
    y = x.bfloat16().sin()
    y += x
    return m.b(y.float()), y


def _chosen(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y.clamp_(0, 1).masked_fill_(y > 0.5, 0.0)
    y.index_add_(0, torch.tensor([1]), x[:1])
    y.squeeze().unsqueeze(0)[0, 0].relu_()
    return m.b(y), y


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("forward", [_old_views, _rows_of_copies, _narrower, _chosen])
def test_all_names_of_what_is_written_see_it(forward: Any, inner: str, x: Tensor) -> None:
    model = Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, K), norm=nn.LayerNorm(K))
    result = compiled(model, x, inner=inner)
    assert result.report.coverage == 1
    assert relative(result.got, result.want) < 0.02


def test_a_write_of_random_numbers_stays(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 0].normal_()
        y.mul_(2)
        return y

    result = rewritten(Model(forward, a=nn.Linear(K, K)), x)
    assert result.ops()["normal_"] == 1
    assert relative(result.got[:, 1:], result.want[:, 1:]) < 0.02


def test_a_write_without_autograd_leaves_the_gradient(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.sin()
        with torch.no_grad():
            y.mul_(0.5)
        return m.a(y).sum()

    model, x = Model(forward, a=nn.Linear(K, K)), x.requires_grad_()
    with torch.enable_grad():
        run = torch.compile(model, backend="graphquant", options={"inner": "aot_eager"})
        (got,), (want,) = (torch.autograd.grad(f(x), x) for f in (run, model))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_what_stays_written_is_named_by_what_it_is_made_of(where: str, x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        copied = getattr(m.a, where).clone()
        torch.einsum("...i->i...", copied)[:3].fill_(0)
        parts = {"weight": m.a.weight, "bias": m.a.bias, where: copied}
        return F.linear(x, parts["weight"], parts["bias"])

    block = Model(forward, a=nn.Linear(K, K))
    result = compiled(Model(lambda m, x: m.block(x), block=block), x)
    assert result.refused("linear") == [
        f"its {where} is not fixed: a value computed from block.a.{where} in block is written in "
        "place"
    ]
    torch.testing.assert_close(result.got, result.want)
