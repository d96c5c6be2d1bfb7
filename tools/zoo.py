"""Transformer encoders built from configs with random weights, for tests and command line tools.

Nothing is downloaded. Weights and inputs depend only on the name of an entry, so two builds of one
entry are equal, whatever attention implementation they use. After a model is built its parameters
are drawn again, so that a wrong bias, gamma, beta or layer scale shows up in the numbers: a fresh
model has zero biases, unit gammas and constant layer scales, which hide such mistakes.

Three tables: SMALL (two layers, small widths), EXTRA (more architectures, equally small) and
TRUE_WIDTH (the widths of published checkpoints, one or two layers, few tokens).
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Inputs = tuple[tuple, dict]
BOTH = ("sdpa", "eager")
EAGER = ("eager",)


@dataclass(frozen=True)
class Entry:
    """A model that can be built, and inputs for it."""

    name: str
    build: Callable[[str], nn.Module]  # attention implementation -> eval() module in float32
    inputs: Callable[..., Inputs]  # batch, draw=0 -> (args, kwargs); other numbers in each draw
    family: str
    attns: tuple[str, ...] = BOTH  # attention implementations that the model really switches


# Randomness -------------------------------------------------------------------------------------


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed the CPU generator from a name; restore it on exit."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the accelerators, which are not restored here.
        torch.default_generator.manual_seed(zlib.crc32(name.encode()))
        yield


SCALE_NAMES = {"lambda1", "lambda2", "lambda_1", "lambda_2", "gamma", "gamma_1", "gamma_2"}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def draw(module: nn.Module, name: str, old: Tensor) -> Tensor | None:
    """New values for one direct parameter of a module, or None to keep the old ones."""
    if old.numel() == 1 or not old.is_floating_point() or not old.requires_grad:
        return None  # temperatures; fixed sinusoids
    if "parametrizations" in name or type(module).__name__ == "ParametrizationList":
        return None  # weight norm: magnitude and direction belong together
    noise = torch.randn(old.shape)
    if is_norm(module):
        if "bias" in name:
            return 0.1 * noise
        return 0.2 * noise + (0.0 if bool((old == 0).all()) else 1.0)  # "1 + weight" norms
    if name in SCALE_NAMES:
        sign = torch.where(torch.rand(old.shape) < 0.2, -1.0, 1.0)
        return sign * 10.0 ** -torch.rand(old.shape)  # 0.1 .. 1, every fifth one negative
    if "bias" in name:
        return (0.5 if "table" in name else 0.1) * noise
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            noise[module.padding_idx] = 0.0
        return 0.5 * noise
    if "weight" in name and old.dim() >= 2:
        # Unit gain, output channels of unlike size (what per-channel scales are for).
        spread = (0.3 * torch.randn(old.shape[0], *[1] * (old.dim() - 1))).exp()
        return noise * spread / math.sqrt(math.prod(old.shape[1:]))
    return 0.3 * noise  # class tokens, position tables, probes


@torch.no_grad()
def roughen(model: nn.Module) -> nn.Module:
    """Draw all parameters of a model again, with the statistics of trained ones."""
    done: set[int] = set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) in done:  # tied
                continue
            done.add(id(param))
            new = draw(module, name, param)
            if new is not None:
                param.copy_(new)
        if isinstance(getattr(module, "running_var", None), Tensor):  # batch norm
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape))
            module.running_var.copy_((0.3 * torch.randn(module.running_var.shape)).exp())
    return model


# Entries ----------------------------------------------------------------------------------------


def find_class(package: str, name: str) -> type:
    """A class of transformers.models.<package>, exported from the package or not."""
    pkg = importlib.import_module(f"transformers.models.{package}")
    if hasattr(pkg, name):
        return getattr(pkg, name)
    return getattr(importlib.import_module(f"{pkg.__name__}.modeling_{package}"), name)


def hf(
    name: str,
    where: str,
    config: dict[str, Any],
    inputs: Callable[[int], Inputs],
    attns: tuple[str, ...] = BOTH,
    tune: Callable[[nn.Module], None] | None = None,
) -> Entry:
    """An entry for a transformers class; where is "package:Config:Model"."""
    package, config_name, model_name = where.split(":")

    def build(attn: str) -> nn.Module:
        cls: Any = find_class(package, model_name)
        use = attn if attn in attns and getattr(cls, f"_supports_{attn}", True) else "eager"
        with seeded(name):
            settings = find_class(package, config_name)(**config)
            model = cls._from_config(settings, attn_implementation=use, dtype=torch.float32)
            roughen(model)
            if tune:
                tune(model)
        return model.eval()

    return Entry(name, build, partial(seeded_inputs, name, inputs), package, attns)


def own(
    name: str,
    make: Callable[[str], nn.Module],
    inputs: Callable[[int], Inputs],
    family: str,
    attns: tuple[str, ...] = BOTH,
) -> Entry:
    """An entry for a module of this file or of torch.nn."""

    def build(attn: str) -> nn.Module:
        with seeded(name):
            return roughen(make(attn)).eval()

    return Entry(name, build, partial(seeded_inputs, name, inputs), family, attns)


def seeded_inputs(name: str, make: Callable[[int], Inputs], batch: int, draw: int = 0) -> Inputs:
    """New tensors with the values that belong to a name, a batch and a draw."""
    with seeded(f"{name}/{batch}" + f"/{draw}" * (draw > 0)):
        return make(batch)


# Inputs -----------------------------------------------------------------------------------------


def floats(*shape: int) -> Callable[[int], Inputs]:
    """One float tensor (batch, *shape)."""
    return lambda batch: ((torch.randn(batch, *shape),), {})


def image(size: int = 32) -> Callable[[int], Inputs]:
    """A square picture (batch, 3, size, size)."""
    return floats(3, size, size)


def mask_of(batch: int, length: int) -> Tensor:
    """A right-padded 0/1 mask: the first row is full, the others at least half."""
    sizes = torch.randint(length // 2, length, (batch, 1))
    sizes[0] = length
    return (torch.arange(length) < sizes).long()


def text(
    length: int = 20, vocab: int = 99, pad: int = 0, eos: int | None = None, boxes: bool = False
) -> Callable[[int], Inputs]:
    """Token ids with a padding mask, optionally with an end token and bounding boxes."""

    def make(batch: int) -> Inputs:
        mask = mask_of(batch, length)
        ids = torch.randint(3, vocab - 1, (batch, length))
        if eos is not None:
            ids[torch.arange(batch), mask.sum(1) - 1] = eos
        kwargs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
        if boxes:
            corner = torch.randint(0, 50, (batch, length, 2))
            kwargs["bbox"] = torch.cat([corner, corner + torch.randint(0, 9, corner.shape)], -1)
        return (), kwargs

    return make


def patches(patch: int, slots: int = 24) -> Callable[[int], Inputs]:
    """Siglip2: flattened patches of pictures of unlike shapes, padded to a number of slots."""
    shapes = [(4, 6), (5, 4), (3, 7), (6, 3)]

    def make(batch: int) -> Inputs:
        sizes = torch.tensor([shapes[i % len(shapes)] for i in range(batch)])
        mask = (torch.arange(slots) < sizes.prod(1, keepdim=True)).long()
        pixels = torch.randn(batch, slots, 3 * patch * patch) * mask[..., None]
        kwargs = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sizes}
        return (), kwargs

    return make


def grid(patch: int, shapes: tuple[tuple[int, int], ...]) -> Callable[[int], Inputs]:
    """Qwen-VL: the patches of all pictures in one sequence, and the grid of each picture."""

    def make(batch: int) -> Inputs:
        sizes = torch.tensor([(1, *shapes[i % len(shapes)]) for i in range(batch)])
        pixels = torch.randn(int(sizes.prod(1).sum()), 3 * 2 * patch * patch)
        return (pixels,), {"grid_thw": sizes}

    return make


def masked_floats(mask_name: str, *shape: int) -> Callable[[int], Inputs]:
    """Tokens (batch, *shape) and a mask that is true at padding, as torch.nn wants it."""

    def make(batch: int) -> Inputs:
        mask = mask_of(batch, shape[0]) == 0
        return (torch.randn(batch, *shape),), {mask_name: mask}

    return make


# Modules in the style of timm and torchvision ---------------------------------------------------


class LayerScale(nn.Module):
    """A learned factor per channel, as in timm."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmAttention(nn.Module):
    """Attention with one packed projection, as in timm."""

    def __init__(
        self, dim: int, heads: int, attn: str, norm: type[nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.fused = attn == "sdpa"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = norm(self.head_dim) if norm else nn.Identity()
        self.k_norm = norm(self.head_dim) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            q = q * self.scale
            weights = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1))
            x = weights @ v
        x = x.transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(x))


class TimmMlp(nn.Module):
    """Linear, GELU, linear, with the dropouts and the identity norm of timm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class TimmSwiGlu(nn.Module):
    """A gated MLP whose gate and up projections are one linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(gate) * up)


class TimmBlock(nn.Module):
    """A pre-norm block of timm: attention and MLP, each scaled and added."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        attn: str,
        norm: type[nn.Module] = nn.LayerNorm,
        mlp: type[nn.Module] = TimmMlp,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim, eps=1e-6)
        self.attn = TimmAttention(dim, heads, attn, norm if qk_norm else None)
        self.ls1 = LayerScale(dim)
        self.norm2 = norm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ParallelBlock(nn.Module):
    """Attention and MLP read one norm, as in ViT-22B; no layer scale."""

    def __init__(self, dim: int, heads: int, hidden: int, attn: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = TimmAttention(dim, heads, attn)
        self.mlp = TimmMlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y) + self.mlp(y)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn neighbouring channels of x by the angles of their position."""
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + swapped * sin


class EvaAttention(nn.Module):
    """Attention of EVA-02: no key bias, rotary positions except for the class token."""

    def __init__(self, dim: int, heads: int, attn: str, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused = attn == "sdpa"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        size = dim // heads
        angles = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("sin", angles.sin().repeat_interleave(2, -1), persistent=False)
        self.register_buffer("cos", angles.cos().repeat_interleave(2, -1), persistent=False)

    def rope(self, x: Tensor) -> Tensor:
        head, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat([head, rotate(rest, self.sin, self.cos)], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.rope(q), self.rope(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.proj(self.norm(x.transpose(1, 2).reshape(b, n, c)))


class EvaMlp(nn.Module):
    """The gated MLP of EVA-02, with a norm before the last linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.norm(F.silu(self.w1(x)) * self.w2(x)))


class EvaBlock(nn.Module):
    """A block of EVA-02."""

    def __init__(self, dim: int, heads: int, hidden: int, attn: str, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EvaAttention(dim, heads, attn, tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = EvaMlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MhaBlock(nn.Module):
    """A block around nn.MultiheadAttention; "eager" asks it for its weights as well."""

    def __init__(self, dim: int, heads: int, hidden: int, attn: str) -> None:
        super().__init__()
        self.weights = attn == "eager"
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attn(y, y, y, key_padding_mask=key_padding_mask, need_weights=self.weights)
        x = x + y
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class EncoderBlock(nn.Module):
    """The encoder block of torchvision's vision transformer."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(hidden, dim),
            nn.Dropout(0.0),
        )

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch, tokens, channels), got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Torchvision's vision transformer without its head."""

    def __init__(
        self, dim: int, heads: int, hidden: int, depth: int = 2, size: int = 32, patch: int = 8
    ) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, dim))
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.Sequential(*[EncoderBlock(dim, heads, hidden) for _ in range(depth)])
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


def stack(block: Callable[..., nn.Module], norm: type[nn.Module] = nn.LayerNorm) -> Callable:
    """A maker of two blocks and a last norm, of width 64, 4 heads and MLP 128."""
    return lambda attn: nn.Sequential(block(64, 4, 128, attn), block(64, 4, 128, attn), norm(64))


def torch_encoder(pre: bool) -> Callable[[str], nn.Module]:
    """A maker of an nn.TransformerEncoder, pre-norm with GELU or post-norm with ReLU."""

    def make(attn: str) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            64,
            4,
            128,
            activation="gelu" if pre else "relu",
            batch_first=True,
            norm_first=pre,
        )
        norm = nn.LayerNorm(64) if pre else None
        return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    return make


# Tables -----------------------------------------------------------------------------------------

LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**LAYERS, "intermediate_size": 128}
PICTURE = {"image_size": 32, "patch_size": 8}
VISION = {**MLP, **PICTURE}
TEXT = {**MLP, "vocab_size": 99, "max_position_embeddings": 40}
SPEECH = {
    **MLP,
    "conv_dim": (32, 32),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_layers": 1,
    "num_mel_bins": 16,
    "max_source_positions": 24,
    "vocab_size": 99,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 48,
}
ROBERTA = {**TEXT, "pad_token_id": 1}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RAGGED = ((4, 6), (6, 4))  # patches of 2 x 2 merge, so both numbers are even


def soften(model: nn.Module) -> None:
    """Put the factor that T5 lacks in its attention into the queries, as its training does."""
    for name, param in model.named_parameters():
        if name.endswith("SelfAttention.q.weight"):
            param.data *= 0.25  # head size 16


def table(*entries: Entry) -> dict[str, Entry]:
    """Entries by name."""
    named = {entry.name: entry for entry in entries}
    if len(named) != len(entries):
        raise ValueError("two entries of one name")
    return named


SMALL: dict[str, Entry] = table(
    hf(
        "clip_vision",
        "clip:CLIPVisionConfig:CLIPVisionModel",
        {**VISION, "intermediate_size": 256},
        image(),
    ),
    hf(
        "clip_text",
        "clip:CLIPTextConfig:CLIPTextModel",
        {**TEXT, "bos_token_id": 97, "eos_token_id": 98},
        text(eos=98),
    ),
    hf(
        "siglip",
        "siglip:SiglipVisionConfig:SiglipVisionModel",
        {**VISION, "intermediate_size": 240},  # 16 times an odd number, as the true 4304
        image(),
    ),
    hf(
        "siglip2",
        "siglip2:Siglip2VisionConfig:Siglip2VisionModel",
        {**MLP, "patch_size": 4, "num_patches": 25},
        patches(4),
    ),
    hf("vit", "vit:ViTConfig:ViTModel", VISION, image()),
    hf("dinov2", "dinov2:Dinov2Config:Dinov2Model", {**LAYERS, **PICTURE}, image()),
    hf(
        "dinov2_swiglu",
        "dinov2:Dinov2Config:Dinov2Model",
        {**LAYERS, **PICTURE, "use_swiglu_ffn": True},
        image(),
    ),
    hf("bert", "bert:BertConfig:BertModel", TEXT, text()),
    hf("whisper", "whisper:WhisperConfig:WhisperEncoder", WHISPER, floats(16, 48)),
    hf(
        "internvl",
        "internvl:InternVLVisionConfig:InternVLVisionModel",
        {**VISION, "attention_bias": True},
        image(),
    ),
    hf(
        "internvl_rms",
        "internvl:InternVLVisionConfig:InternVLVisionModel",
        {**VISION, "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
        image(),
    ),
    hf(
        "qwen2_5_vl",
        "qwen2_5_vl:Qwen2_5_VLVisionConfig:Qwen2_5_VisionTransformerPretrainedModel",
        {**QWEN, "intermediate_size": 60, "window_size": 16, "fullatt_block_indexes": [1]},
        grid(4, RAGGED),
    ),
    own("timm_block", stack(TimmBlock), floats(20, 64), "timm"),
    own(
        "timm_rms_block",
        stack(partial(TimmBlock, norm=nn.RMSNorm, mlp=TimmSwiGlu), nn.RMSNorm),
        floats(20, 64),
        "timm",
    ),
    own("nn_transformer_encoder_pre", torch_encoder(True), floats(20, 64), "torch", ("sdpa",)),
    own(
        "nn_transformer_encoder_post",
        torch_encoder(False),
        masked_floats("src_key_padding_mask", 20, 64),
        "torch",
        ("sdpa",),
    ),
    own(
        "nn_mha",
        partial(MhaBlock, 64, 4, 128),
        masked_floats("key_padding_mask", 20, 64),
        "torch",
    ),
    own(
        "torchvision_vit",
        lambda attn: VisionTransformer(64, 4, 128),
        image(),
        "torchvision",
        ("sdpa",),
    ),
)

EXTRA: dict[str, Entry] = table(
    # Text.
    hf(
        "distilbert",
        "distilbert:DistilBertConfig:DistilBertModel",
        {
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 128,
            "vocab_size": 99,
            "max_position_embeddings": 40,
        },
        text(),
    ),
    hf("roberta", "roberta:RobertaConfig:RobertaModel", ROBERTA, text(pad=1)),
    hf(
        "xlm_roberta",
        "xlm_roberta:XLMRobertaConfig:XLMRobertaModel",
        ROBERTA,
        text(pad=1),
    ),
    hf(
        "roberta_prelayernorm",
        "roberta_prelayernorm:RobertaPreLayerNormConfig:RobertaPreLayerNormModel",
        ROBERTA,
        text(pad=1),
    ),
    hf("mpnet", "mpnet:MPNetConfig:MPNetModel", ROBERTA, text(pad=1), EAGER),
    hf(
        "albert",
        "albert:AlbertConfig:AlbertModel",
        {**TEXT, **SPECIAL, "embedding_size": 32},
        text(),
    ),
    hf("electra", "electra:ElectraConfig:ElectraModel", {**TEXT, "embedding_size": 32}, text()),
    hf("ernie", "ernie:ErnieConfig:ErnieModel", TEXT, text()),
    hf("megatron_bert", "megatron_bert:MegatronBertConfig:MegatronBertModel", TEXT, text(), EAGER),
    hf(
        "deberta",
        "deberta:DebertaConfig:DebertaModel",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 16,
        },
        text(),
        EAGER,
    ),
    hf(
        "deberta_v2",
        "deberta_v2:DebertaV2Config:DebertaV2Model",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        text(),
        EAGER,
    ),
    hf(
        "convbert",
        "convbert:ConvBertConfig:ConvBertModel",
        {**TEXT, "embedding_size": 32, "conv_kernel_size": 3},
        text(),
        EAGER,
    ),
    hf(
        "layoutlm",
        "layoutlm:LayoutLMConfig:LayoutLMModel",
        {**TEXT, "max_2d_position_embeddings": 64},
        text(boxes=True),
    ),
    hf("bros", "bros:BrosConfig:BrosModel", {**TEXT, "dim_bbox": 4}, text(boxes=True), EAGER),
    hf("roformer", "roformer:RoFormerConfig:RoFormerModel", TEXT, text(), EAGER),
    hf(
        "squeezebert",
        "squeezebert:SqueezeBertConfig:SqueezeBertModel",
        {**TEXT, "embedding_size": 64},
        text(),
        EAGER,
    ),
    hf(
        "mobilebert",
        "mobilebert:MobileBertConfig:MobileBertModel",
        {**TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 64},
        text(),
    ),
    hf(
        "modernbert",
        "modernbert:ModernBertConfig:ModernBertModel",
        {**TEXT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
        text(),
    ),
    hf("nomic_bert", "nomic_bert:NomicBertConfig:NomicBertModel", TEXT, text()),
    hf(
        "jina_embeddings_v3",
        "jina_embeddings_v3:JinaEmbeddingsV3Config:JinaEmbeddingsV3Model",
        ROBERTA,
        text(pad=1),
    ),
    hf(
        "eurobert",
        "eurobert:EuroBertConfig:EuroBertModel",
        {**TEXT, **SPECIAL, "mask_token_id": 3, "num_key_value_heads": 2},
        text(),
    ),
    hf(
        "esm",
        "esm:EsmConfig:EsmModel",
        {
            **TEXT,
            "pad_token_id": 1,
            "mask_token_id": 4,
            "position_embedding_type": "rotary",
            "emb_layer_norm_before": True,
            "token_dropout": False,
        },
        text(pad=1),
    ),
    hf(
        "t5_encoder",
        "t5:T5Config:T5EncoderModel",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 99,
            "feed_forward_proj": "relu",
        },
        text(),
        tune=soften,
    ),
    hf(
        "umt5_encoder",
        "umt5:UMT5Config:UMT5EncoderModel",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 99,
            "feed_forward_proj": "gated-gelu",
        },
        text(),
        tune=soften,
    ),
    hf(
        "siglip_text",
        "siglip:SiglipTextConfig:SiglipTextModel",
        {**TEXT, "max_position_embeddings": 20, **SPECIAL},
        text(),
    ),
    hf(
        "clip_text_projection",
        "clip:CLIPTextConfig:CLIPTextModelWithProjection",
        {
            **TEXT,
            "bos_token_id": 97,
            "eos_token_id": 98,
            "projection_dim": 48,
            "hidden_act": "gelu",
        },
        text(eos=98),
    ),
    hf(
        "altclip_text",
        "altclip:AltCLIPTextConfig:AltCLIPTextModel",
        {**TEXT, "pad_token_id": 1, "project_dim": 48},
        text(pad=1),
    ),
    hf(
        "chinese_clip_text", "chinese_clip:ChineseCLIPTextConfig:ChineseCLIPTextModel", TEXT, text()
    ),
    # Pictures and video.
    hf("deit", "deit:DeiTConfig:DeiTModel", VISION, image()),
    hf(
        "beit",
        "beit:BeitConfig:BeitModel",
        {**VISION, "layer_scale_init_value": 0.1, "use_relative_position_bias": True},
        image(),
    ),
    hf(
        "data2vec_vision",
        "data2vec:Data2VecVisionConfig:Data2VecVisionModel",
        {**VISION, "layer_scale_init_value": 0.1, "use_shared_relative_position_bias": True},
        image(),
    ),
    hf("ijepa", "ijepa:IJepaConfig:IJepaModel", VISION, image()),
    hf("vit_msn", "vit_msn:ViTMSNConfig:ViTMSNModel", VISION, image()),
    hf(
        "yolos",
        "yolos:YolosConfig:YolosModel",
        {**VISION, "image_size": [32, 32], "num_detection_tokens": 5},
        image(),
    ),
    hf(
        "dinov2_registers",
        "dinov2_with_registers:Dinov2WithRegistersConfig:Dinov2WithRegistersModel",
        {**LAYERS, **PICTURE},
        image(),
    ),
    hf(
        "dinov3",
        "dinov3_vit:DINOv3ViTConfig:DINOv3ViTModel",
        {**VISION, "num_register_tokens": 4},
        image(),
    ),
    hf(
        "dinov3_gated",
        "dinov3_vit:DINOv3ViTConfig:DINOv3ViTModel",
        {**VISION, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        image(),
    ),
    hf("aimv2", "aimv2:Aimv2VisionConfig:Aimv2VisionModel", VISION, image()),
    hf("mlcd", "mlcd:MLCDVisionConfig:MLCDVisionModel", VISION, image()),
    hf(
        "metaclip2_vision", "metaclip_2:MetaClip2VisionConfig:MetaClip2VisionModel", VISION, image()
    ),
    hf("altclip_vision", "altclip:AltCLIPVisionConfig:AltCLIPVisionModel", VISION, image()),
    hf(
        "chinese_clip_vision",
        "chinese_clip:ChineseCLIPVisionConfig:ChineseCLIPVisionModel",
        VISION,
        image(),
    ),
    hf("blip_vision", "blip:BlipVisionConfig:BlipVisionModel", VISION, image(), EAGER),
    hf("blip2_vision", "blip_2:Blip2VisionConfig:Blip2VisionModel", VISION, image()),
    hf("pixtral_vision", "pixtral:PixtralVisionConfig:PixtralVisionModel", VISION, image()),
    hf(
        "idefics3_vision",
        "idefics3:Idefics3VisionConfig:Idefics3VisionTransformer",
        VISION,
        image(),
    ),
    hf(
        "llama4_vision",
        "llama4:Llama4VisionConfig:Llama4VisionModel",
        {
            **VISION,
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
        image(),
    ),
    hf(
        "qwen2_vl",
        "qwen2_vl:Qwen2VLVisionConfig:Qwen2VisionTransformerPretrainedModel",
        {
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "hidden_size": 48,
        },
        grid(4, RAGGED),
    ),
    hf(
        "qwen3_vl",
        "qwen3_vl:Qwen3VLVisionConfig:Qwen3VLVisionModel",
        {
            **QWEN,
            "intermediate_size": 128,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        grid(4, RAGGED),
    ),
    hf(
        "swin",
        "swin:SwinConfig:SwinModel",
        {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        image(),
    ),
    hf(
        "swinv2",
        "swinv2:Swinv2Config:Swinv2Model",
        {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 4,
            "mlp_ratio": 2.0,
        },
        image(),
        EAGER,
    ),
    hf(
        "sam_vision",
        "sam:SamVisionConfig:SamVisionEncoder",
        {
            **LAYERS,
            **PICTURE,
            "output_channels": 32,
            "window_size": 3,
            "num_pos_feats": 16,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
        },
        image(),
    ),
    hf(
        "vitdet",
        "vitdet:VitDetConfig:VitDetModel",
        {
            **LAYERS,
            **PICTURE,
            "mlp_ratio": 2,
            "use_relative_position_embeddings": True,
            "window_size": 3,
            "window_block_indices": [0],
            "pretrain_image_size": 32,
        },
        image(),
        EAGER,
    ),
    hf(
        "hiera",
        "hiera:HieraConfig:HieraModel",
        {
            "embed_dim": 32,
            "image_size": [32, 32],
            "depths": [1, 2],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "patch_size": [7, 7],
        },
        image(),
        EAGER,
    ),
    hf(
        "pvt",
        "pvt:PvtConfig:PvtModel",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
        image(64),
        EAGER,
    ),
    hf(
        "segformer",
        "segformer:SegformerConfig:SegformerModel",
        {
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
        image(64),
    ),
    hf(
        "videomae",
        "videomae:VideoMAEConfig:VideoMAEModel",
        {**VISION, "image_size": 16, "num_frames": 4, "tubelet_size": 2},
        floats(4, 3, 16, 16),
    ),
    hf(
        "vivit",
        "vivit:VivitConfig:VivitModel",
        {**MLP, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        floats(4, 3, 16, 16),
    ),
    hf(
        "timesformer",
        "timesformer:TimesformerConfig:TimesformerModel",
        {**VISION, "image_size": 16, "num_frames": 4},
        floats(4, 3, 16, 16),
        EAGER,
    ),
    # Sound.
    hf("wav2vec2", "wav2vec2:Wav2Vec2Config:Wav2Vec2Model", SPEECH, floats(400)),
    hf(
        "hubert",
        "hubert:HubertConfig:HubertModel",
        {**SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        floats(400),
    ),
    hf(
        "wavlm",
        "wavlm:WavLMConfig:WavLMModel",
        {**SPEECH, "num_buckets": 16, "max_bucket_distance": 32},
        floats(400),
        EAGER,
    ),
    hf(
        "ast",
        "audio_spectrogram_transformer:ASTConfig:ASTModel",
        {
            **MLP,
            "patch_size": 8,
            "frequency_stride": 6,
            "time_stride": 6,
            "max_length": 32,
            "num_mel_bins": 16,
        },
        floats(32, 16),
    ),
    hf(
        "speech_to_text",
        "speech_to_text:Speech2TextConfig:Speech2TextEncoder",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "vocab_size": 99,
            "input_feat_per_channel": 16,
            "conv_channels": 32,
            "max_source_positions": 64,
        },
        floats(48, 16),
        EAGER,
    ),
    hf(
        "parakeet",
        "parakeet:ParakeetEncoderConfig:ParakeetEncoder",
        {**MLP, "num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 5},
        floats(64, 16),
    ),
    hf(
        "moonshine",
        "moonshine:MoonshineConfig:MoonshineEncoder",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "encoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
            "vocab_size": 99,
        },
        floats(4000),
    ),
    # Modules of this file.
    own("timm_qk_norm", stack(partial(TimmBlock, qk_norm=True)), floats(20, 64), "timm"),
    own("timm_parallel", stack(ParallelBlock), floats(20, 64), "timm"),
    own("eva_rope", stack(partial(EvaBlock, tokens=16)), floats(17, 64), "timm"),
)

TRUE_WIDTH: dict[str, Entry] = table(
    hf(
        "siglip_so400m",
        "siglip:SiglipVisionConfig:SiglipVisionModel",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 1,
            "image_size": 56,
            "patch_size": 14,
        },
        image(56),
    ),
    hf(
        "qwen2_5_vl",
        "qwen2_5_vl:Qwen2_5_VLVisionConfig:Qwen2_5_VisionTransformerPretrainedModel",
        {
            "depth": 1,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [0],
        },
        grid(14, RAGGED),
    ),
    hf(
        "clip_l",
        "clip:CLIPVisionConfig:CLIPVisionModel",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 1,
            "image_size": 56,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
        image(56),
    ),
    hf(
        "vit_b",
        "vit:ViTConfig:ViTModel",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 1,
            "image_size": 64,
            "patch_size": 16,
        },
        image(64),
    ),
    hf(
        "internvl_6b",
        "internvl:InternVLVisionConfig:InternVLVisionModel",
        {
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_attention_heads": 25,
            "num_hidden_layers": 1,
            "image_size": 56,
            "patch_size": 14,
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "attention_bias": False,
        },
        image(56),
    ),
    hf(
        "vit_s",
        "vit:ViTConfig:ViTModel",
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 6,
            "num_hidden_layers": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        image(64),
    ),
)

TABLES = {"small": SMALL, "extra": EXTRA, "true": TRUE_WIDTH}


# Lookup -----------------------------------------------------------------------------------------


def imported(spec: str, folder: str | None = None) -> Any:
    """The callable of "module:callable"; the module may lie in the folder."""
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, path = spec.partition(":")
    return attrgetter(path)(importlib.import_module(module))


def users(spec: str, folder: str | None = None) -> Entry:
    """An entry for "module:callable", which returns (module, args, kwargs).

    The callable may take the keywords "attn" and "batch". Without "batch" its inputs are used as
    they are, whatever batch is asked for. Its weights are left alone.
    """
    make = imported(spec, folder)
    taken = inspect.signature(make).parameters
    last: dict[object, Inputs] = {}  # of the last build, so that inputs() need not build again

    def key_of(batch: int, draw: int) -> object:
        return (batch if "batch" in taken else 0), draw

    def call(batch: int, attn: str | None, draw: int = 0) -> nn.Module:
        given = {"attn": attn, "batch": batch}
        with seeded(spec + f"/{draw}" * (draw > 0)):
            module, args, kwargs = make(**{k: v for k, v in given.items() if k in taken and v})
        last.clear()
        last[key_of(batch, draw)] = (tuple(args), dict(kwargs))
        return module.eval()

    def inputs(batch: int, draw: int = 0) -> Inputs:
        key = key_of(batch, draw)
        if key not in last:
            call(batch, None, draw)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, last[key])

    attns = BOTH if "attn" in taken else ("sdpa",)
    return Entry(spec, lambda attn: call(1, attn), inputs, "user", attns)


def load(spec: str, folder: str | None = None) -> Entry:
    """The entry for a name, "name@table" or the user's own "module:callable".

    A bare name is looked up in SMALL, EXTRA and TRUE_WIDTH, in this order; the tables are called
    small, extra and true. The folder is where the module of "module:callable" may lie.
    """
    if ":" in spec:
        return users(spec, folder)
    name, _, where = spec.partition("@")
    if where and where not in TABLES:
        raise KeyError(f"no table {where!r}: one of {', '.join(TABLES)}")
    for entries in [TABLES[where]] if where else TABLES.values():
        if name in entries:
            return entries[name]
    known = [f"{key}@{title}" for title, entries in TABLES.items() for key in entries]
    raise KeyError(f"no model {spec!r}: one of {', '.join(known)}, or module:callable")
