"""The cache of every stage, as predicted and as it is."""

from __future__ import annotations

from typing import Any

import pytest
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


def _held(cache: Any) -> int:
    """Bytes of what a rank has of a cache."""
    caches = [cache] if hasattr(cache, "layers") else []
    caches += [getattr(cache, n) for n in ("self_attention_cache", "cross_attention_cache")
               if hasattr(cache, n)]  # fmt: skip
    tensors = [t for c in caches for layer in c.layers for t in (layer.keys, layer.values)]
    return sum(t.value.nbytes for t in tensors if not t.value.is_meta)


def test_what_is_not_keys_and_values_is_refused() -> None:
    config = transformers.MambaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, state_size=4
    )
    model = transformers.MambaForCausalLM(config)
    _, plan, _ = built("llama", num_stages=2)
    with pytest.raises(LoweringError, match="which is not made of keys and values alone; measure"):
        kv_cache_bytes(model, plan, 1, 4)
