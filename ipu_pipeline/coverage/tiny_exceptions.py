"""Fields that the general rules get wrong, by ``model_type`` or class name: data, no code.

``...`` leaves the class's own default in place.
"""

from __future__ import annotations

from typing import Any

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "beit": {"out_indices": [1, 2, 3, 4]},
    "bros": {"dim_bbox": 8, "bbox_scale": 100.0},
    "chameleon": {"vocabulary_map": {"<image>": 101, "IMGIMGA": 102}},
    "cvt": {"depth": ..., "drop_path_rate": [0.0, 0.0, 0.0]},
    "donut-swin": {"depths": [1, 1], "num_heads": [1, 2]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "intermediate_size": 96},
    "mamba2": {"num_heads": 8},
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 4,
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
}  # fmt: skip
