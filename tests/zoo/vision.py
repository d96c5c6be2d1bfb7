"""Encoders of pictures and video, of transformers."""

from __future__ import annotations

from tests.zoo.entry import EAGER, hf, table
from tests.zoo.inputs import floats, grid, image, patches
from tests.zoo.sizes import LAYERS, MLP, PICTURE, VISION

QWEN = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 48,
}
RAGGED = ((4, 6), (6, 4))  # patches of 2 x 2 merge, so both numbers are even

SMALL = table(
    hf(
        "clip_vision",
        "clip:CLIPVisionConfig:CLIPVisionModel",
        {**VISION, "intermediate_size": 256},
        image(),
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
)

EXTRA = table(
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
)

TRUE_WIDTH = table(
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
