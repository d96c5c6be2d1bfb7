"""Which masks are understood, and which keep the padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from graphquant.ir.evaluate import evaluate
from graphquant.passes.padding import evaluation

from .encoders import (
    HEADS,
    B,
    Encoder,
    S,
    batch,
    is_removed,
    keeps,
    notes,
    padding_mask,
    removed,
    same_tokens,
)

NEAREST = torch.finfo(torch.float32).min
EIGHT = (12, 3, 7, 1, 5, 12, 9, 4)  # lengths of more sentences than have a padding of their own
FUSED = F.scaled_dot_product_attention


def at(m: Tensor) -> Tensor:
    return torch.arange(m.shape[1])


def sentence(m: Tensor) -> Tensor:
    return torch.arange(len(m))[:, None, None, None]


def distance(m: Tensor) -> Tensor:
    return (at(m)[:, None] - at(m)).abs()


def causal(m: Tensor) -> Tensor:
    return at(m) <= at(m)[:, None]


def alibi(m: Tensor) -> Tensor:
    return -distance(m) * (2.0 ** -torch.arange(1, 1 + HEADS))[:, None, None]


def additive(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None].float()) * NEAREST


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores + mask).softmax(-1) @ v


def masked_scores(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = (q * 0.3) @ k.mT
    return scores.masked_fill(~mask, -1e9).float().softmax(-1).to(v.dtype) @ v


def masked_or_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (masked_scores if mask.dtype == torch.bool else written_out)(q, k, v, mask)


def check(model: nn.Module, *, inverted: bool = False, form: str = "", **options: Any) -> None:
    """Asserts that padding is removed, of each kind, and the results of tokens are the model's."""
    for kind in ({}, {"left": True}, {"holes": True}):
        ids, mask = batch(**kind)  # type: ignore[arg-type]
        given = 1 - mask if inverted else mask
        run, reports = removed(model, ids, given, **options)
        assert is_removed(reports), notes(reports)
        assert form in notes(reports)[0]
        with torch.inference_mode():
            ours, theirs = run(ids, given), model(ids, given)
        assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("see", "attend", "form"),
    [
        (padding_mask, FUSED, "full"),
        (additive, FUSED, "full"),
        (additive, written_out, "full"),
        (padding_mask, masked_scores, "full"),
        (lambda m: (1 - m[:, None, None]) * -10000.0, written_out, "full"),
        (lambda m: m[:, None, None].bool().expand(-1, HEADS, S, -1), FUSED, "full"),
        (lambda m: m[:, None, None].bool() & m[:, None, :, None].bool(), masked_scores, "full"),
        (lambda m: m[:, None, None].bool() & causal(m), FUSED, "causal"),
        (lambda m: m[:, None, None].bool() & (distance(m) <= 2), FUSED, "window 2"),
        (
            lambda m: m[:, None, None].bool() & causal(m) & (distance(m) < 4),
            masked_scores,
            "causal, window 3",
        ),
        (lambda m: additive(m) + alibi(m), FUSED, "bias"),
        (lambda m: additive(m) + alibi(m), written_out, "bias"),
        (
            lambda m: additive(m) + alibi(m)[:1].masked_fill(~causal(m), NEAREST / 2),
            written_out,
            "causal, bias",
        ),
    ],
)
def test_masks(see: Callable[[Tensor], Any], attend: Callable[..., Tensor], form: str) -> None:
    check(Encoder(see=see, attend=attend), form=form)


def test_values_that_no_input_decides_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of [B, H, S, S] takes longer than everything else."""
    computed: Counter[str] = Counter()

    def counted(nodes: Iterable[Node], *rest: Any) -> dict[Node, Any]:
        nodes = list(nodes)
        computed.update(n.name for n in nodes if n.target is torch.ops.aten.abs.default)
        return evaluate(nodes, *rest)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    check(Encoder(see=lambda m: additive(m) + alibi(m), attend=written_out), form="bias")
    assert computed and set(computed.values()) == {3}  # three graphs


def test_a_bias_of_all_sentences_is_computed_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied for each of them, it takes longer than everything else."""
    largest = 0

    def measured(nodes: Iterable[Node], values: dict[Node, Any], *rest: Any) -> dict[Node, Any]:
        nonlocal largest
        nodes = list(nodes)
        evaluate(nodes, values, *rest)
        largest = max([largest, *(values[n].numel() for n in nodes)])
        return values

    def see(m: Tensor) -> Tensor:
        return additive(m) + alibi(m).expand(len(EIGHT), -1, -1, -1).contiguous()

    monkeypatch.setattr(evaluation, "evaluate", measured)
    run, reports = removed(model := Encoder(see=see, attend=written_out), *batch(EIGHT))
    assert is_removed(reports) and "bias" in notes(reports)[0]
    same_tokens(run, model, *batch(EIGHT))
    assert 0 < largest <= HEADS * S * S


@pytest.mark.parametrize(
    "see",
    [
        lambda m: padding_mask(m) & ((sentence(m) != 6) | (at(m) == 0)),
        lambda m: additive(m) + (sentence(m) == 6) * alibi(m),
        lambda m: additive(m) * torch.where(sentence(m) == 6, 0.0, 1.0),
        lambda m: padding_mask(m) & ((sentence(m) != 6) | causal(m)),
    ],
)
@pytest.mark.parametrize("attend", [FUSED, masked_or_added])
def test_a_mask_of_its_own_for_one_of_many_sentences(
    see: Callable[[Tensor], Any], attend: Callable[..., Tensor]
) -> None:
    """It is not one of the first, which have a padding of each kind."""
    model = Encoder(see=see, attend=attend)
    ids, mask = batch(EIGHT)
    run, reports = removed(model, ids, mask)
    assert "no attention" in notes(reports)[0] or notes(reports)[0].startswith("padding kept")
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    valid = mask.bool()
    assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)


def test_a_mask_of_what_is_padding() -> None:
    check(Encoder(see=lambda m: ~m[:, None, None].bool()), inverted=True)


def test_a_mask_from_token_ids() -> None:
    class FromIds(Encoder):
        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return super().forward(ids, ids.ne(self.pad))

    for pad in (0, 1, 49):
        model = FromIds()
        model.pad = pad  # type: ignore[assignment]
        ids, mask = batch()
        ids = torch.where(mask.bool(), 2 + ids % 40, pad)
        run, reports = removed(model, ids, mask)
        assert is_removed(reports), notes(reports)
        same_tokens(run, model, ids, mask)


@pytest.mark.parametrize(
    "see",
    [
        lambda m: m[:, None, None] * m[:, None, :, None] == 1,  # pairs of tokens
        lambda m: (m[:, None, :, None] == m[:, None, None]) & m[:, None, None].bool(),
    ],
)
def test_masks_of_pairs(see: Callable[[Tensor], Any]) -> None:
    check(Encoder(see=see, attend=masked_scores))


def test_a_mask_of_documents_keeps_padding() -> None:
    """Tokens see those with their own number: 2 is not 1."""

    def documents(m: Tensor) -> Tensor:
        return (m[:, None, :, None] == m[:, None, None]) & (m[:, None, None] != 0)

    ids, mask = batch()
    mask = mask * (1 + (torch.arange(S) >= 2).long())
    model = Encoder(see=documents, attend=masked_scores)
    run, _ = removed(model, ids, mask)
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    valid = mask.bool()
    assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "see",
    [
        lambda m: m[:, None, None].bool() & ((distance(m) <= 2) | (at(m) == 0)),  # a global token
        lambda m: m[:, None, None].bool() & (distance(m) % 2 == 0),
        lambda m: m[:, None, None].bool() & (torch.arange(HEADS)[:, None, None] < distance(m) + 1),
        lambda m: m[:, None, None].bool() & m[:1, None, None].bool(),
        lambda m: m[:, None, None].bool() | (m.sum(1) > 5)[:, None, None, None],
        lambda m: m[:, None, None].roll(1, -1).bool() | (at(m) == 0),
        lambda m: m.flip(0)[:, None, None].bool(),
        lambda m: additive(m) - (m.cumsum(1)[:, None, None] * 0.1),
        lambda m: additive(m) + m.sum(1)[:, None, None, None] * distance(m) * 0.01,
    ],
)
def test_other_masks_stay_right(see: Callable[[Tensor], Any]) -> None:
    """They are refused, or attention stays padded."""
    model = Encoder(see=see)
    for kind in ({}, {"holes": True}):
        ids, mask = batch(**kind)  # type: ignore[arg-type]
        run, reports = removed(model, ids, mask)
        assert "full" not in notes(reports)[0]
        with torch.inference_mode():
            ours, theirs = run(ids, mask), model(ids, mask)
        valid = mask.bool()
        assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)


def test_no_mask() -> None:
    keeps(Encoder(see=lambda m: None), *batch(), why="no padding mask")


def test_masks_that_are_not_of_padding() -> None:
    ids, mask = batch()
    square = (mask[:, None, None] & mask[:, None, :, None]).bool()
    keeps(Encoder(see=lambda m: m), ids, square | torch.eye(S).bool(), why="")
    keeps(Encoder(see=lambda m: m[:, None, None]), ids, additive(mask)[:, 0, 0], why="")
    keeps(Encoder(see=padding_mask), ids, mask[:1], why="")


def test_a_random_mask() -> None:
    model = Encoder(see=lambda m: m[:, None, None].bool() & (torch.rand(B, 1, 1, S) > -1))
    keeps(model, *batch(), why="random")


def test_a_mask_that_is_written_in_place() -> None:
    def write(m: Tensor) -> Tensor:
        m[:, 0] = 1
        return padding_mask(m)

    model = Encoder(see=write)
    ids, mask = batch()
    _, reports = removed(model, ids, mask.clone())
    assert notes(reports)[0].startswith("padding kept")
    assert "in place" in notes(reports)[0]


@pytest.mark.parametrize("attend", [FUSED, written_out])
@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.unfold(3, 2, 2).select(3, 1).fill_(-1e9),
        lambda x: x.as_strided((B,), (S,), 2).fill_(-1e9),
        lambda x: torch.view_as_complex(x.unflatten(3, (-1, 2))).mul_(0),
        lambda x: x.movedim(3, 0)[2].copy_(torch.full((B, 1, 1), -1e9)),
        lambda x: torch._foreach_add_([x[..., 2]], -1e9),
    ],
)
def test_an_additive_mask_that_is_written_in_place(
    write: Callable[[Tensor], Any], attend: Callable[..., Tensor]
) -> None:
    """Through views whose writes are not made functional."""

    def see(m: Tensor) -> Tensor:
        x = additive(m)
        write(x)
        return x

    keeps(Encoder(see=see, attend=attend), *batch(), why="in place")


def test_scores_that_are_returned() -> None:
    """They are computed from padded q and k, so that attention stays padded."""

    class Scores(Encoder):
        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            kept: list[Tensor] = []

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
                kept.append(q @ k.transpose(-1, -2) / 3.0 + mask)
                return kept[-1].softmax(-1) @ v

            self.see, self.attend = additive, attend
            return super().forward(ids, mask), kept[0]

    model = Scores()
    ids, mask = batch()
    run, reports = removed(model, ids, mask)
    assert "1 attentions" in notes(reports)[0] or notes(reports)[0].startswith("padding kept")
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    valid = mask.bool()
    assert torch.allclose(ours[0][valid], theirs[0][valid], rtol=1e-4, atol=2e-5)
    seen = (valid[:, None, :, None] & valid[:, None, None]).expand_as(ours[1])
    assert torch.allclose(ours[1][seen], theirs[1][seen], rtol=1e-4, atol=2e-5)


def test_a_window_wider_than_the_length_seen() -> None:
    """The length is dynamic, so that the window shows at longer ones."""

    def window(m: Tensor) -> Tensor:
        at = torch.arange(m.shape[1])
        return m[:, None, None].bool() & ((at[:, None] - at).abs() <= 20)

    model = Encoder(see=window)
    ids, mask = batch()
    run, reports = removed(model, ids, mask, dynamic=True)
    assert is_removed(reports) and "window 20" in notes(reports)[0]
    same_tokens(run, model, ids, mask)
    long = batch((50, 8, 1, 33), 50)
    same_tokens(run, model, *long)
    assert len(reports) == 1


def test_two_masks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Encoder(), Encoder(see=additive)

        def forward(self, ids: Tensor, mask: Tensor, ids2: Tensor, mask2: Tensor) -> Any:
            return self.one(ids, mask), self.two(ids2, mask2)

    model = Pair()
    inputs = (*batch(), *batch((3, 9, 5), 9))
    run, reports = removed(model, *inputs)
    assert len(notes(reports, "padding removed")) == 2
    with torch.inference_mode():
        for ours, theirs, mask in zip(run(*inputs), model(*inputs), inputs[1::2], strict=True):
            valid = mask.bool()
            assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)


def test_gradients_keep_padding() -> None:
    model = Encoder().eval()
    reports: list[Any] = []
    torch._dynamo.reset()
    run = torch.compile(
        model,
        backend="graphquant",
        options={"padding": "remove", "inner": "aot_eager", "on_report": reports.append},
    )
    with torch.enable_grad():
        run(*batch()).sum().backward()
    assert "gradient" in notes(reports)[0]
    assert model.embed.weight.grad is not None
