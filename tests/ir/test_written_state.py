"""State that the model writes while it runs is no constant: it is read when the model reads it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from tests.passes.graphs import Model
from tests.passes.test_layout import relative

K = 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, K - 4)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 4))


def _slice(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return m.k(m.mem)


def _before_and_after(m: Any, x: Tensor) -> Any:
    before = m.k(m.mem)
    m.mem[:, 4:] = x
    return before, m.k(m.mem)


def _whole(m: Any, x: Tensor) -> Any:
    m.mem.copy_(padded(x))
    return m.k(m.mem)


def _by_index(m: Any, x: Tensor) -> Any:
    m.mem.index_copy_(0, torch.arange(2), padded(x)[1:])
    return m.k(m.mem)


def _out(m: Any, x: Tensor) -> Any:
    torch.add(padded(x), 1, out=m.mem)
    return m.k(m.mem)


def _foreach(m: Any, x: Tensor) -> Any:
    torch._foreach_mul_([m.mem], 1.5)
    torch._foreach_add_([m.mem[:, 4:]], [x])
    return m.k(m.mem)


def _through_a_view(m: Any, x: Tensor) -> Any:
    m.mem.t()[4:].copy_(x.t())
    return m.k(m.mem)


def _through_an_undeclared_view(m: Any, x: Tensor) -> Any:
    torch.einsum("ij->ji", m.mem)[4:].copy_(x.t())
    return m.k(m.mem)


def _computed_from_it(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return m.k(m.norm(m.mem * 2)), m.k(F.gelu(m.mem).view(3, K))


def _a_weight(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return F.linear(padded(x), m.mem), F.linear(padded(x), m.mem * 2, m.mem[:, 0])


def _a_weight_that_is_made_and_written(m: Any, x: Tensor) -> Any:
    w = m.k.weight * 2
    w.as_strided((4,), (5,)).add_(1.0)  # a view without a scatter: the write stays in place
    return F.linear(padded(x), w), F.linear(padded(x), w + 1)


def _a_bias(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return F.linear(padded(x), m.k.weight[:3], m.mem[:, 5])


def _gamma(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return m.k(F.layer_norm(padded(x), (K,), m.mem[0], m.mem[1]))


def _gamma_written_later(m: Any, x: Tensor) -> Any:
    y = m.k(F.layer_norm(padded(x), (K,), m.mem[0], m.mem[1]))
    m.mem[:, 4:] = x
    return y


def _a_layer_scale(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return m.k(padded(x)) * m.mem[0, :8]


def _a_residual(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    return m.mem[:, :8] + m.k(padded(x))


def _a_patch_embedding(m: Any, x: Tensor) -> Any:
    m.mem[:, 4:] = x
    image = torch.ones(1, 1, 8, 8) * x[0, 0]
    return F.conv2d(image, m.mem.view(3, 1, 4, 4), stride=4)


@torch.library.custom_op("test_state::remember", mutates_args={"mem"})
def remember(mem: Tensor, x: Tensor) -> None:
    mem[:, 4:].copy_(x)


def _a_custom_op(m: Any, x: Tensor) -> Any:
    torch.ops.test_state.remember(m.mem, x)
    return m.k(m.mem)


WRITES = [
    _slice,
    _before_and_after,
    _whole,
    _by_index,
    _out,
    _foreach,
    _through_a_view,
    _through_an_undeclared_view,
    _computed_from_it,
    _a_weight,
    _a_weight_that_is_made_and_written,
    _a_bias,
    _gamma,
    _gamma_written_later,
    _a_layer_scale,
    _a_residual,
    _a_patch_embedding,
    _a_custom_op,
]


def stateful(forward: Any) -> Model:
    norm = nn.LayerNorm(K)
    return Model(forward, k=nn.Linear(K, 8), mem=torch.randn(3, K), norm=norm).eval()


def agree(mine: Any, theirs: Any, model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Three calls, each of which begins with the state that the one before has left."""
    for i in range(3):
        assert relative(mine(x + i), theirs(x + i)) < 0.03
    for (name, got), (_, want) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("forward", WRITES)
def test_a_written_buffer_is_read_as_it_is_by_then(forward: Any, inner: str, x: Tensor) -> None:
    model = stateful(forward)
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="graphquant", fullgraph=True, options={"inner": inner})
    agree(run, twin, model, twin, x)


@pytest.mark.parametrize("forward", WRITES)
def test_an_exported_program_reads_what_it_has_written(forward: Any, x: Tensor) -> None:
    twin = stateful(forward)
    program = graphquant.export(copy.deepcopy(twin), (x,)).module()
    for i in range(3):
        assert relative(program(x + i), twin(x + i)) < 0.03


class Attributes(nn.Module):
    """State that is no buffer: a tensor, and a learned token."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(K, 8)
        self.mem = torch.randn(3, K)
        self.token = nn.Parameter(torch.randn(3, K), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        self.mem[:, 4:] = x
        self.token[:, 4:].mul_(x)
        return self.k(self.mem), self.k(self.token)


def test_a_written_attribute_and_a_learned_token_are_no_constants(x: Tensor) -> None:
    model = Attributes().eval()
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    agree(run, twin, model, twin, x)
    assert torch.equal(model.mem, twin.mem)


class Shared(nn.Module):
    """Two parameters on one storage, of which one is written."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.randn(32, K, generator=torch.Generator().manual_seed(0))
        self.written = nn.Parameter(memory[:16], requires_grad=False)
        self.weight = nn.Parameter(memory[8:24], requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        before = F.linear(padded(x), self.weight)
        self.written[8:].mul_(1.5)
        return before, F.linear(padded(x), self.weight)


def test_a_parameter_on_a_written_storage_is_no_constant(x: Tensor) -> None:
    model, twin = Shared(), Shared()  # a copy's parameters have storages of their own
    reports: list[graphquant.Report] = []
    options = {"inner": "eager", "on_report": reports.append}
    run = torch.compile(model, backend="graphquant", options=options)
    agree(run, twin, model, twin, x)
    assert {o.refused for o in reports[0].linears} == {
        "its weight is not fixed: weight is written in place"
    }


def test_statistics_that_a_batch_norm_updates_are_no_constants(x: Tensor) -> None:
    """batch_norm's schema says nothing of it."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.bn(x)
        return m.k(m.bn.running_mean[None]), F.linear(y, m.bn.running_var.expand(4, -1))

    model = Model(forward, bn=nn.BatchNorm1d(K - 4), k=nn.Linear(K - 4, 8))
    twin = copy.deepcopy(model)
    run = torch.compile(model, backend="graphquant", options={"inner": "eager"})
    agree(run, twin, model, twin, x)


def test_statistics_that_are_only_read_are_constants(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return F.linear(m.bn(x), m.bn.running_var.expand(4, -1))

    model = Model(forward, bn=nn.BatchNorm1d(K - 4)).eval()
    reports: list[graphquant.Report] = []
    options = {"inner": "eager", "on_report": reports.append}
    torch.compile(model, backend="graphquant", options=options)(x)
    assert reports[0].coverage == 1


def test_what_is_written_behind_a_weight_is_named(x: Tensor) -> None:
    reports: list[graphquant.Report] = []
    options = {"inner": "eager", "on_report": reports.append}
    block = stateful(_a_weight)
    model = Model(lambda m, x: m.block(x), block=block)
    torch.compile(model, backend="graphquant", options=options)(x)
    assert {o.refused for o in reports[0].linears} == {
        "its weight is not fixed: block.mem is written in place"
    }
