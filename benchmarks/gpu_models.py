"""Models of published GPU runs: configs from public facts, captured with few layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from benchmarks.gpu_rows import GpuRow, UnjudgedRowError, number
from ipu_pipeline.capture import capture
from ipu_pipeline.ir.graph import Block, BlockGraph

# config.json of public repositories, as far as sizes go: type, hidden, layers, heads, key and value
# heads, ffn (of an expert, where there are), vocabulary, and what the type has besides.
_Facts = tuple[str, int, int, int, int, int, int, Mapping[str, Any]]
_LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip
_V3 = {
    **_LATENT, "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "intermediate_size": 18432,
}  # fmt: skip
_V2 = {
    **_LATENT, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_K2 = {**_V3, "n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_QWEN3 = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
_EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}
_OSS = {"head_dim": 64, "num_experts_per_tok": 4, "num_experts": 128}
# By what names a model is known, in lower case with "-" for "_" and blanks; the first that matches.
_MODELS: tuple[tuple[str, _Facts], ...] = (
    (r"deepseek-?v2-lite",
     ("deepseek_v3", 2048, 27, 16, 16, 1408, 102400,
      {**_V2, "q_lora_rank": None, "n_routed_experts": 64, "intermediate_size": 10944})),
    (r"deepseek-?v2",
     ("deepseek_v3", 5120, 60, 128, 128, 1536, 102400,
      {**_V2, "q_lora_rank": 1536, "n_routed_experts": 160, "intermediate_size": 12288})),
    (r"deepseek-?v?3|deepseek-r1", ("deepseek_v3", 7168, 61, 128, 128, 2048, 129280, _V3)),
    (r"kimi-?k2", ("deepseek_v3", 7168, 61, 64, 64, 2048, 163840, _K2)),
    (r"moonlight",
     ("deepseek_v3", 2048, 27, 16, 16, 1408, 163840,
      {**_V2, "q_lora_rank": None, "n_routed_experts": 64, "intermediate_size": 11264})),
    (r"qwen3-?235b", ("qwen3_moe", 4096, 94, 64, 4, 1536, 151936, _QWEN3)),
    (r"qwen3-?30b", ("qwen3_moe", 2048, 48, 32, 4, 768, 151936, _QWEN3)),
    (r"qwen2-57b",
     ("qwen2_moe", 3584, 28, 28, 4, 2560, 151936,
      {"num_experts": 64, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480})),
    # As a model whose attention is one operation: its sinks add nothing to the price.
    (r"gpt-?oss-?120b", ("qwen3_moe", 2880, 36, 64, 8, 2880, 201088, _OSS)),
    (r"gpt-?oss-?20b",
     ("qwen3_moe", 2880, 24, 64, 8, 2880, 201088, {**_OSS, "num_experts": 32})),
    (r"glm-?4.5-?air",
     ("glm4_moe", 4096, 46, 96, 8, 1408, 151552,
      {"n_routed_experts": 128, "head_dim": 128, "first_k_dense_replace": 1,
       "intermediate_size": 10944})),
    (r"glm-?4.[56]",
     ("glm4_moe", 5120, 92, 96, 8, 1536, 151552,
      {"n_routed_experts": 160, "head_dim": 128, "first_k_dense_replace": 3,
       "intermediate_size": 12288})),
    (r"grok", ("mixtral", 6144, 64, 48, 8, 32768, 131072, _EIGHT)),
    (r"dbrx",
     ("mixtral", 6144, 40, 48, 8, 10752, 100352,
      {"num_local_experts": 16, "num_experts_per_tok": 4})),
    (r"8x22b", ("mixtral", 6144, 56, 48, 8, 16384, 32768, _EIGHT)),
    (r"8x7b|mixtral", ("mixtral", 4096, 32, 32, 8, 14336, 32000, _EIGHT)),
    (r"llama-?3(\.1)?-?405b", ("llama", 16384, 126, 128, 8, 53248, 128256, {})),
    (r"llama-?3(\.[13])?-?70b", ("llama", 8192, 80, 64, 8, 28672, 128256, {})),
    (r"llama-?3(\.1)?-?8b", ("llama", 4096, 32, 32, 8, 14336, 128256, {})),
    (r"llama-?3\.2-?3b", ("llama", 3072, 28, 24, 8, 8192, 128256, {"head_dim": 128})),
    (r"llama-?3\.2-?1b", ("llama", 2048, 16, 32, 8, 8192, 128256, {})),
    (r"llama-?2?-?70b", ("llama", 8192, 80, 64, 8, 28672, 32000, {})),
    (r"llama-?1?-?65b", ("llama", 8192, 80, 64, 64, 22016, 32000, {})),
    (r"llama-?[12]?-?3[03]b", ("llama", 6656, 60, 52, 52, 17920, 32000, {})),
    (r"llama-?2?-?13b", ("llama", 5120, 40, 40, 40, 13824, 32000, {})),
    (r"llama-?2?-?7b", ("llama", 4096, 32, 32, 32, 11008, 32000, {})),
    (r"mistral-?7b", ("llama", 4096, 32, 32, 8, 14336, 32000, {})),
    (r"qwen-?2(\.5)?-?72b", ("llama", 8192, 80, 64, 8, 29568, 152064, {})),
    (r"qwen-?2(\.5)?-?32b", ("llama", 5120, 64, 40, 8, 27648, 152064, {})),
    (r"qwen-?2(\.5)?-?14b", ("llama", 5120, 48, 40, 8, 13824, 152064, {})),
    (r"qwen-?2(\.5)?-?7b", ("llama", 3584, 28, 28, 4, 18944, 152064, {})),
    (r"qwen-?3-?32b", ("llama", 5120, 64, 64, 8, 25600, 151936, {"head_dim": 128})),
    (r"qwen-?3-?14b", ("llama", 5120, 40, 40, 8, 17408, 151936, {"head_dim": 128})),
    (r"qwen-?3-?8b", ("llama", 4096, 36, 32, 8, 12288, 151936, {})),
    (r"nemotron-?4-?340b", ("starcoder2", 18432, 96, 96, 8, 73728, 256000, {"head_dim": 192})),
    (r"nemotron-?4-?15b", ("starcoder2", 6144, 32, 48, 8, 24576, 256000, {})),
    (r"gpt-?3?-?175b", ("starcoder2", 12288, 96, 96, 96, 49152, 51200, {})),
    (r"bloom", ("starcoder2", 14336, 70, 112, 112, 57344, 250880, {})),
)  # fmt: skip
_PLAIN_TYPES = ("llama", "starcoder2")
_FIRST_DENSE, _FFN = "first_k_dense_replace", "intermediate_size"
_PREDICTING = 129280  # vocabulary
_NO_WINDOW = {"max_position_embeddings": 65536, "sliding_window": None}
# Fields of rows that replace those of a known model.
_OWN = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "vocab": "vocab_size",
}  # fmt: skip
# Vocabularies where the row gives none: GPT-2's and BERT's as Megatron pads them; the zero bubble
# fork of Megatron-LM trains with a SentencePiece tokenizer of 32,000.
_VOCABULARY = {"gpt": 50304, "bert": 30592, "zero bubble": 32000}


@dataclass(frozen=True)
class CapturedLayers:
    """A model with few layers, and how many it really has.

    Attributes:
        graph: Captured for one microbatch.
        num_layers: Of the whole model.
        dense_layers: Of these, the first ones that have no experts.
        extra_layers: Multi-token prediction layers.
    """

    graph: BlockGraph
    num_layers: int
    dense_layers: int
    extra_layers: int

    def layer(self, number: int) -> Block:
        """Return the block that stands for decoder layer ``number``."""
        layers = [block for block in self.graph.blocks if block.kind == "layer"]
        # The last one carries the final norm.
        return layers[0] if number < self.dense_layers else layers[-2]

    def blocks(self, *kinds: str) -> list[Block]:
        """Return the blocks of some kinds."""
        return [block for block in self.graph.blocks if block.kind in kinds]


def captured_layers(row: GpuRow) -> CapturedLayers:
    """Capture the model of a published run on the meta device.

    Raises:
        UnjudgedRowError: The row names no model that is known here and gives no sizes.
    """
    facts = _facts(row)
    if not number(row.raw, "seq"):
        raise UnjudgedRowError("the sequence length is not stated")
    dense = facts.get(_FIRST_DENSE, 0)
    note = str(row.raw.get("note") or "").lower()
    # Multi-token prediction is DeepSeek-V3's; the others of its type have none.
    predicted = facts["model_type"] == "deepseek_v3" and facts["vocab_size"] == _PREDICTING
    extra = int(predicted and "w/o mtp" not in note)
    adapters = "peft" in note or "lora" in note
    graph = _capture(
        tuple(sorted(facts.items())),
        row.sizes.micro_batch,
        number(row.raw, "seq") or 0,
        frozen=adapters,
    )
    return CapturedLayers(graph, facts["num_hidden_layers"], dense, extra)


def _facts(row: GpuRow) -> dict[str, Any]:
    """Return the config of a row's model: of its name, with the sizes that the row gives.

    Raises:
        UnjudgedRowError: The name is not known and the row does not give its sizes.
    """
    raw, name = row.raw, str(row.raw.get("model") or row.id).lower()
    given = all(number(raw, key) is not None for key in ("layers", "hidden", "heads"))
    found = known_config(f"{raw.get('hf_id') or ''} {name}")
    if found and (found["model_type"] not in _PLAIN_TYPES or not given):
        own = {key: size for field, key in _OWN.items() if (size := number(raw, field)) is not None}
        if found.get(_FIRST_DENSE, 0) > 1 and own.get("num_hidden_layers", 61) < 61:
            found[_FIRST_DENSE] = 1
        return found | own
    if not given:
        raise UnjudgedRowError(
            f"model {raw.get('model')!r} ({raw.get('hf_id')}) is not known here and the row gives "
            "no sizes"
        )
    if row.sizes.ep > 1:
        raise UnjudgedRowError(f"experts of {raw.get('model')!r}, which the row does not describe")
    return _given_sizes(raw, f"{name} {raw.get('source')}".lower())


def known_config(name: str) -> dict[str, Any]:
    """Return the config of a model by one of its names, as far as sizes go; empty: not known."""
    plain = re.sub(r"[_ ]", "-", name.lower())
    for pattern, (kind, hidden, layers, heads, kv_heads, ffn, vocab, more) in _MODELS:
        if re.search(pattern, plain):
            wide = "moe_intermediate_size" if "moe" in kind or "deepseek" in kind else _FFN
            return {
                "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                "vocab_size": vocab, _FFN: ffn, wide: ffn,
                **({} if kind != "starcoder2" else _NO_WINDOW), **more,
            }  # fmt: skip
    return {}


def _given_sizes(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    hidden, heads = number(raw, "hidden") or 0, number(raw, "heads") or 1
    if hidden % heads:
        raise UnjudgedRowError(f"hidden {hidden} does not divide into {heads} heads")
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": number(raw, "layers"),
        "num_attention_heads": heads,
        "intermediate_size": number(raw, "ffn") or 4 * hidden,
        "vocab_size": number(raw, "vocab") or _vocabulary(name),
    }
    kv_heads = number(raw, "kv_heads") or heads
    if "bert" in name:
        return {**sizes, "model_type": "bert", "max_position_embeddings": 8192}
    if "llama" in name or "qwen" in name or "mistral" in name:
        return {**sizes, "model_type": "llama", "num_key_value_heads": kv_heads}
    # GPT: layer norms, an MLP without gate; with grouped queries where the row says so.
    return {
        **sizes, **_NO_WINDOW, "model_type": "starcoder2", "num_key_value_heads": kv_heads,
    }  # fmt: skip


def _vocabulary(name: str) -> int:
    found = [size for part, size in _VOCABULARY.items() if part != "gpt" and part in name]
    return found[0] if found else _VOCABULARY["gpt"]


@cache
def _capture(
    facts: tuple[tuple[str, Any], ...], micro_batch: int, seq: int, *, frozen: bool
) -> BlockGraph:
    given = dict(facts)
    dense = min(1, given.get(_FIRST_DENSE, 0))
    if _FIRST_DENSE in given:
        given[_FIRST_DENSE] = dense
    given["num_hidden_layers"] = dense + 2
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    made = AutoModelForMaskedLM if config.model_type == "bert" else AutoModelForCausalLM
    with torch.device("meta"):
        build: Any = made.from_config
        model = build(config, dtype=torch.bfloat16)
        batch = {
            name: torch.zeros(micro_batch, seq, dtype=torch.long)
            for name in ("input_ids", "labels")
        }
    if frozen:  # adapters are small: only the gradients of activations are left
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
    return capture(model.train(), batch, self_check=False).graph
