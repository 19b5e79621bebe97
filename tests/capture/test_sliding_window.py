"""Attention under a sliding window is counted with the keys that the window leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.fused import attention_window
from ipu_pipeline.ir.attention import is_attention, unfused, visible_share

LENGTH, WINDOW = 32, 8
SIZES = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(("family", "layers"), [("mistral", 1), ("gemma3_text", 6)])
def test_a_sliding_window_leaves_its_share_of_the_weights(family: str, layers: int) -> None:
    places = torch.arange(LENGTH)
    apart = places[:, None] - places
    shares = {
        "sliding_attention": ((apart >= 0) & (apart < WINDOW)).double().mean().item(),
        "full_attention": 0.5,
    }
    config = AutoConfig.for_model(family, num_hidden_layers=layers, sliding_window=WINDOW, **SIZES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).train()
        ids = torch.zeros(2, LENGTH, dtype=torch.long)
    graph = capture(model, {"input_ids": ids, "labels": ids}, self_check=False).graph
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    for which in ("forward_ops", "backward_ops"):
        found = [op for b in graph.blocks for op in getattr(b, which) if is_attention(op)]
        assert [visible_share(op) for op in found] == pytest.approx([shares[k] for k in kinds])
    # Where no kernel fuses attention, the whole mask is added.
    first = next(op for op in graph.blocks[1].forward_ops if is_attention(op))
    (added,) = (op for op in unfused([first]) if op.name == "aten.add")
    assert added.shapes[1] == (LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("config", "attributes", "window"),
    [
        ({"sliding_window": 8}, {}, 8),
        ({"sliding_window": None}, {}, None),
        ({"sliding_window": 8}, {"sliding_window": 4}, 4),
        ({"sliding_window": 8}, {"is_causal": False}, None),  # keys on both sides
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, {}, None),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, {}, 8),
        ({"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]}, {}, None),
    ],
)
def test_a_window_is_read_by_transformers_names(
    config: dict[str, Any], attributes: dict[str, Any], window: int | None
) -> None:
    attention = nn.Linear(1, 1)
    for name, value in {"layer_idx": 1, "config": SimpleNamespace(**config), **attributes}.items():
        setattr(attention, name, value)
    assert attention_window(nn.Sequential(attention)) == window
    assert attention_window(nn.Linear(1, 1)) is None


def test_a_layer_with_a_config_of_its_own_is_asked_for_its_window() -> None:
    windows = {"per_layer_config": {1: {"sliding_window": 8}}}
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=4, **windows)
    attention = nn.Linear(1, 1)
    for layer, window in enumerate((4, 8)):
        vars(attention).update(layer_idx=layer, config=config)
        assert attention_window(attention) == window
