"""A budget on real weights: what it takes to bring embeddings of sentences this near to float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant

BATCH = 32


class Embedder(nn.Module):
    """What counts: the mean over a sentence's own tokens, of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        tokens = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return F.normalize((tokens * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


def sentences(example: Any) -> list[str]:
    """Three times as many as the example's: alone, and joined with another of another topic."""
    alone = [s for group in example.read_sentences().values() for s in group]
    found = list(alone)
    for shift in (11, 29):
        others = alone[shift:] + alone[:shift]
        found += [f"{a.rstrip('.!?')}, and {b}" for a, b in zip(alone, others, strict=True)]
    return found


def batches(tokenize: Any, sentences: list[str]) -> list[dict[str, Tensor]]:
    """Of sentences of like length, which leaves little padding."""
    ordered = sorted(sentences, key=len)
    return [dict(tokenize(ordered[i : i + BATCH])) for i in range(0, len(ordered), BATCH)]


@pytest.mark.slow
def test_a_budget_brings_the_real_model_as_near_as_is_asked(example: Any) -> None:
    model, tokenize = example.load_model(torch.device("cpu"))
    embedder = Embedder(model).eval()
    every = sentences(example)
    some = every[::4]  # to calibrate and to fit on; all are evaluated on
    assert len(set(every)) >= 200
    fit = batches(tokenize, some)
    calibration = graphquant.calibrate(embedder, fit, progress=False)
    options = {"calibration": calibration, "smooth": 0.5, "weight_scale": "mse"}
    budget = graphquant.fit_budget(embedder, fit, cosine=0.99962, options=options, progress=False)
    assert budget.before < 0.9996 <= budget.goal <= budget.after
    assert budget.float_share <= 0.15

    run = torch.compile(
        embedder, backend="graphquant", options={"inner": "eager", **budget.options}
    )
    with torch.inference_mode():
        both = [(run(**batch), embedder(**batch)) for batch in batches(tokenize, every)]
    got, want = (torch.cat(embeddings) for embeddings in zip(*both, strict=True))
    assert F.cosine_similarity(got, want).mean() >= 0.9996
    alike, nearest = ((e @ e.T).fill_diagonal_(-2) for e in (want, got))
    lead = alike.max(-1).values - alike.gather(-1, nearest.argmax(-1, keepdim=True)).squeeze(-1)
    # 234 to 239 of 240 keep their neighbor: which linears stay in float, and with that which near
    # ties fall, depends on how the processor adds. What none may lose is one that is clearly ahead.
    assert (lead == 0).float().mean() >= 0.97
    assert lead.max() <= 0.02
