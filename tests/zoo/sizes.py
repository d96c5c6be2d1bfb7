"""Small sizes that many configs of transformers share."""

from __future__ import annotations

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**LAYERS, "intermediate_size": 128}
PICTURE = {"image_size": 32, "patch_size": 8}
VISION = {**MLP, **PICTURE}
TEXT = {**MLP, "vocab_size": 99, "max_position_embeddings": 40}
ROBERTA = {**TEXT, "pad_token_id": 1}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
