"""Published encoders: their dimensions, with random weights and random inputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

SHORTEST = 5  # sentence


@dataclass(frozen=True)
class Model:
    """A published encoder.

    config, cls  names in transformers, of cls with its module
    sizes        where the config's defaults are another model's
    tokens       of one image, text or recording
    mean         number of tokens of sentences that are padded to `tokens`; 0: no mask
    layers       the setting with the number of layers, or with those of each stage
    """

    config: str
    cls: str
    sizes: Mapping[str, Any]
    tokens: int
    mean: int = 0
    layers: str = "num_hidden_layers"

    @property
    def settings(self) -> Any:
        """transformers' config."""
        import transformers

        return getattr(transformers, self.config)(**self.sizes)

    @property
    def hidden(self) -> int:
        return int(self.settings.hidden_size)

    @property
    def mlp(self) -> int:
        return int(getattr(self.settings, "intermediate_size", 4 * self.hidden))

    def cut(self, layers: int | None) -> Model:
        """The same model with fewer layers, or as it is for None."""
        if layers is None:
            return self
        whole = getattr(self.settings, self.layers)
        cut = layers if isinstance(whole, int) else [min(layers, n) for n in whole]
        return replace(self, sizes={**self.sizes, self.layers: cut})


def _sizes(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, mlp, layers, heads), strict=True))


def _vit(hidden: int, mlp: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {**_sizes(hidden, mlp, layers, heads), "image_size": image, "patch_size": patch}


_DINOV2_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M, _CLIP_L = _vit(1152, 4304, 27, 16, 378, 14), _vit(1024, 4096, 24, 16, 336, 14)
_MINILM = _sizes(384, 1536, 6, 12)
_INTERNVIT_6B = {**_vit(3200, 12800, 45, 25, 448, 14), "use_qk_norm": True, "norm_type": "rms_norm"}
_INTERNVIT_6B |= {"attention_bias": False}
_DINOV3_L = {**_vit(1024, 4096, 24, 16, 224, 16), "num_register_tokens": 4}
_SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7}
_WHISPER = "models.whisper.modeling_whisper.WhisperEncoder"
_LARGE_V3 = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
_LARGE_V3 |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128}
_XLM_R = {"vocab_size": 250_002, "max_position_embeddings": 514}
_E5_L = {**_XLM_R, **_sizes(1024, 4096, 24, 16)}
_T5_L = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
MODELS = {
    "siglip-so400m": Model("SiglipVisionConfig", "SiglipVisionModel", _SO400M, 729),
    "clip-l-336": Model("CLIPVisionConfig", "CLIPVisionModel", _CLIP_L, 577),
    "internvit-300m": Model("InternVLVisionConfig", "InternVLVisionModel", {}, 1025),
    "vit-b-16": Model("ViTConfig", "ViTModel", {}, 197),
    "bert-base-128": Model("BertConfig", "BertModel", {}, 128),
    "bert-base-512": Model("BertConfig", "BertModel", {}, 512),
    "dinov2-l": Model("Dinov2Config", "Dinov2Model", {**_DINOV2_L, "image_size": 224}, 257),
    "bert-base-32": Model("BertConfig", "BertModel", {}, 32),
    "minilm-l6": Model("BertConfig", "BertModel", _MINILM, 48),
    "bert-base-ragged": Model("BertConfig", "BertModel", {}, 512, mean=120),
    "bert-base-ragged-128": Model("BertConfig", "BertModel", {}, 128, mean=40),
    "bert-base-full": Model("BertConfig", "BertModel", {}, 512, mean=512),
    "bge-large-ragged": Model("BertConfig", "BertModel", _sizes(1024, 4096, 24, 16), 512, mean=120),
    "minilm-l6-ragged": Model("BertConfig", "BertModel", _MINILM, 128, mean=40),
    "modernbert-ragged": Model("ModernBertConfig", "ModernBertModel", {}, 512, mean=256),
    "internvit-6b": Model("InternVLVisionConfig", "InternVLVisionModel", _INTERNVIT_6B, 1025),
    "dinov3-l": Model("DINOv3ViTConfig", "DINOv3ViTModel", _DINOV3_L, 201),
    "sam-vit-b": Model("SamVisionConfig", "SamVisionModel", {}, 4096),
    "beit-b": Model("BeitConfig", "BeitModel", {"use_relative_position_bias": True}, 197),
    "swin-b": Model("SwinConfig", "SwinModel", _SWIN_B, 49, layers="depths"),
    "deit-tiny": Model("DeiTConfig", "DeiTModel", _sizes(192, 768, 12, 3), 198),
    "whisper-large-v3": Model("WhisperConfig", _WHISPER, _LARGE_V3, 1500, layers="encoder_layers"),
    "bert-base": Model("BertConfig", "BertModel", {}, 512, mean=300),
    "minilm-l6-256": Model("BertConfig", "BertModel", _MINILM, 256, mean=150),
    "bge-large": Model("BertConfig", "BertModel", _sizes(1024, 4096, 24, 16), 512, mean=300),
    "e5-large": Model("XLMRobertaConfig", "XLMRobertaModel", _E5_L, 512, mean=300),
    "xlm-r-base": Model("XLMRobertaConfig", "XLMRobertaModel", _XLM_R, 512, mean=300),
    "mpnet-base": Model("MPNetConfig", "MPNetModel", {}, 384, mean=220),
    "modernbert-base": Model("ModernBertConfig", "ModernBertModel", {}, 512, mean=300),
    "t5-large": Model("T5Config", "T5EncoderModel", _T5_L, 512, mean=300, layers="num_layers"),
}


def build(model: Model, device: str) -> nn.Module:
    """In bfloat16, for inference; the same weights each time."""
    module, _, name = f"transformers.{model.cls}".rpartition(".")
    torch.manual_seed(0)
    with torch.device(device):
        built: nn.Module = getattr(importlib.import_module(module), name)(model.settings)
    return built.to(torch.bfloat16).eval().requires_grad_(False)


def inputs(model: Model, batch: int, device: str) -> dict[str, Tensor]:
    """Random token ids, bfloat16 pixels or spectrograms; the same ones each time."""
    random = torch.Generator(device).manual_seed(batch)
    config, size = model.settings, (batch, model.tokens)
    if bins := getattr(config, "num_mel_bins", None):
        heard = torch.randn(batch, bins, 2 * model.tokens, device=device, generator=random)
        return {"input_features": heard.to(torch.bfloat16)}
    side = getattr(config, "image_size", None)
    if side is None:
        words = min(30_000, config.vocab_size)
        ids = torch.randint(0, words, size, device=device, generator=random)
        if not model.mean:
            return {"input_ids": ids}
        mask = _lengths(model, batch, random)[:, None] > torch.arange(model.tokens, device=device)
        return {"input_ids": ids, "attention_mask": mask.long()}
    side = side if isinstance(side, int) else side[0]
    pixels = torch.randn(batch, 3, side, side, device=device, generator=random)
    return {"pixel_values": pixels.to(torch.bfloat16)}


def _lengths(model: Model, batch: int, random: torch.Generator) -> Tensor:
    """Numbers of tokens of sentences, [batch]: many short ones, from SHORTEST to model.tokens."""
    room = model.tokens - SHORTEST
    power = room / (model.mean - SHORTEST) - 1  # the mean of u^power is 1 / (1 + power)
    u = torch.rand(batch, device=random.device, generator=random)
    u[0] = 1
    return SHORTEST + (room * u**power).round().long()


def widened(kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs for the model in float32."""
    return {k: v.float() if v.is_floating_point() else v for k, v in kwargs.items()}
