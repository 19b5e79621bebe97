"""The cache of every stage, as predicted and as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.calls import kv_cache_bytes
from tests.backends.cluster.jobs import built
from tools.coverage.rank_threads import on_threads

NEW = 6


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_stage_keeps_what_is_predicted(name: str) -> None:
    """Of its own layers only; the last token is not yet in the cache."""
    model, plan, batch = built(name, num_stages=2)
    given = {n: batch[n] for n in ("input_ids", "attention_mask") if n in batch}
    kept: dict[int, Any] = {}

    def call(own: Any) -> int:
        own.register_forward_hook(
            lambda _, args, output: kept.__setitem__(id(own), output.past_key_values)
        )
        own.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
        return id(own)

    samples, prompt = batch["input_ids"].shape
    is_decoder = not model.config.is_encoder_decoder
    length = (prompt if is_decoder else 1) + NEW - 1
    expected = kv_cache_bytes(model, plan, samples, length, 0 if is_decoder else prompt)
    found = [_held(kept[key]) for key in on_threads(model, plan, call)]
    assert found == list(expected)
    assert min(expected) > 0 or not is_decoder


def _tensors(cache: Any) -> list[Any]:
    caches = [cache] if hasattr(cache, "layers") else []
    caches += [getattr(cache, n) for n in ("self_attention_cache", "cross_attention_cache")
               if hasattr(cache, n)]  # fmt: skip
    return [t for c in caches for layer in c.layers for t in (layer.keys, layer.values)]


def _held(cache: Any) -> int:
    """Bytes of what a rank has of a cache."""
    return sum(t.value.nbytes for t in _tensors(cache) if not t.value.is_meta)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
WIDE = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 4, "first_k_dense_replace": 3}  # fmt: skip
BOTH = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
        "decoder_attention_heads": 4, "vocab_size": 40}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Llama", {**WIDE, "num_key_value_heads": 4}),
        ("Llama", {**WIDE, "head_dim": 8}),
        ("Mistral", {**WIDE, "sliding_window": 6}),
        ("Gemma2", {**WIDE, "head_dim": 4, "sliding_window": 6}),
        ("Falcon", {**SMALL}),
        ("Falcon", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}),
        ("DeepseekV3", {**WIDE, "num_key_value_heads": 4, **LATENT}),
        ("Bart", BOTH),
    ],
)
def test_every_kind_of_attention(kind: str, config: dict[str, Any]) -> None:
    """Many heads, few, one or latents; windows; keys and values of an encoder."""
    name = f"{kind}ForConditionalGeneration" if config is BOTH else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**config)).eval()
    ids = torch.randint(3, 40, (3, 5))
    found = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                           return_dict_in_generate=True)  # fmt: skip
    whole: Any = SimpleNamespace(stages=[SimpleNamespace(blocks=["all"])],
                                 graph={"all": SimpleNamespace(module="")})  # fmt: skip
    length = found.sequences.shape[1] - 1
    expected = sum(t.nbytes for t in _tensors(found.past_key_values))
    assert kv_cache_bytes(model, whole, 3, length, 5) == (expected,)


def test_what_is_not_keys_and_values_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    _, plan, _ = built("llama", num_stages=2)
    with pytest.raises(LoweringError, match="which is not made of keys and values alone; measure"):
        kv_cache_bytes(model, plan, 1, 4)
