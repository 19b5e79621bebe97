"""Rows that hold several documents are masked as the model masks them: with a cache, without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ipu_pipeline.capture import capture

FAMILIES = {"Llama": {}, "Qwen2": {}, "Mistral": {"sliding_window": 4}, "Qwen3": {"head_dim": 8}}
PACKED = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        **FAMILIES[family], **more,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).train()


def row(positions: list[int]) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + len(positions))[None] % 7 + 3
    return {"input_ids": ids, "position_ids": torch.tensor([positions]), "labels": ids.clone()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False, "by argument"])
def test_packed_and_other_rows(family: str, use_cache: Any) -> None:
    model = build(family, use_cache=use_cache is True or use_cache == "by argument")
    more = {"use_cache": False} if use_cache == "by argument" else {}
    rows = [list(range(12)), *PACKED]
    captured = capture(model, {**row(PACKED[0]), **more})
    for positions in rows:
        inputs = {**row(positions), **more}
        expected = model(**inputs).loss.item()
        assert captured.run(inputs)["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert model.config.use_cache is (use_cache is not False)


def test_a_cache_that_the_capture_switched_off_prints_as_false() -> None:
    from ipu_pipeline.capture.patches import tracing_patches

    model = build("Llama", use_cache=True)
    with tracing_patches(model):
        assert not model.config.use_cache
        assert repr(model.config.use_cache) == "False"
    assert model.config.use_cache is True
