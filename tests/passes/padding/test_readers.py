"""What reads hidden states behind the layers, and between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import (
    WIDTH,
    Encoder,
    S,
    batch,
    close,
    is_removed,
    keeps,
    notes,
    removed,
    removes,
    same_tokens,
)

Reader = Callable[[Tensor, Tensor], Tensor]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    m = mask[..., None].to(x.dtype)
    return (x * m).sum(1) / m.sum(1).clamp(min=1e-9)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask[..., None] == 0, -1e9).amax(1)


def last_token(x: Tensor, mask: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0]), mask.sum(1) - 1]


def normalized_mean(x: Tensor, mask: Tensor) -> Tensor:
    return F.normalize(masked_mean(x, mask), dim=-1)


def weighted_mean(x: Tensor, mask: Tensor) -> Tensor:
    weights = (mask * torch.arange(1, x.shape[1] + 1)).to(x.dtype)[..., None]
    return (x * weights).sum(1) / weights.sum(1)


def by_matmul(x: Tensor, mask: Tensor) -> Tensor:
    return (mask[:, None].to(x.dtype) @ x)[:, 0]


def attention_pooling(x: Tensor, mask: Tensor) -> Tensor:
    scores = x.mean(-1).masked_fill(mask == 0, -torch.inf)
    return (scores.softmax(-1)[..., None] * x).sum(1)


@pytest.mark.parametrize(
    "pool",
    [
        masked_mean,
        masked_max,
        last_token,
        normalized_mean,
        weighted_mean,
        by_matmul,
        attention_pooling,
        lambda x, mask: x[:, 0],
        lambda x, mask: x[:, 0] + masked_mean(x, mask),
        lambda x, mask: torch.cat((masked_mean(x, mask), masked_max(x, mask)), -1),
    ],
)
def test_pooling(pool: Reader) -> None:
    removes(Encoder(pool=pool), *batch())


@pytest.mark.parametrize("pool", [masked_mean, masked_max])
def test_pooling_of_other_padding(pool: Reader) -> None:
    removes(Encoder(pool=pool), *batch(left=True))
    removes(Encoder(pool=pool), *batch(holes=True))


def test_position_0_of_sentences_padded_on_the_left_is_zero_and_noted() -> None:
    model = Encoder(pool=lambda x, mask: x[:, 0])
    ids, mask = batch(left=True)
    run, reports = removed(model, ids, mask)
    assert is_removed(reports)
    assert any("position 0" in n for n in notes(reports, "position"))
    with torch.inference_mode():
        ours = run(ids, mask)
        theirs = model(ids, mask)
    assert close(ours[:1], theirs[:1]) and not ours[1:].any()


@pytest.mark.parametrize(
    "pool",
    [
        lambda x, mask: x[:, -1],
        lambda x, mask: x.mean(1),
        lambda x, mask: x.amax(1),
        lambda x, mask: x[:, 1],
        lambda x, mask: F.pad(x, (0, 0, 0, 1))[:, 1:] + x.mean(1, keepdim=True),
        lambda x, mask: (x - x.mean((0, 1))) * mask[..., None],
        lambda x, mask: masked_mean(x / x.abs().max(), mask),
        lambda x, mask: masked_mean(x.cumsum(1).flip(1), mask),
        lambda x, mask: (x * mask[..., None]).sum(1) / x.sum(1),
    ],
)
def test_what_reads_padding_keeps_it(pool: Reader) -> None:
    keeps(Encoder(pool=pool), *batch(), why="padding")


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("sentences", [2, 8])
def test_a_sentence_that_reads_by_the_mask_of_another(first: int, sentences: int) -> None:
    i, j = first % sentences, (first + 1) % sentences

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        order = list(range(sentences))
        order[i] = j
        return masked_mean(x, mask[order])

    ids, mask = batch()
    repeated = [n % len(ids) for n in range(sentences)]
    keeps(Encoder(pool=pool), ids[repeated], mask[repeated], why="padding")


def test_a_write_in_place_that_reads_padding() -> None:
    """Only the memory that it writes is read."""

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        found = torch.zeros(len(x), WIDTH)
        found.as_strided((len(x), WIDTH), (WIDTH, 1)).copy_(x.mean(1))
        return found

    keeps(Encoder(pool=pool), *batch(), why="in place")


@pytest.mark.parametrize(
    "between",
    [
        lambda x, mask: x - x.mean(1, keepdim=True),
        lambda x, mask: x.roll(1, 1),
        lambda x, mask: x - x.mean(0, keepdim=True),
        lambda x, mask: x / x.std(),
        lambda x, mask: x * x.mean(1, keepdim=True).sigmoid(),
        lambda x, mask: F.conv1d(x.mT, torch.full((WIDTH, 1, 3), 0.3), groups=WIDTH, padding=1).mT,
        lambda x, mask: x + x.flip(1),
        lambda x, mask: x + x[:, -1:],
    ],
)
def test_what_reads_padding_between_layers_keeps_it(between: Reader) -> None:
    keeps(Encoder(between=between), *batch(), why="padding")


def masked_conv(x: Tensor, mask: Tensor) -> Tensor:
    x = x * mask[..., None]
    return F.conv1d(x.mT, torch.full((WIDTH, 1, 3), 0.3), groups=WIDTH, padding=1).mT


@pytest.mark.parametrize(
    "between",
    [
        masked_conv,
        lambda x, mask: x * masked_mean(x, mask).sigmoid()[:, None],
        lambda x, mask: x + x[:, :1],
        lambda x, mask: x * mask[..., None],
        lambda x, mask: x.masked_fill(mask[..., None] == 0, 0.0),
        lambda x, mask: x + torch.arange(S)[:, None],
        lambda x, mask: torch.where(mask[..., None].bool(), x, 3.0),
        lambda x, mask: x.mT.contiguous().mT * 2,
        lambda x, mask: F.normalize(x, dim=-1),
        lambda x, mask: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
        lambda x, mask: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x, mask: F.glu(torch.cat((x, x), -1)),
        lambda x, mask: x.view(-1, WIDTH).clone().view_as(x),
    ],
)
def test_what_computes_tokens_or_masked_values_between_layers(between: Reader) -> None:
    model = Encoder(between=between)
    for kind in ({}, {"holes": True}):
        ids, mask = batch(**kind)  # type: ignore[arg-type]
        run, reports = removed(model, ids, mask)
        assert is_removed(reports), notes(reports)
        if not any("position 0" in n for r in reports for n in r.notes):
            same_tokens(run, model, ids, mask)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x, mask: x.transpose(0, 1).reshape(-1, WIDTH),
        lambda x, mask: x.transpose(0, 1).flatten(0, 1)[:: x.shape[0]],
        lambda x, mask: x.transpose(0, 1).contiguous(),
        lambda x, mask: x.flatten(0, 1),
        lambda x, mask: x.mT.flatten(1),
    ],
)
def test_other_orders_of_tokens(pool: Reader) -> None:
    """Sentences inside of positions: their rows are not in the order of packed ones."""
    ids, mask = batch()
    run, _ = removed(Encoder(pool=pool), ids, mask)
    zeros = Encoder(pool=lambda x, mask: pool(torch.where(mask[..., None].bool(), x, 0.0), mask))
    with torch.inference_mode():
        ours, *either = (f(ids, mask) for f in (run, zeros, Encoder(pool=pool)))
    assert any(close(ours, one) for one in either)  # removed, or kept


def test_rows_in_another_order_between_layers() -> None:
    def between(x: Tensor, mask: Tensor) -> Tensor:
        rows = F.gelu(x.transpose(0, 1).reshape(-1, WIDTH) * 2)
        return rows.view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1) + x

    model = Encoder(between=between)
    ids, mask = batch()
    run, reports = removed(model, ids, mask)
    assert is_removed(reports), notes(reports)
    same_tokens(run, model, ids, mask)


def test_batch_norm_in_eval_mode() -> None:
    norm = nn.BatchNorm1d(WIDTH).eval()
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model = Encoder(between=lambda x, mask: norm(x.mT).mT)
    ids, mask = batch()
    run, reports = removed(model, ids, mask)
    assert is_removed(reports)
    same_tokens(run, model, ids, mask)


def test_heads() -> None:
    """Token classification, question answering, language modeling, pooled classification."""
    tokens, span, words = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 50)
    pooler, classes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
    ids, mask = batch()
    valid = mask.bool()
    for head in (tokens, words, lambda x: torch.stack(span(x).unbind(-1), -1)):
        model = Encoder(pool=lambda x, mask, head=head: head(x))
        run, reports = removed(model, ids, mask)
        assert is_removed(reports)
        with torch.inference_mode():
            assert close(run(ids, mask)[valid], model(ids, mask)[valid])
    removes(Encoder(pool=lambda x, mask: classes(pooler(x[:, 0]).tanh())), ids, mask)
    removes(Encoder(pool=lambda x, mask: classes(masked_mean(x, mask))), ids, mask)


def test_several_results() -> None:
    model = Encoder(pool=lambda x, mask: (x, masked_mean(x, mask), x[:, 0].tanh(), mask.sum()))
    ids, mask = batch()
    run, reports = removed(model, ids, mask)
    assert is_removed(reports)
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    assert close(ours[0][mask.bool()], theirs[0][mask.bool()])
    assert all(close(a.float(), b.float()) for a, b in zip(ours[1:], theirs[1:], strict=True))
