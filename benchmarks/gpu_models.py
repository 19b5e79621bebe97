"""Models of published GPU runs: configs from public facts, captured with few layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from benchmarks.gpu_rows import GpuRow, UnjudgedRowError
from ipu_pipeline.capture import capture
from ipu_pipeline.ir.graph import Block, BlockGraph

_DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "vocab_size": 129280, "num_hidden_layers": 61, "first_k_dense_replace": 3,
}  # fmt: skip
_QWEN = {
    "model_type": "qwen3_moe", "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936,
}  # fmt: skip
# config.json of the named repositories (public), as far as sizes go.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK,
    "moonshotai/Kimi-K2-Base": {
        **_DEEPSEEK, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "vocab_size": 163840, "first_k_dense_replace": 1,
    },
    "Qwen/Qwen3-235B-A22B": {
        **_QWEN, "hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536,
        "intermediate_size": 12288, "num_hidden_layers": 94,
    },
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN, "hidden_size": 2048, "num_attention_heads": 32, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "num_hidden_layers": 48,
    },
    # As a model whose attention is one operation: its sinks add nothing to the price.
    "openai/gpt-oss-120b": {
        **_QWEN, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "moe_intermediate_size": 2880, "intermediate_size": 2880,
        "num_experts_per_tok": 4, "num_hidden_layers": 36, "vocab_size": 201088,
    },
    "openai/gpt-oss-20b": {
        **_QWEN, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "moe_intermediate_size": 2880, "intermediate_size": 2880,
        "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "vocab_size": 201088,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "vocab_size": 32000,
    },
    "mistralai/Mixtral-8x22B-v0.1": {
        "model_type": "mixtral", "hidden_size": 6144, "num_attention_heads": 48,
        "num_key_value_heads": 8, "intermediate_size": 16384, "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 56, "vocab_size": 32768,
    },
}  # fmt: skip
_FIRST_DENSE = "first_k_dense_replace"
_MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
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
    if not row.raw.get("seq"):
        raise UnjudgedRowError("the sequence length is not stated")
    dense = facts.get(_FIRST_DENSE, 0)
    note = str(row.raw.get("note") or "").lower()
    predicted = facts["model_type"] == "deepseek_v3" and row.raw.get("hf_id") != (
        "moonshotai/Kimi-K2-Base"
    )
    extra = int(predicted and "w/o mtp" not in note)
    adapters = "peft" in note or "lora" in note
    graph = _capture(
        tuple(sorted(facts.items())), row.sizes.micro_batch, int(row.raw["seq"]), frozen=adapters
    )
    return CapturedLayers(graph, facts["num_hidden_layers"], dense, extra)


def _facts(row: GpuRow) -> dict[str, Any]:
    raw, name = row.raw, str(row.raw.get("model") or row.id).lower()
    found = PUBLISHED.get(str(raw.get("hf_id")))
    if found is None and "mixtral" in name:
        found = PUBLISHED[_MIXTRAL]
    if found is None and "deepseekv3" in name.replace("-", ""):
        found = {**_DEEPSEEK, "num_hidden_layers": int(raw.get("layers") or 61)}
        if found["num_hidden_layers"] < 61:
            found[_FIRST_DENSE] = 1
    if found is not None:
        return dict(found)
    if raw.get("layers") is None or raw.get("hidden") is None or raw.get("heads") is None:
        raise UnjudgedRowError(
            f"model {raw.get('model')!r} ({raw.get('hf_id')}) is not known here and the row gives "
            "no sizes"
        )
    return _given_sizes(raw, f"{name} {raw['source']}".lower())


def _given_sizes(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    heads, hidden = int(raw["heads"]), int(raw["hidden"])
    if hidden % heads:
        raise UnjudgedRowError(f"hidden {hidden} does not divide into {heads} heads")
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": int(raw["layers"]),
        "num_attention_heads": heads,
        "intermediate_size": int(raw.get("ffn") or 4 * hidden),
        "vocab_size": int(raw.get("vocab") or _vocabulary(name)),
    }
    kv_heads = int(raw.get("kv_heads") or heads)
    if "bert" in name:
        return {**sizes, "model_type": "bert", "max_position_embeddings": 8192}
    if "llama" in name or "qwen" in name or "mistral" in name:
        return {**sizes, "model_type": "llama", "num_key_value_heads": kv_heads}
    # GPT: layer norms, an MLP without gate; with grouped queries where the row says so.
    return {
        **sizes, "model_type": "starcoder2", "num_key_value_heads": kv_heads,
        "max_position_embeddings": 65536, "sliding_window": None,
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
