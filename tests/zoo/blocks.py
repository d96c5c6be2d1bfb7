"""Modules in the style of timm, torchvision and torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import own, table
from tests.zoo.inputs import floats, image, masked_floats


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
    """Turn neighboring channels of x by the angles of their position."""
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


SMALL = table(
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

EXTRA = table(
    own("timm_qk_norm", stack(partial(TimmBlock, qk_norm=True)), floats(20, 64), "timm"),
    own("timm_parallel", stack(ParallelBlock), floats(20, 64), "timm"),
    own("eva_rope", stack(partial(EvaBlock, tokens=16)), floats(17, 64), "timm"),
)
