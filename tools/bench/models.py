"""Published encoders: their dimensions, with random weights and random inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """config and cls: names in transformers. tokens: of one image or text."""

    config: str
    cls: str
    sizes: Mapping[str, Any]
    tokens: int

    @property
    def hidden(self) -> int:
        return int(self.sizes.get("hidden_size", 768))

    @property
    def mlp(self) -> int:
        return int(self.sizes.get("intermediate_size", 4 * self.hidden))

    def cut(self, layers: int | None) -> Model:
        """The same model with fewer layers, or as it is for None."""
        if layers is None:
            return self
        return replace(self, sizes={**self.sizes, "num_hidden_layers": layers})


def _vit(hidden: int, mlp: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


def _bert(tokens: int) -> Model:
    return Model("BertConfig", "BertModel", {"max_position_embeddings": 512}, tokens)


_DINOV2_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_INTERN = {"image_size": [448, 448], "patch_size": [14, 14]}

MODELS = {
    "siglip-so400m": Model(
        "SiglipVisionConfig", "SiglipVisionModel", _vit(1152, 4304, 27, 16, 378, 14), 729
    ),
    "clip-l-336": Model(
        "CLIPVisionConfig", "CLIPVisionModel", _vit(1024, 4096, 24, 16, 336, 14), 577
    ),
    "internvit-300m": Model(
        "InternVLVisionConfig",
        "InternVLVisionModel",
        {**_vit(1024, 4096, 24, 16, 448, 14), **_INTERN},
        1025,
    ),
    "vit-b-16": Model("ViTConfig", "ViTModel", _vit(768, 3072, 12, 12, 224, 16), 197),
    "bert-base-128": _bert(128),
    "bert-base-512": _bert(512),
    "dinov2-l": Model(
        "Dinov2Config", "Dinov2Model", {**_DINOV2_L, "image_size": 224, "patch_size": 14}, 257
    ),
}


def build(model: Model, device: str) -> nn.Module:
    """In bfloat16, for inference; the same weights each time."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, model.config)(**model.sizes)
    with torch.device(device):
        built: nn.Module = getattr(transformers, model.cls)(config)
    return built.to(torch.bfloat16).eval().requires_grad_(False)


def inputs(model: Model, batch: int, device: str) -> dict[str, Tensor]:
    """Random token ids or bfloat16 pixels; the same ones each time."""
    random = torch.Generator(device).manual_seed(batch)
    if "image_size" not in model.sizes:
        words, size = int(model.sizes.get("vocab_size", 30_000)), (batch, model.tokens)
        return {"input_ids": torch.randint(0, words, size, device=device, generator=random)}
    side = model.sizes["image_size"]
    side = side if isinstance(side, int) else side[0]
    pixels = torch.randn(batch, 3, side, side, device=device, generator=random)
    return {"pixel_values": pixels.to(torch.bfloat16)}
