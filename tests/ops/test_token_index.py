"""token_index against its definition, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from graphquant.ops import token_index
from graphquant.ops.define import Kernel, Op
from graphquant.ops.token_index.op import SIZES, TILE, exact_rows, rounded
from tests.ops.bounds import implementations, kernels

NAMES = ("index", "slot", "position", "cu_seqlens", "tiles", "count")
INT32 = ("position", "cu_seqlens", "tiles", "count")


def mask(B: int, S: int, share: float, seed: int) -> Tensor:
    """A share of the tokens is valid; of the second sequence, none."""
    valid = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < share
    if B > 1:
        valid[1] = False
    return valid


masks = st.builds(
    mask,
    B=st.integers(1, 6),
    S=st.integers(1, 20) | st.sampled_from([63, 64, 65, 128, 200]),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
)


@implementations(token_index)
@given(valid=masks, front=st.booleans())
@example(valid=torch.zeros(3, 4, dtype=torch.bool), front=False)
@example(valid=torch.zeros(3, 4, dtype=torch.bool), front=True)
@example(valid=torch.ones(1, 1, dtype=torch.bool), front=False)
def test_every_result_is_what_it_says(
    op: Op, kernel: Kernel, device: str, valid: Tensor, front: bool
) -> None:
    B, S = valid.shape
    got = dict(zip(NAMES, kernel.fn(valid.to(device), front), strict=True))
    for name, t in got.items():
        assert t.dtype == (torch.int32 if name in INT32 else torch.int64) and t.is_contiguous()
    found = {name: t.tolist() for name, t in got.items()}
    tokens = [b * S + s for b in range(B) for s in range(S) if valid[b, s]]
    pads = [i for i in range(B * S) if i not in tokens]
    assert found["count"] == [len(tokens)]
    where = "cpu" if kernel.name == "reference" else device  # it does not round
    T = B * S if front else rounded(len(tokens), B * S, torch.device(where))
    assert found["index"] == (tokens + pads)[:T] and max(len(tokens), 1) <= T
    assert found["position"] == [i % S for i in found["index"]]
    assert [found["slot"][i] for i in tokens] == list(range(len(tokens)))
    assert all(0 <= found["slot"][i] < len(found["index"]) for i in pads)
    lengths = valid.sum(1).tolist()
    assert found["cu_seqlens"] == [sum(lengths[:b]) for b in range(B + 1)]
    assert len(found["tiles"]) == B * S // TILE + B
    longest_first = sorted(range(B), key=lambda b: -lengths[b])
    used = [[b, first] for b in longest_first for first in range(0, lengths[b], TILE)]
    assert found["tiles"] == used + [[-1, -1]] * (len(found["tiles"]) - len(used))


@kernels(token_index)
@pytest.mark.parametrize("front", [False, True])
def test_masks_of_any_size_and_stride_give_what_the_reference_gives(
    op: Op, kernel: Kernel, device: str, front: bool, poisoned: None
) -> None:
    for B, S in ((1, 5000), (40, 30), (200, 2), (3, 200), (1000, 16), (133, 100)):
        valid = mask(B, S + 3, 0.5, 0).to(device)[:, 2:-1]
        for got, want in zip(kernel.fn(valid, front), op.reference(valid, front), strict=True):
            assert torch.equal(got[: len(want)], want)


def test_there_are_few_sizes_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    for positions in (1, 63, 64, 1000, 8192, 100_000):
        sizes = {n: rounded(n, positions, cuda) for n in range(0, positions + 1, 7)}
        assert len(set(sizes.values())) <= SIZES + 1
        assert all(max(n, 1) <= T <= positions for n, T in sizes.items())


def test_rows_can_be_exact_on_a_gpu_too(device: str) -> None:
    valid = mask(7, 100, 0.3, 0).to(device)
    with exact_rows():
        assert len(token_index(valid)[0]) == int(valid.sum())
    assert rounded(5, 640, torch.device("cuda")) == 64


@given(valid=masks, front=st.booleans())
def test_what_is_packed_comes_back(valid: Tensor, front: bool, device: str) -> None:
    x = torch.randn(*valid.shape, 3, device=device)
    index, slot, *_ = token_index(valid.to(device), front)
    back = x.flatten(0, 1)[index][slot].view_as(x)
    assert torch.equal(back[valid.to(device)], x[valid.to(device)])


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_opcheck_of_masks(share: float, front: bool, device: str) -> None:
    torch.library.opcheck(token_index.target, (mask(3, 70, share, 0).to(device), front))


@pytest.mark.parametrize("front", [False, True])
def test_one_graph_takes_every_number_of_tokens(front: bool, device: str) -> None:
    """Also none, and sizes that were not traced."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def packed(x: Tensor, valid: Tensor) -> Tensor:
        index, slot, *_ = token_index(valid, front)
        return x.flatten(0, 1)[index].cos()[slot].view_as(x)

    for B, S, share in ((3, 70, 0.6), (4, 50, 0.1), (2, 30, 1.0), (5, 20, 0.0)):
        x, valid = torch.randn(B, S, 8, device=device), mask(B, S, share, 0).to(device)
        torch.testing.assert_close(packed(x, valid)[valid], x.cos()[valid])
    assert len(graphs) == 1


@pytest.mark.cuda
def test_tokens_in_front_need_no_synchronization() -> None:
    valid = mask(7, 200, 0.6, 0).cuda()
    want = token_index(valid, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = token_index(valid, True)
    valid.copy_(mask(7, 200, 0.3, 1))
    graph.replay()
    for g, w in zip(got, token_index(valid, True), strict=True):
        assert torch.equal(g, w)
    assert not torch.equal(got[-1], want[-1])
