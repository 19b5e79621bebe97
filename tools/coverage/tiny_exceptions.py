"""Fields that the general rules get wrong, by ``model_type`` or class name: data, no code.

``...`` leaves the class's own default in place.
"""

from __future__ import annotations

from typing import Any

from tools.coverage.tiny_draft import LENGTH

_SWIN = {"depths": [1, 1], "num_heads": [1, 2]}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}
_STARTED = {"decoder_start_token_id": 0}
_KEYS_SHARED = {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": _EFFICIENT,
    "beit": {"out_indices": [1, 2, 3, 4]},
    "bit": {"num_groups": 8},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "bros": {"dim_bbox": 8, "bbox_scale": 100.0},
    "chameleon": {"vocabulary_map": {"<image>": 101, "IMGIMGA": 102}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "cvt": {"depth": ..., "drop_path_rate": [0.0, 0.0, 0.0]},
    "donut-swin": _SWIN,
    "efficientnet": _EFFICIENT,
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2],
        }
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": 128},
    "gemma4_text": _KEYS_SHARED,
    "gemma4_unified_text": _KEYS_SHARED,
    "focalnet": {"depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hgnet_v2": {"hidden_sizes": ...},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "intermediate_size": 96},
    "mamba2": {"num_heads": 8},
    "mobilevitv2": {"image_size": 128},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "mt5": _STARTED,
    "muse_spark_audio": {"num_hidden_layers": ...},
    "paddleocr_vl_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
        }
    },
    "perceiver": {"num_cross_attention_heads": 1, "max_position_embeddings": LENGTH},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 4,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "step3p5": {"sliding_window": 8},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "t5": _STARTED,
    "textnet": {"hidden_sizes": ...},
    "upernet": {"use_auxiliary_head": False},
    "umt5": _STARTED,
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": ...},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "layer_types": ...},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "layer_types": ...},
}  # fmt: skip
