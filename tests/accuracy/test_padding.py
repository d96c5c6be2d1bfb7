"""Padding: rows that a mask leaves out change no number of compare, calibrate and fit_budget."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from transformers import BatchEncoding, BertConfig, BertModel

import graphquant
from graphquant import AccuracyReport, Calibration, OptionError
from graphquant.calibration import Record
from graphquant.ir.tokens import Mask, Masks, TokenRows
from tests.small import Mlp, Model, seeded

pytestmark = pytest.mark.usefixtures("seeded_dynamo")

LENGTHS = (5, 9, 12, 3)
B, S, D = len(LENGTHS), max(LENGTHS), 64


def bert(seed: int = 0) -> BertModel:
    config = BertConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    model: BertModel = seeded(lambda: BertModel(config, add_pooling_layer=False), seed).eval()
    return model


@pytest.fixture(scope="module")
def model() -> BertModel:
    return bert()


def padding_mask(left: bool = False) -> Tensor:
    """[B, S] int64, 1 for the tokens of sentences of LENGTHS."""
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    return mask.flip(1) if left else mask


class Sentences:
    """The same random sentences twice: `padded` with huge values, and each in a batch of its own.

    They are embeddings, since an id cannot be huge; positions are those of the padded batch.
    """

    def __init__(self, left: bool = False) -> None:
        self.mask = padding_mask(left)
        x, positions = torch.randn(B, S, D), torch.arange(S).expand(B, S)
        self.x = torch.where(self.mask[..., None] == 1, x, 1e4 * x)
        self.padded = {
            "inputs_embeds": self.x,
            "attention_mask": self.mask,
            "position_ids": positions,
        }
        self.alone = [
            {"inputs_embeds": x[i][None, keep], "position_ids": positions[i][None, keep]}
            for i, keep in enumerate(self.mask == 1)
        ]


def same(got: AccuracyReport, want: AccuracyReport) -> None:
    """Equal but for how float32 sums of another length are rounded, which may turn an int8 step."""
    assert [s.name for s in got.sites] == [s.name for s in want.sites]
    for mine, other in zip(got.sites, want.sites, strict=True):
        for a, b in ((mine.local, other.local), (mine.accumulated, other.accumulated)):
            assert a.signal == pytest.approx(b.signal, rel=1e-5)
            assert a.noise == pytest.approx(b.noise, rel=5e-3)
    assert [o.name for o in got.outputs] == [o.name for o in want.outputs]
    for o, p in zip(got.outputs, want.outputs, strict=True):
        assert o.cosines.rows == p.cosines.rows
        assert o.cosines.mean == pytest.approx(p.cosines.mean, abs=1e-6)
        assert o.cosines.worst == pytest.approx(p.cosines.worst, abs=1e-6)
        assert o.error.signal == pytest.approx(p.error.signal, rel=1e-5)
        assert o.error.noise == pytest.approx(p.error.noise, rel=5e-3)


def same_statistics(got: Calibration, want: Calibration) -> None:
    assert got.sites == want.sites and got.groups == want.groups
    for path in want.sites:
        a, b = got.record(path), want.record(path)
        assert a is not None and b is not None and a.rows == b.rows
        torch.testing.assert_close(a.low, b.low, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.high, b.high, rtol=1e-5, atol=1e-5)
        assert a.histogram.exponent == b.histogram.exponent
        moved = (a.histogram.counts - b.histogram.counts).abs().sum()  # across an edge of a bin
        assert moved <= a.histogram.counts.sum() / 100
        for method in ("absmax", "percentile", "mse"):
            ranges = [c.using(method).range(path) for c in (got, want)]
            assert ranges[0] == pytest.approx(ranges[1], rel=2e-2 if method == "mse" else 1e-4)


# Found by its name ------------------------------------------------------------------------------


SIDES = [
    pytest.param(False, id="right"),
    pytest.param(True, id="left", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("left", SIDES)
def test_padding_changes_no_number_of_compare(model: BertModel, left: bool) -> None:
    sentences = Sentences(left)
    want = graphquant.compare(model, sentences.alone)
    got = graphquant.compare(model, [sentences.padded])
    assert len(want.sites) == 12 and want.outputs[0].cosines.rows == sum(LENGTHS)
    same(got, want)
    every = graphquant.compare(model, [sentences.padded], mask=False)
    assert every.outputs[0].cosines.rows == B * S
    assert every.sites[0].local.signal > 1.2 * got.sites[0].local.signal


@pytest.mark.parametrize("left", SIDES)
def test_padding_changes_no_range_of_a_calibration(model: BertModel, left: bool) -> None:
    sentences = Sentences(left)
    want = graphquant.calibrate(model, sentences.alone, progress=False)
    same_statistics(graphquant.calibrate(model, [sentences.padded], progress=False), want)


def test_the_report_says_what_does_not_count(
    model: BertModel, caplog: pytest.LogCaptureFixture
) -> None:
    sentences, said = Sentences(), "38 of 96 rows are padding by attention_mask and do not count"
    report = graphquant.compare(model, [sentences.padded] * 2)
    (padding,) = report.padding
    assert (padding.mask, padding.ignored, padding.rows) == ("attention_mask", 38, 96)
    assert said in str(report).splitlines()
    (written,) = json.loads(report.to_json())["padding"]
    assert written == {"mask": "attention_mask", "ignored": 38, "rows": 96}
    with caplog.at_level(logging.INFO, "graphquant"):
        graphquant.calibrate(model, [sentences.padded] * 2, progress=False)
    assert said in caplog.messages
    for batches in (sentences.alone, [{**sentences.padded, "attention_mask": None}]):
        report = graphquant.compare(model, batches)
        assert report.padding == () and "padding" not in str(report)
    assert report.outputs[0].cosines.rows == B * S


class Scored(nn.Module):
    """A model of features and a mask, by any of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = seeded(Mlp)
        self.eval()


class ByPosition(Scored):
    def forward(self, x: Tensor, attention_mask: Any = None, padding_mask: Any = None) -> Tensor:
        return self.mlp(x)


class ByKey(Scored):
    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "token_embeddings": self.mlp(features["x"])}


class Keys(Scored):
    def forward(self, x: Tensor, src_key_padding_mask: Any = None) -> Tensor:
        return self.mlp(x)


tokens = padding_mask().bool()
x = torch.where(tokens[..., None], 1.0, 1e3) * torch.randn(
    B, S, D, generator=torch.Generator().manual_seed(0)
)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (ByPosition(), (x, tokens)),
        (ByPosition(), ((x, tokens.int()), {})),
        (ByPosition(), {"x": x, "attention_mask": tokens.float()}),
        (ByPosition(), (x, None, tokens)),
        (ByKey(), {"x": x, "attention_mask": tokens.long()}),
        (ByKey(), ({"x": x, "padding_mask": tokens},)),
        (ByKey(), BatchEncoding({"x": x, "attention_mask": tokens.long()})),
        (Keys(), (x, ~tokens)),
        (Keys(), {"x": x, "src_key_padding_mask": (~tokens).long()}),
        (Keys(), (x, torch.zeros(B, S).masked_fill(~tokens, -torch.inf))),
        (torch.compile(ByPosition(), backend="eager"), (x, tokens)),
        (ByPosition().forward, (x, tokens)),
        (Model(lambda m, x, **more: m.fc(x), fc=Mlp()), ((x,), {"attention_mask": tokens})),
    ],
)
def test_a_mask_is_found_by_its_name_wherever_it_is(model: Any, batch: Any) -> None:
    report = graphquant.compare(model, [batch])
    assert [(p.ignored, p.rows) for p in report.padding] == [(B * S - sum(LENGTHS), B * S)]
    assert report.outputs[-1].cosines.rows == sum(LENGTHS)
    calibration = graphquant.calibrate(model, [batch], progress=False)
    record = calibration.record(calibration.sites[0])
    assert record is not None and record.rows == sum(LENGTHS)
    # what a norm makes of rows is not huge, but their sum is that of the rows alone
    if isinstance(model, Scored):
        want = Record.of(model.mlp.norm(x[tokens]))
        torch.testing.assert_close((record.low, record.high), (want.low, want.high))


def test_what_is_named_as_a_mask_and_is_none_counts_every_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for mask, why in (
        (torch.ones(B, 1, 1, S), "is [4, 1, 1, 12], a padding mask is [B, S]"),
        (tokens * 2, "has values other than 0 and 1"),
        (torch.zeros(B, S), "says that every row is padding"),
    ):
        report = graphquant.compare(ByPosition(), [(x, mask)])
        said = f"no row is taken for padding: attention_mask {why}"
        assert said in report.report.notes and report.padding == ()
        assert report.outputs[0].cosines.rows == B * S
        graphquant.calibrate(ByPosition(), [(x, mask)], progress=False)
        assert said in caplog.messages


# The argument mask ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [tokens, tokens.long(), "valid", lambda x, valid: valid, lambda x, valid: tokens.float()],
)
def test_a_mask_is_a_tensor_a_name_or_a_function(mask: Any) -> None:
    model = Model(lambda m, x, valid: m.fc(x), fc=Mlp())
    batches = [{"x": x, "valid": tokens.int()}]
    report = graphquant.compare(model, batches, mask=mask)
    (padding,) = report.padding
    assert padding.ignored == B * S - sum(LENGTHS)
    assert padding.mask == (mask if isinstance(mask, str) else "mask")
    assert report.outputs[0].cosines.rows == sum(LENGTHS)
    record = graphquant.calibrate(model, batches, progress=False, mask=mask).record("fc.fc1")
    assert record is not None and record.rows == sum(LENGTHS)
    assert graphquant.compare(model, batches).padding == ()  # not by any name


def test_false_counts_every_row() -> None:
    report = graphquant.compare(ByPosition(), [(x, tokens)], mask=False)
    assert report.padding == () and report.outputs[0].cosines.rows == B * S
    calibration = graphquant.calibrate(ByPosition(), [(x, tokens)], progress=False, mask=False)
    record = calibration.record("mlp.fc1")
    assert record is not None and record.rows == B * S


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (True, "mask is a bool, needs a padding mask"),
        (3, "mask is a int, needs a padding mask"),
        ([[1, 0]], "mask is a list, needs a padding mask"),
        (torch.ones(B, S, D), r"mask is \[4, 12, 64\], a padding mask is \[B, S\]"),
        (x[..., 0], "mask has values other than 0 and 1"),
        (torch.zeros(B, S), "mask says that every row is padding"),
        (torch.ones(B, S - 1), r"mask \[4, 11\] describes nothing"),
        (torch.ones(S, B - 1), r"mask \[12, 3\] describes nothing"),
        ("valid", "mask='valid' is no input of the model: there are x, attention_mask"),
        ("x", r"x is \[4, 12, 64\], a padding mask is"),
        (lambda x, mask: None, "mask is a NoneType, a padding mask is"),
    ],
)
def test_a_wrong_mask_is_refused(mask: Any, said: str) -> None:
    model, batches = ByPosition(), [(x, tokens)]
    for entry in (
        lambda: graphquant.compare(model, batches, mask=mask),
        lambda: graphquant.calibrate(model, batches, progress=False, mask=mask),
        lambda: graphquant.fit_budget(model, batches, cosine=0.9, progress=False, mask=mask),
    ):
        with pytest.raises(OptionError, match=said):
            entry()


# What counts of the outputs ---------------------------------------------------------------------


def mean(result: Any, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    pooled: Tensor = (result.last_hidden_state * weights).sum(1) / weights.sum(1)
    return pooled


def test_of_says_what_counts(model: BertModel) -> None:
    sentences = Sentences()
    report = graphquant.compare(model, [sentences.padded], of=mean)
    assert [o.name for o in report.outputs] == ["output"]
    assert report.outputs[0].cosines.rows == B
    want = graphquant.compare(
        model, sentences.alone, of=lambda result: result.last_hidden_state.mean(1)
    )
    same(report, want)
    tokens = graphquant.compare(model, [sentences.padded], of=lambda r: {"y": r[0]})
    assert [o.name for o in tokens.outputs] == ["y"]
    assert tokens.outputs[0].cosines.rows == sum(LENGTHS)  # rows of tokens, as in any result
    with pytest.raises(OptionError, match="of takes a mask, but a call has none"):
        graphquant.compare(model, sentences.alone, of=mean)
    with pytest.raises(OptionError, match="of is a str, needs a function"):
        graphquant.compare(model, [sentences.padded], of="last_hidden_state")  # type: ignore[arg-type]


# Budgets ----------------------------------------------------------------------------------------


def test_a_budget_of_a_ragged_batch_is_that_of_its_sentences() -> None:
    """Padding that int8 computes badly makes no linear float."""
    model, sentences = ByPosition(), Sentences()
    model.mlp.norm = nn.Identity().eval()
    outlier = torch.zeros(D)
    outlier[3] = 1e6  # hides all other channels of its row
    x = sentences.x.where(sentences.mask[..., None] == 1, torch.randn(D) + outlier)
    with torch.no_grad():
        model.mlp.fc1.weight[:, 3] = 0
    ragged = [(x, sentences.mask)]
    alone = [(x[i][None, keep],) for i, keep in enumerate(sentences.mask == 1)]
    want = graphquant.fit_budget(model, alone, cosine=0.999, progress=False)
    assert want.left == () and want.before > 0.999
    got = graphquant.fit_budget(model, ragged, cosine=0.999, progress=False)
    assert got.left == () and got.before == pytest.approx(want.before, abs=1e-6)
    every = graphquant.fit_budget(model, ragged, cosine=0.999, progress=False, mask=False)
    assert every.before < 0.9 and every.left


@pytest.mark.slow
def test_the_search_of_a_budget_ignores_padding_too(model: BertModel) -> None:
    sentences = Sentences()
    want = graphquant.fit_budget(model, sentences.alone, sqnr=75.0, progress=False)
    assert want.left
    got = graphquant.fit_budget(model, [sentences.padded], sqnr=75.0, progress=False)
    assert [left.path for left in got.left] == [left.path for left in want.left]
    for mine, other in zip(got.left, want.left, strict=True):
        assert mine.alone == pytest.approx(other.alone, abs=0.02)
    pooled = graphquant.fit_budget(
        model, [sentences.padded], cosine=0.99, progress=False, of=mean, mask="attention_mask"
    )
    report = graphquant.compare(model, [sentences.padded], of=mean)
    assert pooled.before == report.outputs[0].cosines.mean


# Rows in other places ---------------------------------------------------------------------------


def rows(mask: Tensor, value: Tensor) -> Tensor | None:
    return Masks([Mask("mask", mask)]).rows(value)


def test_rows_are_told_by_their_sizes() -> None:
    H = 3
    assert torch.equal(rows(tokens, torch.empty(B, S, D)), tokens)
    assert torch.equal(rows(tokens, torch.empty(S, B, D)), tokens.T)
    assert torch.equal(rows(tokens, torch.empty(B * S, D)), tokens.flatten())
    assert torch.equal(rows(tokens, torch.empty(B, S, H, D)), tokens[..., None].expand(B, S, H))
    assert torch.equal(rows(tokens, torch.empty(B, H, S, D)), tokens[:, None].expand(B, H, S))
    assert torch.equal(rows(tokens, torch.empty(B, H, S, S)), tokens[:, None].expand(B, H, S))
    for shape in ((B, D), (B, S), (S, D), (), (B,), (B, S - 1, D), (B, S, S, D), (B * S,)):
        assert rows(tokens, torch.empty(shape)) is None
    assert rows(torch.ones_like(tokens), torch.empty(B, S, D)) is None  # all count
    both = [Mask("a", tokens), Mask("b", tokens.flip(1)), Mask("c", tokens[:, 1:])]
    assert Masks(both).rows(torch.empty(B, S, D)) is None  # which of the two?
    assert torch.equal(Masks(both).rows(torch.empty(B, S - 1, D)), tokens[:, 1:])


@pytest.mark.parametrize("square", [False, True], ids=["", "as many sentences as tokens"])
def test_tokens_are_followed_through_views(square: bool) -> None:
    """[B, S, D] -> [S, B, D], and heads [B, H, S, D] -> [S * B, H * D]."""
    mask = tokens[:, :B] if square else tokens
    n, H = mask.shape[1], 2
    at, seen, graph = torch.ops.aten, {}, Graph()
    inputs = graph.placeholder("x"), graph.placeholder("heads")
    turned = graph.call_function(at.transpose.int, (inputs[0], 1, 0))
    moved = graph.call_function(at.permute.default, (inputs[1], [2, 0, 1, 3]))
    flat = graph.call_function(at.view.default, (moved, [n * B, H * 8]))
    odd = graph.call_function(at.view.default, (moved, [-1, 8 * H * 2]))
    values = {inputs[0]: torch.randn(B, n, D), inputs[1]: torch.randn(B, H, n, 8)}
    rows = TokenRows(Masks([Mask("mask", mask)]))
    for node in graph.nodes:
        if node not in values:
            args = [values.get(a, a) if hasattr(a, "op") else a for a in node.args]
            values[node] = node.target(args[0].contiguous(), *args[1:])
        rows.after(node, values[node], values)
        seen[node] = rows.of(node, values[node])
    assert torch.equal(seen[turned], mask.T)
    assert torch.equal(seen[flat], mask.T.flatten())
    assert seen[odd] is None


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "length", [S, pytest.param(B, id="as many sentences as tokens", marks=pytest.mark.slow)]
)
def test_torchs_own_encoder(batch_first: bool, length: int) -> None:
    """Its attention computes with [S, B, D] and [S * B, D] either way."""
    layer = seeded(lambda: nn.TransformerEncoderLayer(D, 2, 96, batch_first=batch_first))
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    if length == B and not batch_first:
        return  # there nothing tells which dim is which
    mask = tokens[:, :length]
    x = torch.randn(B, length, D)
    given = x.where(mask[..., None], 1e4 * x)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    padded = [((turn(given),), {"src_key_padding_mask": ~mask})]
    alone = [(turn(one[None, keep]),) for one, keep in zip(x, mask, strict=True)]
    same(graphquant.compare(model, padded), graphquant.compare(model, alone))
    same_statistics(
        graphquant.calibrate(model, padded, progress=False),
        graphquant.calibrate(model, alone, progress=False),
    )


def test_graphs_that_break_and_layers_that_share_one(model: BertModel) -> None:
    """Every graph of a call finds the tokens in its own inputs."""

    def forward(m: Any, x: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in m.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x

    model = Model(forward, layers=nn.ModuleList(seeded(Mlp, i) for i in range(3)))
    alone = [(x[i][None, keep], tokens[i][None, keep]) for i, keep in enumerate(tokens)]
    same(
        graphquant.compare(model, [((x,), {"attention_mask": tokens})]),
        graphquant.compare(model, alone),
    )
