"""Encoders that have learned something: int8 keeps their answers on data they have not seen.

Trained here, in ten seconds each: a ViT and a DINOv2 with layer scale on scikit-learn's digits, a
BERT on sentences of a made-up language. Trained weights have what random ones lack: channels and
tokens that stand out, answers that depend on small differences.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphquant
from tests.small import int8, seeded

pytestmark = pytest.mark.slow  # `make test` has test_minilm.py, whose weights are trained already

MOST_LOST = 0.003  # of the held-out examples: top-1, int8 against float
SAME_ANSWER = 0.99  # of them, at least
EPOCHS = 30


@dataclass(frozen=True)
class Task:
    """A model and data: x, labels."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    good: float  # top-1 that the float model must reach for a comparison to mean anything


def digits() -> tuple[Tensor, Tensor]:
    """1797 images [1, 8, 8] of handwritten digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(
        found.target
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=256, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, mlp_ratio=4, num_labels=10, layerscale_value=0.5,
    )  # fmt: skip
    return Dinov2ForImageClassification(config)


WORDS, LENGTH = 60, 24


def sentences() -> tuple[Tensor, Tensor]:
    """Words 2 to WORDS - 1; word 0 begins. Three classes: which of the words 2, 3 and 4, that all
    stand somewhere, comes first. It takes positions and attention to tell."""
    g = torch.Generator().manual_seed(0)
    n = 3000
    words = torch.randint(5, WORDS, (n, LENGTH), generator=g)
    words[:, 0] = 0
    places = torch.stack([torch.randperm(LENGTH - 1, generator=g)[:3] + 1 for _ in range(n)])
    words.scatter_(1, places, torch.tensor([2, 3, 4]).expand(n, 3))
    return words, places.argmin(1)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=LENGTH, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


TASKS = {
    "vit on digits": Task(vit, digits, 0.9),
    "dinov2 on digits": Task(dinov2, digits, 0.9),
    "bert on sentences": Task(bert, sentences, 0.95),
}


@dataclass(frozen=True)
class Trained:
    task: Task
    model: nn.Module
    seen: Tensor
    x: Tensor  # held out
    labels: Tensor

    def answers(self, model: Callable[[Tensor], object]) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(part).logits for part in self.x.split(256)]).argmax(-1)  # type: ignore[attr-defined]

    def share_right(self, answers: Tensor) -> float:
        return float((answers == self.labels).float().mean())


@pytest.fixture(scope="module", params=TASKS)
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    pytest.importorskip("sklearn", reason="NOT RUN: the digits are scikit-learn's")
    task = TASKS[request.param]
    x, labels = task.data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, held = order[: len(x) // 2], order[len(x) // 2 :]
    model = seeded(task.make)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # no two write to one file
    folder = Path(request.config.cache.mkdir("trained"))
    file = folder / f"{request.param.replace(' ', '-')}-{torch.__version__}{worker}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, x[seen], labels[seen])
        torch.save(model.state_dict(), file)
    torch._dynamo.reset()
    yield Trained(task, model.eval(), x[seen], x[held], labels[held])
    torch._dynamo.reset()


def train(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    batches = [b for _ in range(EPOCHS) for b in torch.randperm(len(x), generator=g).split(48)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
    model.train()
    for batch in batches:
        loss = F.cross_entropy(model(x[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def test_int8_keeps_the_answers(trained: Trained) -> None:
    exact = trained.answers(trained.model)
    assert trained.share_right(exact) >= trained.task.good
    reports: list[graphquant.Report] = []
    got = trained.answers(int8(trained.model, reports))
    assert reports and all(r.coverage == 1.0 for r in reports)
    assert trained.share_right(got) >= trained.share_right(exact) - MOST_LOST
    assert float((got == exact).float().mean()) >= SAME_ANSWER


def test_it_is_int8_that_answers(trained: Trained) -> None:
    """Its logits differ from the float ones, by some percent of what images differ by."""
    with torch.inference_mode():
        exact = trained.model(trained.x[:256]).logits
        got = int8(trained.model)(trained.x[:256]).logits
    off = ((got - exact).norm() / (exact - exact.mean(0)).norm()).item()
    assert 1e-4 < off < 0.05
