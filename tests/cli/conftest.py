"""Models as users bring them: a module beside them, and folders of transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

MODULE = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))

def mlp(batch=1):
    return Mlp(), (torch.randn(batch, 5, 32),), {}

def fixed():
    return Mlp(), [torch.randn(3, 32)]

def bare():
    return Mlp()

def text():
    return 3

def loose():
    return Mlp(), torch.randn(3, 32)

def broken():
    raise FileNotFoundError("no weights\\nat all")

def wide():
    return Mlp(), (torch.randn(2, 33),)

kept = Mlp()
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory."""
    name = "cli_test_models"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undone afterwards
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert: a config alone. vit: with weights. roberta: few positions. t5: an encoder and a
    decoder. clip: pictures and words. wav2vec2: sound. empty: nothing. broken: no JSON."""
    import transformers as hf

    root = tmp_path_factory.mktemp("folders")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128}
    picture = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 40}
    ends = {"bos_token_id": 97, "eos_token_id": 98}
    hf.BertConfig(**text).save_pretrained(root / "bert")
    hf.RobertaConfig(**text).save_pretrained(root / "roberta")
    torch.manual_seed(0)
    hf.ViTModel(hf.ViTConfig(**picture)).save_pretrained(root / "vit")
    hf.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=99
    ).save_pretrained(root / "t5")
    hf.CLIPConfig(vision_config=picture, text_config={**text, **ends}).save_pretrained(
        root / "clip"
    )
    hf.Wav2Vec2Config(**sizes).save_pretrained(root / "wav2vec2")
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    return root
