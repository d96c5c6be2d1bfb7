"""Dynamic sizes and numbers: the same proofs, at sizes that were not seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import text

from .encoders import Encoder, batch, is_removed, notes, removed, same_tokens

LENGTHS = (12, 3, 7, 1, 5, 9)
FAR = -1e9
Dynamic = str  # "both", "batch" or "length"
DYNAMIC = ("both", "batch", "length")


def additive(m: Tensor) -> Tensor:
    return (1.0 - m[:, None, None].float()) * -1e9


def distance(m: Tensor) -> Tensor:
    at = torch.arange(m.shape[1])
    return (at[:, None] - at).abs()


def sentence(m: Tensor) -> Tensor:
    return torch.arange(len(m))[:, None, None, None]


def far(m: Tensor) -> Tensor:
    """More than two positions away."""
    return (distance(m) > 2) * -1e9


def written_out(scale: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * scale(q) + mask).softmax(-1) @ v

    return attend


def compiled(model: nn.Module, dynamic: Dynamic) -> tuple[Callable[..., Any], list[Any]]:
    """For sentences of LENGTHS."""
    ids, mask = batch(LENGTHS)
    for t in (ids, mask) if dynamic != "both" else ():
        torch._dynamo.mark_dynamic(t, 0 if dynamic == "batch" else 1)
    return removed(model, ids, mask, dynamic=True if dynamic == "both" else None)


def batches(dynamic: Dynamic) -> list[tuple[Tensor, Tensor]]:
    """Of other sizes, where they are dynamic."""
    more = (12, 3, 7, 12, 12, 12, 12, 12, 6)
    wider = (5, 20, 3, 20, 20, 20)
    found = [batch(LENGTHS)]
    found += [batch(more), batch((4, 12, 8))] if dynamic != "length" else []
    found += [batch(wider, 20), batch((5, 2, 3, 6, 1, 4), 6)] if dynamic != "batch" else []
    return found + ([batch(more[:3], 20)] if dynamic == "both" else [])


def tokens_are_right(run: Callable[..., Any], model: nn.Module, dynamic: Dynamic) -> None:
    for ids, mask in batches(dynamic):
        with torch.inference_mode():
            ours, theirs = run(ids, mask), model(ids, mask)
        valid = mask.bool()
        assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)


class HiddenStates(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_written_out_attention_of_transformers(name: str, dynamic: Dynamic) -> None:
    model = HiddenStates((text.SMALL | text.EXTRA)[name].build("eager"))
    run, reports = compiled(model, dynamic)
    assert is_removed(reports) and "2 attentions" in notes(reports)[0]
    for ids, mask in batches(dynamic):
        same_tokens(run, model, ids, mask)
    assert all(n.startswith("padding removed") for n in notes(reports))


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize(
    ("see", "scale"),
    [
        (additive, lambda q: 0.3),  # measured with other rounding at other lengths
        (lambda m: additive(m) + -0.5 * distance(m), lambda q: 0.25),
        (lambda m: additive(m) + far(m), lambda q: 0.25),
    ],
)
def test_masks(see: Callable[[Tensor], Any], scale: Callable[[Tensor], Any], dynamic: str) -> None:
    model = Encoder(see=see, attend=written_out(scale))
    run, reports = compiled(model, dynamic)
    assert is_removed(reports) and "2 attentions" in notes(reports)[0], notes(reports)
    for ids, mask in batches(dynamic):
        same_tokens(run, model, ids, mask)
    assert len(reports) == 1


class Scaled(Encoder):
    """With Python floats that Dynamo makes inputs of the graph."""

    def __init__(self) -> None:
        super().__init__(see=self.additive, attend=self.written_out)
        self.scale, self.blocked = 0.3, FAR

    def additive(self, m: Tensor) -> Tensor:
        return (1.0 - m[:, None, None].float()) * self.blocked

    def written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * self.scale + mask).softmax(-1) @ v


def test_floats_of_python_are_guarded() -> None:
    """They are evaluated with the values that were seen; others are compiled again."""
    model = Scaled()
    run, reports = compiled(model, "both")
    assert is_removed(reports) and "2 attentions" in notes(reports)[0]
    for scale, blocked, graphs in ((0.3, FAR, 1), (0.7, FAR, 2), (0.7, 0.0, 3)):
        model.scale, model.blocked = scale, blocked
        tokens_are_right(run, model, "both")
        assert len(reports) == graphs
    assert "2 attentions" in notes(reports)[1] and "2 attentions" not in notes(reports)[2]


def test_a_float_of_python_that_lets_a_reader_see_padding() -> None:
    """Readers are not evaluated with the float that was seen."""

    class Shifted(Encoder):
        shift = 0.0

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            x = super().forward(ids, mask)
            return x + self.shift * x.mean(1, keepdim=True)

    model = Shifted()
    run, _ = compiled(model, "both")
    for model.shift in (0.0, 1.5):
        tokens_are_right(run, model, "both")


@pytest.mark.parametrize(
    ("see", "scale", "dynamic"),
    [
        (additive, lambda q: 2 / q.shape[0], "batch"),
        (additive, lambda q: q.shape[2] ** -0.5, "length"),
        (lambda m: additive(m) - distance(m) / m.shape[0], lambda q: 0.3, "batch"),
        (lambda m: additive(m) - distance(m) * (m.shape[1] // 3), lambda q: 0.3, "length"),
        (lambda m: additive(m) + (distance(m) > m.shape[0]) * FAR, lambda q: 0.3, "batch"),
        (lambda m: additive(m) + (distance(m) > m.shape[1] // 3) * FAR, lambda q: 0.3, "length"),
        (
            lambda m: additive(m) + far(m) * torch.tensor(m.shape[0] > 7),
            lambda q: 0.3,
            "batch",
        ),
        (lambda m: additive(m) + far(m) * (m.sum() > 60), lambda q: 0.3, "batch"),
        (lambda m: additive(m) + far(m) * (m.sum() > 60), lambda q: 0.3, "length"),
        (lambda m: additive(m) + far(m) * (m.sum() < 20), lambda q: 0.3, "length"),
        (lambda m: additive(m) + far(m) * (sentence(m) == 7), lambda q: 0.3, "batch"),
        (lambda m: additive(m) + far(m) * (sentence(m) == len(m) - 1), lambda q: 0.3, "batch"),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_masks_that_depend_on_sizes_stay_right(
    see: Callable[[Tensor], Any], scale: Callable[[Tensor], Any], dynamic: Dynamic, both: bool
) -> None:
    """They look like others at the sizes that are seen: attention stays padded."""
    model = Encoder(see=see, attend=written_out(scale))
    dynamic = "both" if both else dynamic
    run, reports = compiled(model, dynamic)
    assert "2 attentions" not in notes(reports)[0]
    tokens_are_right(run, model, dynamic)


def test_a_window_as_wide_as_the_batch() -> None:
    """It is wider than the length seen."""
    see = lambda m: m[:, None, None].bool() & (distance(m) < m.shape[0])  # noqa: E731
    model = Encoder(see=see)
    ids, mask = batch((4, 2, 1, 3, 2, 4), 4)
    run, reports = removed(model, ids, mask, dynamic=True)
    assert "2 attentions" not in notes(reports)[0]
    for ids, mask in (batch((4, 2, 1, 3, 2, 4), 4), batch((5, 20, 3), 20), batch(LENGTHS)):
        with torch.inference_mode():
            ours, theirs = run(ids, mask), model(ids, mask)
        valid = mask.bool()
        assert torch.allclose(ours[valid], theirs[valid], rtol=1e-4, atol=2e-5)
