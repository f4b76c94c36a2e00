"""Networks of the package transformers, at reduced width and depth: encoders, decoders, images, sound, time series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from foreign_places import foreign, from_packages
from torch import nn

from tests.zoo.architecture import Architecture, Example, floats, mixed, tokens

FAMILY = "transformers"
TEXT, SHORT = tokens(500, (12,)), tokens(500, (7,))
IDS, PIXELS, VALUES = ("input_ids",), ("pixel_values",), ("input_values",)

WIDTHS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
ENCODER = {"vocab_size": 500, "max_position_embeddings": 64, **WIDTHS}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {
    "vocab_size": 500, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 1,
}  # fmt: skip
PATCHES = {"image_size": 32, "patch_size": 8, **WIDTHS}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 4]}
SOUND = {
    **WIDTHS, "vocab_size": 20, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
GPT = {"vocab_size": 500, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 500, "d_model": 48, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 12}

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {}, "Roberta": {"pad_token_id": 1}, "Electra": {}, "MPNet": {}, "ConvBert": {}, "Deberta": {},
    "DebertaV2": {}, "MegatronBert": {}, "Nystromformer": {}, "SqueezeBert": {"embedding_size": 48}, "LayoutLM": {},
    "RemBert": {}, "RoFormer": {}, "MobileBert": {"embedding_size": 16, "intra_bottleneck_size": 48}, "FNet": {},
    "Ernie": {}, "Camembert": {"pad_token_id": 1}, "Yoso": {}, "BigBird": {}, "IBert": {},
    "ModernBert": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "Albert": {"embedding_size": 16},
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"head_dim": 12}, "Qwen2": {}, "Qwen3": {"head_dim": 12}, "Gemma": {"head_dim": 12},
    "Gemma2": {"head_dim": 12}, "Phi": {}, "Phi3": {}, "Olmo": {}, "Olmo2": {}, "Starcoder2": {}, "Cohere": {},
    "Glm": {"head_dim": 12}, "Granite": {}, "Qwen2Moe": {}, "Falcon": {}, "Mpt": {}, "GPTNeoX": {}, "Persimmon": {},
}  # fmt: skip
MODULES = {
    "DebertaV2": "deberta_v2", "MegatronBert": "megatron_bert", "RemBert": "rembert", "BigBird": "big_bird",
    "Qwen2Moe": "qwen2_moe", "GPTNeoX": "gpt_neox",
}  # fmt: skip


def networks() -> dict[str, Architecture]:
    """All of them by name: "transformers/" and the class."""
    return {f"{FAMILY}/{made.name}": made for made in _networks()}


def _networks() -> Iterator[Architecture]:
    for kind, more in ENCODERS.items():
        yield _described(_module(kind), kind, f"{kind}ForSequenceClassification", IDS, TEXT, ENCODER | more)
    for kind, more in DECODERS.items():
        yield _described(_module(kind), kind, f"{kind}ForCausalLM", IDS, TEXT, DECODER | more)
    for module, kind, network, names, example, options in (*_text(), *_images(), *_signals()):
        yield _described(module, kind, network, names, example, options)


def _module(kind: str) -> str:
    return MODULES.get(kind, kind.lower())


def _described(
    module: str, kind: str, network: str, names: tuple[str, ...], example: Example, options: dict[str, Any]
) -> Architecture:
    def make() -> nn.Module:
        root = f"transformers.models.{module}"
        configuration = getattr(from_packages(f"{root}.configuration_{module}"), f"{kind}Config")(**options)
        if hasattr(configuration, "use_cache"):
            configuration.use_cache = False
        made: nn.Module = getattr(from_packages(f"{root}.modeling_{module}"), network)(configuration)
        return made

    return foreign(network, FAMILY, make, example, names)


_Entry = tuple[str, str, str, tuple[str, ...], Example, dict[str, Any]]


def _text() -> Iterator[_Entry]:
    yield "distilbert", "DistilBert", "DistilBertForSequenceClassification", IDS, TEXT, {
        "vocab_size": 500, "dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    relative = {"vocab_size": 500, "d_model": 48, "n_head": 4, "d_inner": 96}
    yield "xlnet", "XLNet", "XLNetForSequenceClassification", IDS, TEXT, {**relative, "n_layer": 2}
    yield "funnel", "Funnel", "FunnelBaseModel", IDS, TEXT, {**relative, "block_sizes": [1, 1], "d_head": 12}
    yield "gpt2", "GPT2", "GPT2LMHeadModel", IDS, TEXT, GPT
    yield "gpt_neo", "GPTNeo", "GPTNeoForCausalLM", IDS, TEXT, {
        "vocab_size": 500, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    }  # fmt: skip
    yield "gptj", "GPTJ", "GPTJForCausalLM", IDS, TEXT, {**GPT, "rotary_dim": 8}
    yield "opt", "OPT", "OPTForCausalLM", IDS, TEXT, {**ENCODER, "ffn_dim": 96, "word_embed_proj_dim": 48}
    yield "bloom", "Bloom", "BloomForCausalLM", IDS, TEXT, {
        "vocab_size": 500, "hidden_size": 48, "n_layer": 2, "n_head": 4,
    }  # fmt: skip
    state = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2}
    yield "mamba", "Mamba", "MambaModel", IDS, TEXT, {**state, "state_size": 4}
    yield (
        "rwkv",
        "Rwkv",
        "RwkvModel",
        IDS,
        TEXT,
        {**state, "attention_hidden_size": 32, "intermediate_size": 64},
    )
    yield "t5", "T5", "T5EncoderModel", IDS, TEXT, T5
    names = ("input_ids", "decoder_input_ids")
    for module, kind in (
        ("t5", "T5"), ("bart", "Bart"), ("mbart", "MBart"), ("pegasus", "Pegasus"), ("marian", "Marian"),
        ("blenderbot_small", "BlenderbotSmall"), ("m2m_100", "M2M100"),
    ):  # fmt: skip
        yield module, kind, f"{kind}Model", names, mixed(TEXT, SHORT), T5 if kind == "T5" else BOTH


def _images() -> Iterator[_Entry]:
    small, image = floats((3, 32, 32)), floats((3, 64, 64))
    for module, kind, network, more in (
        ("vit", "ViT", "ViTForImageClassification", {}),
        ("deit", "DeiT", "DeiTForImageClassification", {}),
        ("beit", "Beit", "BeitForImageClassification", {}),
        ("dinov2", "Dinov2", "Dinov2ForImageClassification", {}),
        ("vit_msn", "ViTMSN", "ViTMSNForImageClassification", {}),
        ("ijepa", "IJepa", "IJepaModel", {}),
        ("yolos", "Yolos", "YolosModel", {"image_size": [32, 32], "num_detection_tokens": 4}),
        ("siglip", "SiglipVision", "SiglipVisionModel", {}),
        ("clip", "CLIPVision", "CLIPVisionModel", {}),
    ):  # fmt: skip
        yield module, kind, network, PIXELS, small, {**PATCHES, **more}
    windows = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    focal = {"hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}
    residual = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 1, 1]}
    for module, kind, example, options in (
        ("swin", "Swin", small, windows),
        ("swinv2", "Swinv2", small, windows),
        ("convnext", "ConvNext", small, STAGES),
        ("convnextv2", "ConvNextV2", small, STAGES),
        ("focalnet", "FocalNet", small, {"image_size": 32, "patch_size": 2, "embed_dim": 16, **focal}),
        ("resnet", "ResNet", image, residual),
        ("regnet", "RegNet", image, {**residual, "hidden_sizes": [16, 32, 48, 64], "groups_width": 8}),
        ("bit", "Bit", image, {**residual, "num_groups": 4}),
        ("mobilenet_v1", "MobileNetV1", image, {"depth_multiplier": 0.25}),
        ("mobilenet_v2", "MobileNetV2", image, {"depth_multiplier": 0.35}),
        (
            "mobilevit", "MobileViT", image,
            {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        ),
        ("mobilevitv2", "MobileViTV2", image, {"image_size": 64, "width_multiplier": 0.25}),
        (
            "efficientnet", "EfficientNet", image,
            {"width_coefficient": 0.3, "depth_coefficient": 0.5, "hidden_dim": 384},
        ),
        ("poolformer", "PoolFormer", image, STAGES),
        (
            "levit", "Levit", image,
            {
                "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
                "key_dim": [8, 8, 8],
            },
        ),
        ("pvt", "Pvt", image, {"image_size": 64, **PYRAMID}),
        ("pvt_v2", "PvtV2", image, {"image_size": 64, **PYRAMID}),
        ("swiftformer", "SwiftFormer", image, {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
        (
            "hiera", "Hiera", image,
            {
                "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4],
                "num_query_pool": 2, "masked_unit_size": [4, 4],
            },
        ),
    ):  # fmt: skip
        yield module, kind, f"{kind}ForImageClassification", PIXELS, example, options
    heads = {**PYRAMID, "decoder_hidden_size": 32}
    yield "segformer", "Segformer", "SegformerForSemanticSegmentation", PIXELS, image, heads
    yield "glpn", "GLPN", "GLPNForDepthEstimation", PIXELS, image, heads
    yield "swin2sr", "Swin2SR", "Swin2SRForImageSuperResolution", PIXELS, floats((3, 16, 16)), {
        "image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2,
    }  # fmt: skip
    yield "superpoint", "SuperPoint", "SuperPointForKeypointDetection", PIXELS, image, {}
    video = {"num_frames": 4, **PATCHES}
    frames = floats((4, 3, 32, 32))
    yield "videomae", "VideoMAE", "VideoMAEForVideoClassification", PIXELS, frames, video
    yield "timesformer", "Timesformer", "TimesformerForVideoClassification", PIXELS, frames, video
    yield "vivit", "Vivit", "VivitModel", PIXELS, frames, {
        "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8], **WIDTHS,
    }  # fmt: skip


def _signals() -> Iterator[_Entry]:
    for module, kind, more in (
        ("wav2vec2", "Wav2Vec2", {}), ("hubert", "Hubert", {}), ("unispeech", "UniSpeech", {}),
        ("sew", "SEW", {"squeeze_factor": 2}), ("wavlm", "WavLM", {}),
    ):  # fmt: skip
        yield module, kind, f"{kind}ForCTC", VALUES, floats((2000,)), {**SOUND, **more}
    names = ("input_features", "decoder_input_ids")
    yield "whisper", "Whisper", "WhisperModel", names, mixed(floats((20, 60)), SHORT), {
        **BOTH, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    spectrogram = "audio_spectrogram_transformer"
    yield spectrogram, "AST", "ASTForAudioClassification", VALUES, floats((64, 32)), {
        **WIDTHS, "max_length": 64, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
    }  # fmt: skip
    yield "encodec", "Encodec", "EncodecModel", VALUES, floats((1, 1280)), {
        "num_filters": 8, "hidden_size": 32, "codebook_size": 32, "codebook_dim": 32, "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1,
    }  # fmt: skip
    series = {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 4,
        "patch_stride": 4,
        "prediction_length": 4,
    }
    past = ("past_values",)
    yield "patchtst", "PatchTST", "PatchTSTForPrediction", past, floats((32, 3)), {
        **series, "d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
    }  # fmt: skip
    yield "patchtsmixer", "PatchTSMixer", "PatchTSMixerForPrediction", past, floats((32, 3)), {
        **series, "d_model": 16, "num_layers": 2,
    }  # fmt: skip
