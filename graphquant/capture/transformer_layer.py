"""Decomposition of torch's fused encoder layer into ops that rules know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """aten._transformer_encoder_layer_fwd, from ops that rules know. src [B, T, embed_dim].

    mask_type: 0 an attention mask [T, T], 1 a key padding mask [B, T], 2 a full mask; True (or
    -inf) means "do not attend", as in torch.nn.MultiheadAttention.
    """

    def attention(x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            t.reshape(batch, tokens, num_heads, embed_dim // num_heads).transpose(1, 2)
            for t in F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        )
        allowed = None
        if mask is not None:
            allowed = mask[:, None, None, :] if mask_type == 1 else mask
            if allowed.dtype == torch.bool:
                allowed = ~allowed
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return F.linear(y.transpose(1, 2).reshape(batch, tokens, embed_dim), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        act = F.gelu if use_gelu else F.relu
        return F.linear(act(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))
