"""Which rules take how many linears of which model. A release of transformers that stops matching
fails here, and so does a rule that suddenly takes more or less.

Counts of `Report.counts()` for the models of tests/zoo, equal for both attention
implementations and for torch.compile and torch.export.
"""

from __future__ import annotations

QKV = "stack_siblings + norm_linear"
NORM = "norm_linear"
ACT = "act_linear + residual"
OUT = "linear + residual"
SCALED_OUT = "linear + layer_scale + residual"
SCALED_ACT = "act_linear + layer_scale + residual"

PRE_NORM = {QKV: 6, OUT: 2, NORM: 2, ACT: 2}  # two layers: q/k/v, attention output, fc1, fc2
LAYER_SCALE = {QKV: 6, SCALED_OUT: 2, NORM: 2, SCALED_ACT: 2}

SMALL: dict[str, dict[str, int]] = {
    "clip_vision": PRE_NORM,
    "clip_text": PRE_NORM,
    # the pooling head: q, k/v and output of its attention, then norm, fc1, fc2
    "siglip": {QKV: 6, OUT: 2, NORM: 4, ACT: 3, "linear": 2},
    "siglip2": {QKV: 6, OUT: 3, NORM: 4, ACT: 3, "linear": 2},  # and a linear patch embedding
    "vit": {**PRE_NORM, "linear": 1},  # the pooler
    "dinov2": LAYER_SCALE,
    "dinov2_swiglu": {QKV: 10, SCALED_OUT: 2, SCALED_ACT: 2},  # gate and up are siblings too
    "bert": {**PRE_NORM, "linear": 1},
    "whisper": PRE_NORM,
    "internvl": LAYER_SCALE,
    "internvl_rms": LAYER_SCALE,
    # in one graph, its indices given: packed qkv; gate and up; the patch merger's norm and linears
    "qwen2_5_vl": {NORM: 2, OUT: 2, QKV: 4, ACT: 2, "linear": 1, "act_linear": 1},
    "timm_block": {NORM: 4, SCALED_OUT: 2, SCALED_ACT: 2},
    "timm_rms_block": {NORM: 4, SCALED_OUT: 2, SCALED_ACT: 2},
    "nn_transformer_encoder_pre": {NORM: 4, OUT: 2, ACT: 2},
    "nn_transformer_encoder_post": {"linear": 1, OUT: 2, NORM: 3, ACT: 2},
    "nn_mha": {NORM: 2, "linear": 1, ACT: 1},
    "torchvision_vit": {NORM: 4, "linear": 2, ACT: 2},
}

OLDER: dict[str, dict[str, int]] = {
    # until transformers 5.17: gate and up are one packed linear
    "dinov2_swiglu": {QKV: 6, NORM: 2, SCALED_OUT: 2, SCALED_ACT: 2},
}

TRUE_WIDTH: dict[str, dict[str, int]] = {
    "siglip_so400m": {QKV: 3, OUT: 1, NORM: 3, ACT: 2, "linear": 2},
    "clip_l": {QKV: 3, OUT: 1, NORM: 1, ACT: 1},
    "vit_b": {QKV: 3, OUT: 1, NORM: 1, ACT: 1, "linear": 1},
    "internvl_6b": {QKV: 3, SCALED_OUT: 1, NORM: 1, SCALED_ACT: 1},
    "vit_s": {**PRE_NORM, "linear": 1},
}
