"""What a small config holds, by the names of its fields: data, no code.

The first rule whose pattern matches the whole name decides. All widths are equal, so that parts of
a model that must agree do; heads times head size is the width.
"""

from __future__ import annotations

WIDTH, HEADS, LAYERS, PART_LAYERS, VOCAB, IMAGE, PATCH = 64, 4, 4, 2, 128, 32, 8

# Whole numbers that are not lists.
INTEGERS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?|vocab|n_vocab|char_vocab.*", VOCAB),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|.*num_key_value_heads|kv_n_heads|num_kv", 2),
    (r"(mamba_|ssm_)?(n_heads|num_heads_mamba|mamba_num_heads)", 8),
    (r"mamba_n_heads|mamba_num_heads|num_ssm_heads", 8),
    (r".*(num_)?(attention_heads|attn_heads)|.*num_heads|n_heads?|.*_heads|num_head|heads", HEADS),
    (r".*(head_dim|dim_head|head_size|d_head|d_kv|key_size|attention_key_size|rotary_dim)", 16),
    (r"(q|kv|o|qk|gate|decay|a|v|g|w)_lora_(rank|dim)|.*lora_rank|.*low_rank.*", 16),
    (r"num_hidden_layers|n_layers?|num_layers|depth", LAYERS),
    (r".*(num_)?(hidden_)?layers|.*_depth|depth_.*|l_layers|x_layers|r_layers|num_blocks", 2),
    (r"num_nextn_predict_layers|num_mtp.*", 0),
    (r"num_kv_shared_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(num_|n_)?(shared|zero)_experts|num_shared_expert|moe_num_shared_experts", 1),
    (r".*num_experts_per_tok(en)?|moe_k|moe_topk|top_k|top_k_experts|num_selects?_experts|"
     r"moe_top_?k|num_activated_experts|.*experts_per_tok", 2),
    (r".*num_(local_|routed_)?experts|n_routed_experts|.*num_experts|n_experts|expert_num", 4),
    (r"n_group|topk_group|num_expert_group|num_experts_group", 1),
    (r"type_vocab_size|num_token_types", 2),
    (r"max_source_positions", 64),
    (r"max_2d_position_embeddings", 128),
    (r"(.*_)?(max_position_embeddings|max_target_positions|n_positions|n_ctx|max_seq_len|"
     r"max_position|model_max_length|max_sequence_length|seq_length|"
     r"max_length|context_length)", 128),
    (r"(local_)?(sliding_window|local_attention|attention_chunk_size|.*sliding_window)", 8),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|intermediate_dim|mlp_dim|d_ff|n_inner|"
     r"ffn_size|inner_dim|dim_feedforward|feedforward_size|mlp_hidden_size|hidden_ffn)", 2 * WIDTH),
    (r"image_size|.*_image_size|img_size|input_image_size|crop_size", IMAGE),
    (r"patch_size|vision_patch_size|.*_patch_size", PATCH),
    (r"patch_stride|encoder_stride", PATCH),
    (r".*(num_mel_bins|feature_size|n_mels|num_mels|mel_bins|input_feat_per_channel)", 16),
    (r"num_queries|num_query_tokens|query_num|num_latents|latent_query_num|.*n_latents|"
     r"num_object_queries", 6),
    (r"num_feature_levels|.*_n_points", 2),
    (r".*(hidden_size|d_model|embed_dim|n_embd|hidden_dim|embedding_size|projection_dim|"
     r"hidden_channels|embedding_dim|embed_size|dim_model|model_dim|proj_dim|decoder_dim|dim|"
     r"width|hidden_size_.*|d_latents|lru_width|attention_hidden_size|out_hidden_size|"
     r"projection_size|output_dim|latent_dim|emb_dim|channels_dim|mlp_output_size|"
     r"d_embed|classifier_proj_size|embed_proj_dim|conv_dim|.*hidden_features)", WIDTH),
    (r"(.*_)?num_attention_heads_per_.*", HEADS),
    (r".*_period|.*_interval|.*_frequency|.*_every_n.*|.*_freq", 2),
    (r"attn_layer_offset|expert_layer_offset|.*_layer_offset", 1),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_ssm|d_state|ssm_cfg", 8),
    (r".*chunk_size", 8),
    (r"codebook_size|num_embeddings", 32),
    (r"num_denoising", 0),
    (r"window_size|.*window_size", 4),
    (r".*_channels_list", 8),
    (r"(auxiliary|fpn|decoder|base|subsampling_conv)_(channels|filters)", 32),
    (r"upsample_initial_channel|.*num_filters", 32),
)  # fmt: skip

# Lists of whole numbers: the new values; the last one is repeated as often as needed.
LISTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r".*out_indices", (0, 1, 2, 3)),
    (r".*(index|indexes|indices)", (0, 1)),
    (r".*depths?|.*layers", (1,)),
    (r".*heads", (1, 2, 4, 4)),
    (r"image_size|img_size|.*_image_size", (IMAGE,)),
    (r"patch_size", (PATCH,)),
    (r".*window_size|attention_window", (4,)),
    (r".*hidden_sizes|.*embed_dims?|.*dims|.*widths|.*hidden_dims?", (32, 32, 64, 64)),
    (r"conv_dim", (32,)),
)

# Parts of a config that are as deep as a model of their own.
TEXT_PARTS = r".*text_config|.*decoder|llm_config|.*decoder_config|language_config"

# Fields that draw random numbers, or make a model large, by pattern.
ZERO_FLOATS = (
    r".*drop.*|.*jitter.*|.*noise.*|mask_(time|feature)_prob|layerdrop|resid_pdrop|.*_pdrop|"
    r"position_.*_prob"
)
FLAGS: tuple[tuple[str, bool], ...] = (
    (r"use_cache|use_timm_backbone|use_pretrained_backbone|apply_spec_augment|.*jitter.*", False),
)

# Values for fields that a class leaves empty and its models then read.
WHERE_NONE = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "head_dim": 16,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
}


def _token_ids() -> dict[str, int]:
    fixed = ("pad", "bos", "eos", "decoder_start", "cls", "sep", "mask", "unk", "blank")
    marks = (
        "image", "video", "audio", "vision_start", "vision_end", "image_start", "image_end",
        "video_start", "video_end", "audio_start", "audio_end", "audio_bos", "audio_eos", "boi",
        "eoi", "boa", "eoa", "begin_image", "end_image", "user"
    )  # fmt: skip
    return {
        **{name: index for index, name in enumerate(fixed)},
        **{name: FIRST_MARK + index for index, name in enumerate(marks)},
    }


# Ids of special tokens; ordinary ids are between.
FIRST_MARK = 100
TOKEN_IDS = _token_ids()
