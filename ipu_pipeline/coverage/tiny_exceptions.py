"""Fields that the general rules get wrong, by ``model_type`` or class name: data, no code.

``...`` leaves the class's own default in place.
"""

from __future__ import annotations

from typing import Any

_SWIN = {"depths": [1, 1], "num_heads": [1, 2]}
_EFFICIENT = {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}
_STARTED = {"decoder_start_token_id": 0}
_KEYS_SHARED = {
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENT,
    "beit": {"out_indices": [1, 2, 3, 4]},
    "bit": {"num_groups": 8},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "bros": {"dim_bbox": 8, "bbox_scale": 100.0},
    "chameleon": {"vocabulary_map": {"<image>": 101, "IMGIMGA": 102}},
    "cvt": {"depth": ..., "drop_path_rate": [0.0, 0.0, 0.0]},
    "donut-swin": _SWIN,
    "efficientnet": _EFFICIENT,
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2],
        }
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": _KEYS_SHARED,
    "gemma4_unified_text": _KEYS_SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hgnet_v2": {"hidden_sizes": ...},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "levit": {"image_size": 64, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "intermediate_size": 96},
    "mamba2": {"num_heads": 8},
    "mobilevitv2": {"image_size": 128},
    "mt5": _STARTED,
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 4,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "swin": _SWIN,
    "t5": _STARTED,
    "textnet": {"hidden_sizes": ...},
    "umt5": _STARTED,
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "layer_types": ...},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
}  # fmt: skip
