"""Encoders of sound, of transformers."""

from __future__ import annotations

from tests.zoo.entry import EAGER, hf, table
from tests.zoo.inputs import floats
from tests.zoo.sizes import MLP

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

SMALL = table(
    hf("whisper", "whisper:WhisperConfig:WhisperEncoder", WHISPER, floats(16, 48)),
)

EXTRA = table(
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
)
