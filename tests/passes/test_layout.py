"""What leaves the graph, and what reads strides or bytes, sees eager's layout and sharing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphquant
from tests.passes.graphs import Model, cloned, name_of, rewritten

B, T, K = 2, 5, 16
INNER = ["eager", "aot_eager"]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, K)


@pytest.fixture(autouse=True)
def _forgets() -> None:
    torch._dynamo.reset()


def facts(*values: Any) -> list[tuple[Any, ...]]:
    """Of every tensor: its layout, how much memory it holds, and with which of the others."""
    known: dict[int, int] = {}
    return [
        (
            tuple(t.shape),
            t.stride(),
            t.storage_offset(),
            t.dtype,
            t.untyped_storage().nbytes(),
            known.setdefault(t.untyped_storage()._cdata, len(known)),
        )
        for t in tree_leaves(values)
        if isinstance(t, Tensor)
    ]


def relative(got: Any, want: Any) -> float:
    """The largest relative error of a result."""
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return max(
        float((g.double() - w.double()).norm() / (w.double().norm() + 1e-9)) for g, w in pairs
    )


def like_eager(
    model: nn.Module,
    *args: Any,
    inner: str = "eager",
    breaks: bool = False,
    tolerance: float = 0.03,
) -> dict[str, int]:
    """The backend's results are eager's but for int8's rounding, and lie in memory as they do."""
    twin, reports = copy.deepcopy(model.eval()), list[graphquant.Report]()
    run = torch.compile(
        model,
        backend="graphquant",
        fullgraph=not breaks,
        options={"inner": inner, "on_report": reports.append},
    )
    mine, theirs = cloned(args), cloned(args)
    got, want = run(*mine), twin(*theirs)
    assert facts(got, mine) == facts(want, theirs)
    assert relative(got, want) < tolerance
    assert relative(mine, theirs) < tolerance
    return graphquant.Report.merge(reports).counts()


def pair(forward: Callable[..., Any], N: int = K) -> Model:
    return Model(forward, a=nn.Linear(K, K), b=nn.Linear(K, N), c=nn.Linear(K, K))


# Siblings ----------------------------------------------------------------------------------------


def _views(m: Any, x: Tensor) -> Any:
    q, k = m.a(x), m.b(x)
    return q, q.view(B, -1), q.view(B, T, 4, 4).transpose(1, 2), k.chunk(2, -1), k.reshape(-1)


def _one_row(m: Any, x: Tensor) -> Any:
    row = x[0, 0].sin()
    return m.a(row), m.b(row)


def _one_row_of_a_matrix(m: Any, x: Tensor) -> Any:
    row = x[0, :1].sin()
    return m.a(row), m.b(row)


def _keys_and_values_for_a_cache(m: Any, x: Tensor) -> Any:
    q, k, v = (p(x).view(B, T, 4, 4).transpose(1, 2) for p in (m.a, m.b, m.c))
    return F.scaled_dot_product_attention(q, k, v), k, v


def _elementwise(m: Any, x: Tensor) -> Any:
    q, k = m.a(x), m.b(x)
    return q * 2, k.transpose(0, 1).cos(), torch.empty_like(q).fill_(1)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "forward",
    [_views, _one_row, _one_row_of_a_matrix, _keys_and_values_for_a_cache, _elementwise],
)
def test_returned_siblings_lie_as_in_eager_and_apart(forward: Any, inner: str, x: Tensor) -> None:
    counts = like_eager(pair(forward), x, inner=inner)
    assert counts.keys() == {"stack_siblings + linear"}


def test_siblings_behind_a_graph_break_can_be_viewed(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q, k = m.a(x), m.b(x)
        torch._dynamo.graph_break()
        return q.view(B, -1) + k.view(B, -1), q.view(torch.int32).isnan()

    like_eager(pair(forward), x, breaks=True)


def test_only_the_sibling_that_leaves_is_copied(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q, k, v = (p(x).view(B, T, 4, 4).transpose(1, 2) for p in (m.a, m.b, m.c))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, K), k

    ops = rewritten(pair(forward), x).ops()
    assert ops["slice"] == 3 and ops["clone"] == 1


def test_siblings_that_attention_reads_stay_slices(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(B, T, 4, 4).transpose(1, 2) for p in (m.a, m.b, m.c))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, K)

    ops = rewritten(pair(forward), x).ops()
    assert ops["slice"] == 3 and "clone" not in ops


def test_a_view_of_a_slice_that_no_view_can_be_is_a_copy_inside_the_graph(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x).view(-1).cumsum(0) + m.b(x).view(-1)

    result = rewritten(pair(forward), x)
    assert "clone" not in result.ops() and "view" not in result.ops()
    assert result.got.is_contiguous() and relative(result.got, result.want) < 0.03


# Readers of strides and bytes --------------------------------------------------------------------


@torch.library.custom_op("test_layout::strides", mutates_args=())
def strides(x: Tensor) -> Tensor:
    return torch.tensor([*x.stride(), x.storage_offset()], dtype=torch.float32, device=x.device)


@strides.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.dim() + 1, dtype=torch.float32)


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided": lambda t: t.as_strided((4, T), (2, 16)),
    "as_strided of a view": lambda t: t.transpose(0, 1)[1:].as_strided((T, 4), (1, 32)),
    "as_strided_copy": lambda t: torch.as_strided_copy(t, (4, T), (2, 16)),
    "as_strided of what follows its layout": lambda t: (
        t.transpose(0, 1).cos().as_strided((9,), (3,))
    ),
    "view_as_complex": lambda t: torch.view_as_complex(t.unflatten(-1, (-1, 2))).real,
    "view of wider numbers": lambda t: t.view(torch.float64).isnan(),
    "view of narrower numbers": lambda t: t.view(torch.int16).clamp(0, 0),
    "a custom op": lambda t: strides(t),
    "a custom op on a view": lambda t: strides(t.transpose(0, 1).relu()),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_strides_beside_an_odd_sibling_reads_eagers(
    name: str, inner: str, x: Tensor
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        odd, even = m.b(x), m.a(x)
        return READERS[name](even), odd.sum(-1)

    counts = like_eager(pair(forward, 7), x, inner=inner, tolerance=0.1)
    assert counts == {"stack_siblings + linear": 2}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_of_strides_behind_a_folded_residual_reads_eagers(name: str, x: Tensor) -> None:
    """A sum takes the layout of its first operand, an int8 linear's result is contiguous."""

    def forward(m: Any, x: Tensor) -> Tensor:
        r = x.transpose(0, 1)
        total = r + m.a(r)
        return READERS[name](total.transpose(0, 1))

    assert like_eager(pair(forward), x, tolerance=0.1) == {"linear + residual": 1}


def test_a_checkpoint_reads_siblings_as_they_lay(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        again = torch.utils.checkpoint.checkpoint(
            lambda t: t.view(B, -1).sin(), m.a(x), use_reentrant=False
        )
        return again, m.b(x).sum(-1)

    like_eager(pair(forward), x)


# Other rules -------------------------------------------------------------------------------------

IMAGE = (2, 3, 16, 16)
PATCHES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda y: y,
    "an activation": F.gelu,
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "as_strided": lambda y: y.as_strided((2, 8, 4), (128, 1, 8)),
    "two views": lambda y: (y.flatten(2), y[:, :3]),
    "a sum": lambda y: (y + torch.ones_like(y)).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_embedding_that_leaves_lies_as_a_convolution(name: str) -> None:
    model = Model(lambda m, x: PATCHES[name](m.conv(x)), conv=nn.Conv2d(3, 8, 4, 4))
    like_eager(model, torch.randn(IMAGE), tolerance=1e-5)


def test_tokens_of_patches_are_not_copied_for_what_reads_them() -> None:
    model = Model(
        lambda m, x: m.fc(m.norm(m.conv(x).flatten(2).transpose(1, 2))),
        conv=nn.Conv2d(3, K, 4, 4),
        norm=nn.LayerNorm(K),
        fc=nn.Linear(K, 8),
    )
    assert not {"clone", "contiguous"} & rewritten(model, torch.randn(IMAGE)).ops().keys()


@pytest.mark.parametrize("inner", INNER)
def test_a_folded_residual_that_leaves_lies_as_the_sum_did(inner: str, x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        r = x.transpose(0, 1)
        total = r + m.a(r)
        return total, total.sin(), m.b(total)

    assert like_eager(pair(forward), x, inner=inner) == {"linear + residual": 1, "linear": 1}


def test_layouts_hold_for_sizes_that_are_symbols(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q, k = m.a(x), m.b(x)
        r = x.transpose(0, 1)
        return q.view(q.shape[0], -1), k, r + m.c(r)

    model = pair(forward)
    run = torch.compile(model, backend="graphquant", dynamic=True, options={"inner": "eager"})
    for size in ((2, 5, K), (3, 7, K), (4, 2, K)):
        given = torch.randn(size)
        got, want = run(given), model(given)
        assert facts(got) == facts(want) and relative(got, want) < 0.03


# Results that share memory -----------------------------------------------------------------------


def _copies(m: Any, x: Tensor) -> Any:
    t = m.a(x).transpose(0, 1)
    return t.reshape(-1), t.reshape(-1), t.contiguous(), t.contiguous(), t


def _equal_views(m: Any, x: Tensor) -> Any:
    t = m.a(x)
    return t.reshape(-1), t.reshape(-1), t.clone(), t.clone(), t.contiguous(), t


def _inputs(m: Any, x: Tensor) -> Any:
    return x.view(-1), m.a(x), x.transpose(0, 1).reshape(-1), x.reshape(-1)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("forward", [_copies, _equal_views, _inputs])
def test_results_share_memory_where_they_do_in_eager(forward: Any, inner: str, x: Tensor) -> None:
    like_eager(pair(forward), x, inner=inner)


def test_writing_one_of_two_equal_copies_leaves_the_other(x: Tensor) -> None:
    run = torch.compile(
        pair(lambda m, x: (x.mT.reshape(-1), x.mT.reshape(-1), m.a(x))),
        backend="graphquant",
        options={"inner": "eager"},
    )
    first, second, _ = run(x)
    first.zero_()
    assert torch.equal(second, x.mT.reshape(-1))


def test_a_returned_constant_is_a_new_one_at_every_call(x: Tensor) -> None:
    run = torch.compile(
        pair(lambda m, x: (m.a(x), torch.tensor([1.0, 2.0]))),
        backend="graphquant",
        options={"inner": "eager"},
    )
    for _ in range(3):
        constant = run(x)[1]
        assert constant.tolist() == [1, 2]
        constant.add_(1)


@pytest.mark.parametrize(
    "forward",
    [_views, _copies, _equal_views, _keys_and_values_for_a_cache],
    ids=lambda f: f.__name__,
)
def test_an_exported_program_returns_eagers_layouts(forward: Any, x: Tensor) -> None:
    model = pair(forward).eval()
    program = graphquant.export(model, (x,))
    got, want = program.module()(x), model(x)
    assert facts(got) == facts(want) and relative(got, want) < 0.03


def test_float_results_of_stacked_linears_lie_as_in_eager(x: Tensor) -> None:
    result = rewritten(pair(lambda m, x: (m.a(x), m.b(x).view(B, -1))), x, quantize=False)
    assert result.counts == {"stack_siblings": 2}
    assert facts(result.got) == facts(result.want)
    assert [name_of(n) for n in result.graph.nodes].count("clone") == 2
