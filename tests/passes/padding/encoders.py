"""A small text encoder, whose parts tests replace, and what they compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphquant.report import Report

B, S, WIDTH, HEADS, VOCABULARY = 4, 12, 32, 4, 50
LENGTHS = (12, 3, 7, 1)
HEAD = WIDTH // HEADS


device = "cpu"  # of encoders and batches; test_forms.py sets it


def padding_mask(mask: Tensor) -> Tensor:
    """[B, 1, 1, S], what attention may see, of a mask [B, S] of 0 and 1."""
    return mask[:, None, None].bool()


class Layer(nn.Module):
    """Post-norm, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Any, attend: Callable[..., Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        y = attend(q, k, v, mask)
        x = self.norm1(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class Encoder(nn.Module):
    """Token ids and mask [B, S] -> pool(hidden, mask). Each argument replaces one part.

    see      mask [B, S] -> the mask that attention takes
    attend   (q, k, v, mask) -> [B, H, S, D]
    between  (hidden, mask) -> hidden, between the two layers
    pool     (hidden, mask) -> result
    """

    def __init__(
        self,
        see: Callable[[Tensor], Any] = padding_mask,
        attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
        between: Callable[[Tensor, Tensor], Tensor] = lambda x, mask: x,
        pool: Callable[[Tensor, Tensor], Any] = lambda x, mask: x,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.position = nn.Embedding(64, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.see, self.attend, self.between, self.pool = see, attend, between, pool
        self.to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        seen = self.see(mask)
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = self.layers[0](x, seen, self.attend)
        x = self.layers[1](self.between(x, mask), seen, self.attend)
        return self.pool(x, mask)


def batch(
    lengths: Sequence[int] = LENGTHS, size: int = S, *, left: bool = False, holes: bool = False
) -> tuple[Tensor, Tensor]:
    """(ids, mask) of sentences with these numbers of tokens."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (len(lengths), size), generator=random)
    at = torch.arange(size).expand(len(lengths), size)
    if holes:
        at = torch.rand(len(lengths), size, generator=random).argsort(1)
    n = torch.tensor(lengths)[:, None]
    mask = (at >= size - n if left else at < n).long()
    return (ids * mask).to(device), mask.to(device)


def removed(
    model: nn.Module, *inputs: Tensor, dynamic: bool | None = None, **options: Any
) -> tuple[Callable[..., Any], list[Report]]:
    """(the compiled model, run once with these inputs; its reports), padding removed, in float."""
    reports: list[Report] = []
    options = {"inner": "eager", "quantize": False, **options}
    torch._dynamo.reset()
    run = torch.compile(
        model.eval(),
        backend="graphquant",
        dynamic=dynamic,
        options={"padding": "remove", "on_report": reports.append, **options},
    )
    with torch.inference_mode():
        run(*inputs)
    return run, reports


def notes(reports: Sequence[Report], start: str = "padding") -> list[str]:
    return [n for r in reports for n in r.notes if n.startswith(start)]


def is_removed(reports: Sequence[Report]) -> bool:
    (note,) = notes(reports)
    return note.startswith("padding removed")


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def same_tokens(run: Callable[..., Any], model: nn.Module, ids: Tensor, mask: Tensor) -> None:
    """Asserts that hidden states of tokens are the model's, and those of padding zero."""
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    valid = mask.bool()
    assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
    assert close(ours[valid], theirs[valid])
    assert not ours[~valid].any()


def removes(model: nn.Module, ids: Tensor, mask: Tensor, **options: Any) -> None:
    """Asserts that padding is removed, and that the whole result is the model's."""
    run, reports = removed(model, ids, mask, **options)
    assert is_removed(reports), notes(reports)
    with torch.inference_mode():
        ours, theirs = run(ids, mask), model(ids, mask)
    assert close(ours, theirs)


def keeps(model: nn.Module, *inputs: Tensor, why: str, **options: Any) -> None:
    """Asserts that padding is kept for this reason, and that the result is the model's."""
    run, reports = removed(model, *inputs, **options)
    (note,) = notes(reports)
    assert note.startswith("padding kept: ") and why in note, note
    with torch.inference_mode():
        ours, theirs = run(*inputs), model(*inputs)
    assert close(ours, theirs)
