"""graphquant.standalone: a program in torch's own ops, for processes without graphquant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

import graphquant
from graphquant import OptionError
from graphquant.exporters import standalone
from graphquant.exporters.standalone import PRODUCTS, int_mm
from graphquant.ops import cpu, int8_linear
from tests import zoo
from tests.models import BREAKS, pairs
from tests.processes import WITHOUT, in_a_new_process
from tests.small import Mlp, seeded

TABLE = [p for p in pairs(zoo.SMALL) if p[0] not in BREAKS]  # those torch.export refuses as well
SOME = {("siglip", "sdpa"), ("dinov2_swiglu", "sdpa")}


def targets(program: ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@torch.no_grad()
def called(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    return program.module()(*args, **kwargs)


def by_references(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    """What the program computes on a machine without CPU kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "missing", lambda: "no kernels here")
        return called(program, *args, **kwargs)


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "attn"),
    [pytest.param(*p, marks=() if p in SOME else pytest.mark.slow) for p in TABLE],
)
def test_on_the_cpu_it_is_the_same_bit_for_bit(name: str, attn: str) -> None:
    entry = zoo.SMALL[name]
    args, kwargs = entry.inputs(2)
    program = graphquant.export(entry.build(attn), args, kwargs)
    alone = graphquant.standalone(program)
    assert not any("graphquant" in t for t in targets(alone))
    assert any("graphquant" in t for t in targets(program)), "it stays as it was"
    want, got = by_references(program, *args, **kwargs), called(alone, *args, **kwargs)
    assert type(got) in (dict, tuple, list, Tensor)
    names = getattr(want, "keys", lambda: None)()
    assert names is None or list(got) == list(names)
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert torch.equal(g, w)


def test_results_inside_results_keep_their_places() -> None:
    entry = zoo.SMALL["bert"]
    _, kwargs = entry.inputs(2)
    kwargs["output_hidden_states"] = True
    program = graphquant.export(entry.build("sdpa"), (), kwargs)
    got, want = called(graphquant.standalone(program), **kwargs), by_references(program, **kwargs)
    assert type(got["hidden_states"]) is tuple
    pairs_ = zip(got["hidden_states"], want.hidden_states, strict=True)
    assert all(torch.equal(g, w) for g, w in pairs_)


def test_a_file_loads_where_nothing_but_torch_is(tmp_path: Path) -> None:
    entry = zoo.SMALL["bert"]
    _, kwargs = entry.inputs(3)
    sizes = {0: Dim("batch"), 1: Dim("length", max=40)}
    program = graphquant.export(
        entry.build("sdpa"), (), kwargs, dynamic_shapes=dict.fromkeys(kwargs, sizes)
    )
    torch.export.save(graphquant.standalone(program), tmp_path / "model.pt2")
    other = {n: v[:, :11] for n, v in entry.inputs(5)[1].items()}
    want = by_references(program, **other).pooler_output
    torch.save((other, want), tmp_path / "x.pt")
    code = """
import torch
program = torch.export.load(sys.argv[1])
kwargs, want = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(program.module()(**kwargs)["pooler_output"], want)
print("equal")
"""
    done = in_a_new_process(WITHOUT + code, tmp_path / "model.pt2", tmp_path / "x.pt")
    assert done.stdout == "equal\n", done.stderr


# What becomes of products -----------------------------------------------------------------------


@given(M=st.integers(0, 40), N=st.integers(1, 40), K=st.integers(1, 40))
def test_int8_products_of_any_size_are_exact(M: int, N: int, K: int, device: str) -> None:
    xq, wq = int8(M, K), int8(N, K)
    got = int_mm(xq.to(device), wq.to(device))
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu().long(), xq.long() @ wq.long().T)


class Product(nn.Module):
    wq: Tensor

    def __init__(self, N: int, K: int) -> None:
        super().__init__()
        self.register_buffer("wq", int8(N, K))

    def forward(self, xq: Tensor) -> Tensor:
        return int_mm(xq, self.wq)


def test_int8_products_take_any_number_of_rows_at_run_time(device: str) -> None:
    model = Product(13, 60).to(device)
    x = int8(9, 60).to(device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows")},))
    for rows in (1, 2, 16, 17, 50):
        x = int8(rows, 60)
        want = x.long() @ model.wq.cpu().long().T
        assert torch.equal(called(program, x.to(device)).cpu().long(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_by_one_product_is_the_reference(dtype: torch.dtype) -> None:
    rows, N, K = (2, 5), 27, 2100  # more than one chunk of the reference
    column = torch.rand(*rows, 1), torch.randn(*rows, 1), int8(N, K), torch.rand(N), torch.randn(N)
    for more in ((None, None), (torch.randn(N), torch.randn(*rows, N))):
        args = int8(*rows, K), *column, *more, dtype
        assert torch.equal(standalone.by_int_mm(*args), int8_linear.reference(*args))


def test_on_cuda_attention_stays_in_its_dtype() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device="cuda") for _ in "qkv")
        y = standalone._attention(q, k, v, 0.125, "64x64")
    assert (y.shape, y.dtype, y.device.type) == (q.shape, torch.bfloat16, "cuda")


def products(program: ExportedProgram) -> list[str]:
    return [t for t in targets(program) if "mm" in t or "linear" in t]


@pytest.mark.parametrize("vnni", [False, True])
def test_products_are_int8_where_that_is_fast(
    vnni: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "has_vnni", lambda: vnni)
    model, x = seeded(Mlp).eval().to(device), torch.randn(40, 64, device=device)
    program = graphquant.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    alone = graphquant.standalone(program)
    fast = device == "cuda" or vnni
    assert products(alone) == (["aten._int_mm.default"] if fast else ["aten.mm.default"])
    got, want = called(alone, x), called(program, x)
    # the same arithmetic, rounded elsewhere: at most a few values fall one int8 step aside
    assert (got - want).norm() < 2e-3 * want.norm()


def test_products_can_be_chosen_and_are_the_same_bit_for_bit() -> None:
    model, x = seeded(Mlp).eval(), torch.randn(40, 64)
    program = graphquant.export(model, (x,))
    made = [graphquant.standalone(program, products=how) for how in PRODUCTS]
    assert [*map(products, made)] == [["aten._int_mm.default"], ["aten.mm.default"]]
    want = by_references(program, x)
    assert all(torch.equal(called(each, x), want) for each in made)
    with pytest.raises(OptionError, match="products='int4' is not one of 'int8', 'float32'"):
        graphquant.standalone(program, products="int4")


def test_extreme_products_are_exact_here(device: str) -> None:
    """Where sums of pairs saturate, those of the largest values do."""
    most = torch.full((2, 20_000), 127, dtype=torch.int8)
    most[1] = -127
    got = int_mm(most.to(device), most.to(device))
    sum_ = 20_000 * 127**2
    assert got.tolist() == [[sum_, -sum_], [-sum_, sum_]]
