"""Text encoders of transformers."""

from __future__ import annotations

from torch import nn

from tests.zoo.entry import EAGER, hf, table
from tests.zoo.inputs import text
from tests.zoo.sizes import ROBERTA, SPECIAL, TEXT


def soften(model: nn.Module) -> None:
    """Put the factor that T5 lacks in its attention into the queries, as its training does."""
    for name, param in model.named_parameters():
        if name.endswith("SelfAttention.q.weight"):
            param.data *= 0.25  # head size 16


SMALL = table(
    hf(
        "clip_text",
        "clip:CLIPTextConfig:CLIPTextModel",
        {**TEXT, "bos_token_id": 97, "eos_token_id": 98},
        text(eos=98),
    ),
    hf("bert", "bert:BertConfig:BertModel", TEXT, text()),
)

EXTRA = table(
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
)
