"""Both forms of packed tokens, compiled: T rows, or B * S rows with tokens in front."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphquant
from graphquant.ops import token_index, varlen_attention
from graphquant.passes.policy import speed

from . import encoders
from .encoders import LENGTHS, Encoder, S, batch, is_removed, notes, removed, same_tokens
from .test_masks import masked_scores
from .test_readers import masked_mean


@pytest.fixture(autouse=True)
def on_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "device", device)


FORMS = {"T rows": {}, "front": {"mode": "reduce-overhead"}}
BATCHES = [(12, 12, 12, 12), (1, 1, 1, 1), (0, 5, 0, 12), (7, 0, 0, 0), (3, 9, 11, 2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_compilation_serves_all_lengths(form: str, inner: str) -> None:
    model = Encoder()
    run, reports = removed(model, *batch(), inner=inner, **FORMS[form])
    for lengths in BATCHES:
        same_tokens(run, model, *batch(lengths))
    assert len(reports) == 1 and is_removed(reports)


@pytest.mark.parametrize("form", ["T rows", pytest.param("front", marks=pytest.mark.slow)])
def test_dynamic_sizes_are_compiled_once_more(form: str) -> None:
    model = Encoder()
    run, reports = removed(model, *batch(), inner="inductor", **FORMS[form])
    for lengths, size in (((9, 30, 2), 30), ((1, 1, 1, 1, 40), 40), ((17, 3), 17), ((2, 0), 22)):
        same_tokens(run, model, *batch(lengths, size))
    assert len(reports) == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_tokens_is_zero(form: str) -> None:
    run, _ = removed(Encoder(), *batch(), inner="inductor", **FORMS[form])
    ids, mask = batch((0, 0, 0, 0))
    with torch.inference_mode():
        assert not run(ids, mask).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_int8(form: str, inner: str) -> None:
    """As far from float as int8 with padding is."""
    model = Encoder()
    ids, mask = batch()
    run, reports = removed(model, ids, mask, inner=inner, quantize=True, **FORMS[form])
    padded, _ = removed(model, ids, mask, inner=inner, quantize=True, padding="keep")
    assert all(o.int8 for o in reports[0].linears) and reports[0].coverage == 1
    for lengths in (LENGTHS, *BATCHES):
        ids, mask = batch(lengths)
        valid = mask.bool()
        with torch.inference_mode():
            ours, theirs, want = (f(ids, mask)[valid] for f in (run, padded, model))
        assert (ours - want).norm() <= 1.5 * (theirs - want).norm() + 1e-3
    assert not ours.isnan().any()


@pytest.mark.parametrize("form", ["T rows", pytest.param("front", marks=pytest.mark.slow)])
def test_pooled_and_dynamic(form: str) -> None:
    model = Encoder(pool=masked_mean)
    run, reports = removed(model, *batch(), inner="inductor", dynamic=True, **FORMS[form])
    for lengths, size in ((LENGTHS, S), ((9, 30, 2), 30), ((40, 1), 40)):
        ids, mask = batch(lengths, size)
        with torch.inference_mode():
            torch.testing.assert_close(run(ids, mask), model(ids, mask), rtol=1e-4, atol=2e-5)
    assert len(reports) == 1


@pytest.mark.parametrize("form", FORMS)
def test_any_lengths_and_kind_of_padding(form: str) -> None:
    """One graph with dynamic sizes."""
    model = Encoder()
    run, reports = removed(model, *batch(), dynamic=True, **FORMS[form])

    @given(
        lengths=st.lists(st.integers(0, 30), min_size=2, max_size=6),
        room=st.integers(2, 9),
        kind=st.sampled_from([{}, {"left": True}, {"holes": True}]),
    )
    def check(lengths: list[int], room: int, kind: dict[str, bool]) -> None:
        same_tokens(run, model, *batch(lengths, max(lengths) + room, **kind))

    check()
    assert len(reports) == 1


def test_linears_are_int8_by_the_time_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens in front, int8 computes their rows only, and float all rows."""
    monkeypatch.setattr(speed, "times", lambda *_: {"float": 10.0, "int8": 20.0})
    ids, mask = batch((12, 2, 2, 2))
    for options, taken in (({"mode": "reduce-overhead"}, True), ({}, False)):
        _, reports = removed(Encoder(), ids, mask, quantize=True, select="faster", **options)
        assert {o.int8 for o in reports[0].linears} == {taken}


def test_the_report_knows_how_many_tokens_there_are() -> None:
    _, reports = removed(Encoder(), *batch(), quantize=True)
    assert {o.M for o in reports[0].linears} == {sum(LENGTHS)}
    assert any(o.kind == "attention" and o.flops for o in reports[0].products)


def test_what_the_report_says() -> None:
    _, reports = removed(Encoder(), *batch())
    assert notes(reports) == [
        "padding removed by mask: 8 of 8 linears and 2 attentions (2 full) compute tokens only; "
        "results at padding are zero"
    ]


def test_padding_is_kept_by_default() -> None:
    _, reports = removed(Encoder(), *batch(), padding="keep")
    assert not notes(reports)


def test_wrong_option() -> None:
    with pytest.raises(
        graphquant.OptionError, match="padding='drop' is not one of 'keep', 'remove'"
    ):
        graphquant.Config.of({"padding": "drop"})


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("T rows", torch.bfloat16),
        pytest.param("T rows", torch.float32, marks=pytest.mark.slow),
        pytest.param("front", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("front", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_same_sentence_has_the_same_bits(form: str, dtype: torch.dtype) -> None:
    """In any batch, at any place, with any padding."""
    model = Encoder().to(dtype)
    lengths = [12, 3, 7, 1, 9, 12, 5, 2]
    ids, mask = batch(lengths)
    run, reports = removed(model, ids, mask, inner="inductor", quantize=True, **FORMS[form])
    assert reports[0].coverage == 1

    def states(some: list[int], size: int) -> list[Tensor]:
        given = [F.pad(t[some][:, :S], (0, size - S)) for t in (ids, mask)]
        with torch.inference_mode():
            found = run(*given)
        return [h[: lengths[i]].clone() for i, h in zip(some, found, strict=True)]

    cases = [([7, 6, 5, 4, 3, 2, 1, 0], S), ([2, 5, 1], 40), ([4], S), ([0], 33)]
    size = S
    if dtype == torch.float32 and encoders.device == "cuda":
        # Inductor's reductions may differ between compilations: only in the one for any sizes
        states([2, 5, 1], 40)
        size = S + 1
        cases = [([7, 6, 5, 4, 3, 2, 1, 0], 19), ([2, 5, 1], 40), ([4, 0], 33)]
    want = states(list(range(8)), size)
    for some, size in cases:
        for i, got in zip(some, states(some, size), strict=True):
            assert torch.equal(got, want[i]), (some, size)


class FromSizes(Encoder):
    """Causal, by positions that are counted from the size of the token ids."""

    def __init__(self) -> None:
        super().__init__(attend=masked_scores)  # torch pads masks of its own attention on CUDA

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        at = torch.arange(ids.shape[1], device=ids.device)
        self.see = lambda m: m[:, None, None].bool() & (at <= at[:, None])
        return super().forward(ids, mask)


@pytest.mark.parametrize("kind", [Encoder, FromSizes])
def test_export(kind: type[Encoder]) -> None:
    model = kind().eval()
    ids, mask = batch()
    batches = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=4, max=64)
    sizes = {key: dict(enumerate(batches)) for key in ("ids", "mask")}
    program = graphquant.export(model, (ids, mask), dynamic_shapes=sizes, padding="remove")
    targets = [n.target for n in program.graph.nodes]
    assert token_index.target in targets and varlen_attention.target in targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for loaded in (torch.export.load(file), graphquant.standalone(program)):
        run = loaded.module()
        for lengths, size in ((LENGTHS, S), ((0, 9, 3), 9), ((40, 2), 40)):
            given = batch(lengths, size)
            near(run(*given), model(*given), given[1])


def test_compare_explain_and_fit_budget() -> None:
    model = Encoder().eval()
    data = [batch(), batch((5, 9, 12, 2))]
    options = {"padding": "remove"}
    report = graphquant.compare(model, data, options=options)
    assert all(site.accumulated.sqnr > 25 for site in report.sites)
    assert any(n.startswith("padding removed") for n in report.report.notes)
    with torch.inference_mode():
        explained = graphquant.explain(model, *data[0], options=options)
    assert any(n.startswith("padding removed") for n in explained.notes)
    budget = graphquant.fit_budget(model, data, cosine=0.99, options=options, progress=False)
    assert budget.options["padding"] == "remove"


def test_optimize_in_place() -> None:
    model = Encoder().eval()
    ids, mask = batch()
    with torch.inference_mode():
        want = model(ids, mask)
        graphquant.optimize_(model, padding="remove", inner="eager")
        near(model(ids, mask), want, mask)
        assert not model(ids, mask)[~mask.bool()].any()


def near(ours: Tensor, theirs: Tensor, mask: Tensor, most: float = 0.03) -> Any:
    """int8 against float, for tokens; zero at padding."""
    valid = mask.bool()
    assert not ours[~valid].any()
    assert (ours[valid] - theirs[valid]).norm() <= most * theirs[valid].norm()


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (32, 32), (4, 8), (32, 8), (1, 12), (8, 2)])
def test_sizes_that_coincide_with_those_of_the_model(size: tuple[int, int]) -> None:
    """4 heads of 8 channels, 32 in all: which dim is which is not told by its size."""
    n, length = size
    lengths = [1 + (7 * i) % length for i in range(n)]
    for model in (Encoder(), Encoder(between=lambda x, mask: x * mask[..., None])):
        run, reports = removed(model, *batch(lengths, length))
        assert is_removed(reports), notes(reports)
        same_tokens(run, model, *batch(lengths, length))
