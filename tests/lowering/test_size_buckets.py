"""Dynamic sizes are padded up to a few, so that few CUDA graphs are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphquant.lowering import size_buckets
from graphquant.lowering.size_buckets import bucket
from graphquant.report import Report
from tests.passes.padding import encoders
from tests.passes.padding.encoders import Encoder, S, batch, notes, removed
from tests.passes.padding.test_readers import masked_mean

SIZES = [(3, 20), (5, 31), (3, 33), (7, 32), (2, 40), (6, 45)]  # of batches

KINDS: list[dict[str, bool]] = [{}, {"left": True}, {"holes": True}]


def first_token(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0]


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(encoders, "device", device)
    monkeypatch.setattr(size_buckets, "DEVICES", ("cpu", "cuda"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The sizes of token ids that compiled graphs were run with."""
    found: set[tuple[int, ...]] = set()
    around = size_buckets.SizeBuckets.around

    def spied(self: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            found.add(next(tuple(args[i].shape) for i in self.inputs))
            return run(*args)

        return around(self, spy)

    monkeypatch.setattr(size_buckets.SizeBuckets, "around", spied)
    return found


def sized(rows: int, size: int, **kind: bool) -> tuple[Tensor, Tensor]:
    return batch([1 + (i * 7 + rows) % size for i in range(rows)], size, **kind)


def compiled(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[Report]]:
    how = {"dynamic": True, "mode": "reduce-overhead", **options}
    return removed(model, *sized(4, S), **how)


def same(run: Callable[..., Any], model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Asserts that results are the model's where there are tokens, and as large."""
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    assert ours.shape == theirs.shape
    if ours.dim() == 3:  # of tokens
        assert ours.stride() == theirs.stride()
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@given(n=st.integers(1, 10**6))
def test_buckets(n: int) -> None:
    assert n <= bucket(n) < 1.5 * n + 1 and bucket(bucket(n)) == bucket(n)
    assert bucket(n) & (bucket(n) - 1) == 0 or bucket(n) % 3 == 0


def test_the_first_buckets() -> None:
    found = sorted({bucket(n) for n in range(1, 70)})
    assert found == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]


@pytest.mark.parametrize("pool", [lambda x, mask: x, masked_mean, first_token])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_results_are_the_models(inner: str, pool: Any, seen: set[tuple[int, ...]]) -> None:
    model = Encoder(pool=pool)
    run, reports = compiled(model, inner=inner)
    for rows, size in SIZES:
        for kind in KINDS[:1] if pool is first_token else KINDS:
            same(run, model, *sized(rows, size, **kind))
    assert len(reports) == 1
    compared = {(4, S), (5, 31)}  # as they are: the first padded length, and the first padded batch
    assert seen - compared == {(4, 16), (3, 24), (6, 32), (3, 48), (8, 32), (2, 48), (6, 48)}


def test_a_batch_that_grows_alone(seen: set[tuple[int, ...]]) -> None:
    """Dynamo gives a symbol to the size that changes, and keeps the other one as it is."""
    model = Encoder()
    run, reports = removed(model, *sized(4, S), mode="reduce-overhead")
    for rows in (5, 7, 9, 11, 13):
        same(run, model, *sized(rows, S))
    assert len(reports) == 2
    assert seen == {(5, S), (6, S), (8, S), (12, S), (16, S)}


def test_ids_that_say_what_is_padding(seen: set[tuple[int, ...]]) -> None:
    """Padded with the number that the model compares with, not with zeros."""

    class FromIds(Encoder):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids, ids.ne(1))

    model = FromIds()

    def given(rows: int, size: int) -> Tensor:
        ids, mask = sized(rows, size)
        return torch.where(mask.bool(), 2 + ids % 40, 1)

    run, reports = removed(model, given(4, S), dynamic=True, mode="reduce-overhead")
    for size in SIZES:
        ids = given(*size)
        with torch.inference_mode():
            ours, theirs = run(ids), model(ids)
        torch.testing.assert_close(ours[ids != 1], theirs[ids != 1], rtol=1e-4, atol=2e-5)
    assert (3, 24) in seen and len(reports) == 1


def test_a_mask_of_what_is_padding_is_padded_with_ones(seen: set[tuple[int, ...]]) -> None:
    model = Encoder(see=lambda m: ~m[:, None, None].bool())
    ids, mask = sized(4, S)
    run, _ = removed(model, ids, 1 - mask, dynamic=True, mode="reduce-overhead")
    for size in SIZES:
        ids, mask = sized(*size)
        with torch.inference_mode():
            ours, theirs = run(ids, 1 - mask), model(ids, 1 - mask)
        valid = mask.bool()
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)
    assert (3, 24) in seen


@pytest.mark.parametrize(
    "pool",
    [
        lambda x, mask: (lambda y: y - y.mean(0))(masked_mean(x, mask)),  # over sentences
        lambda x, mask: (x * mask[:, :, None]).sum(1) / x.shape[1],
        lambda x, mask: masked_mean(x, mask) * x.shape[0],
    ],
)
def test_results_that_depend_on_sizes(
    pool: Any, seen: set[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    model = Encoder(pool=pool)
    run, _ = compiled(model)
    for size in SIZES:
        same(run, model, *sized(*size))
    later = set(SIZES[3:])  # a length may be padded until a batch size is, which shows it
    assert later <= seen and seen.isdisjoint({(8, 32), (2, 48), (6, 48)})
    (warning,) = (r for r in caplog.records if "not padded to buckets" in r.message)
    assert warning.levelname == "WARNING"


def test_similarities_of_all_sentences_have_both_dims_cut() -> None:
    def similarities(x: Tensor, mask: Tensor) -> Tensor:
        y = masked_mean(x, mask)
        return y @ y.T

    model = Encoder(pool=similarities)
    run, _ = compiled(model)
    for size in SIZES:
        same(run, model, *sized(*size))


def test_guards_of_the_graph_hold_for_padded_sizes(seen: set[tuple[int, ...]]) -> None:
    """There are 64 positions, and 96 is the bucket of 65; a batch of pairs has no odd bucket."""

    def pairs(x: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(x, mask).unflatten(0, (-1, 2))

    model = Encoder(pool=pairs)
    run, reports = compiled(model)
    for rows, size in ((6, 50), (10, 64), (4, 63)):
        ids, mask = sized(rows, size)
        with torch.inference_mode():
            torch.testing.assert_close(run(ids, mask), model(ids, mask), rtol=1e-4, atol=2e-5)
    assert all(rows % 2 == 0 and size <= 64 for rows, size in seen)
    assert notes(reports, "a CUDA graph is recorded for every batch size and length: ")


def test_options(seen: set[tuple[int, ...]]) -> None:
    """Only with CUDA graphs, where nothing is known of the number of tokens, and if asked to."""
    for options in ({"mode": None}, {"size_buckets": False}, {"padding": "keep"}):
        run, _ = compiled(Encoder(), **options)
        run(*sized(3, 20))
    assert not seen


def test_on_a_cpu_nothing_is_padded(
    monkeypatch: pytest.MonkeyPatch, seen: set[tuple[int, ...]], device: str
) -> None:
    monkeypatch.setattr(size_buckets, "DEVICES", ("cuda",))
    run, _ = compiled(Encoder())
    run(*sized(3, 20))
    assert bool(seen) == (device == "cuda")


@pytest.mark.cuda
def test_few_graphs_are_recorded() -> None:
    """Of 40 different sizes."""
    from torch._inductor.cudagraph_trees import get_manager

    model = Encoder(pool=masked_mean)
    run, _ = compiled(model, inner="inductor", quantize=True)
    for rows in (9, 10, 11, 12, 13):
        for size in range(33, 41):
            ids, mask = sized(rows, size)
            with torch.inference_mode():
                ours, theirs = run(ids, mask).clone(), model(ids, mask)
            assert (ours - theirs).norm() < 0.03 * theirs.norm()
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    recorded = sum(len(nodes) for nodes in manager.roots.values())
    assert 1 <= recorded <= 4
