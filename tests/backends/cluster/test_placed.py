"""The model's own code on ranks: threads, in whose models the weights of others are NaN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.backends.cluster.jobs import built
from tools.coverage.rank_threads import on_threads

LENGTHS = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "gpt2-lm": {"num_beams": 3, "num_return_sequences": 2},
    "t5": {"num_beams": 2},
    "mixtral": {},
}


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "input_features")
    return {name: batch[name] for name in names if name in batch}


@pytest.mark.parametrize("name", WAYS)
def test_tokens_and_scores_are_those_of_the_model_alone(name: str) -> None:
    """Beams, an encoder that runs once, and experts whose tokens are counted."""
    model, plan, batch = built(name, num_stages=4)
    options = {**LENGTHS, **WAYS[name], "return_dict_in_generate": True, "output_scores": True}

    def call(own: Any) -> Any:
        return own.generate(**_inputs(batch), do_sample=False, **options)

    before = [len(module._forward_hooks) for module in model.modules()]
    expected = call(copy.deepcopy(model).eval())
    for found in on_threads(model, plan, call):
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert "past_key_values" not in found
    assert [len(module._forward_hooks) for module in model.modules()] == before
