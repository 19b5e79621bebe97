"""Mixtures of experts: what a layer keeps and computes is counted, not copies of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.fused import grouped_without_values
from ipu_pipeline.capture.patches import fused_sinks
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import Block
from tests.later import every_second

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPS = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"intermediate_size": 48, "moe_intermediate_size": 48}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "num_key_value_heads": 4, "n_routed_experts": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8, **GROUPS, "intermediate_size": 48},
    "Qwen3Moe": {"num_experts": 8, **GROUPS, **EXPERTS},
    "GptOss": {"num_local_experts": 8, **GROUPS, "intermediate_size": 48},
    "Olmoe": {"num_experts": 8, "num_key_value_heads": 4, "intermediate_size": 48},
    "DeepseekV3": {**LATENT, **EXPERTS},
}


def build(family: str, device: str = "cpu", **more: Any) -> tuple[Any, dict[str, Tensor]]:
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | more)
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config).train()
        ids = torch.randint(0, 64, (1, 48))
    return model, {"input_ids": ids, "labels": ids.clone()}


def blocks(model: Any, inputs: dict[str, Tensor]) -> list[Block]:
    return list(capture(model, inputs, self_check=False).graph.blocks)


def kept_bytes(model: Any, inputs: dict[str, Tensor], layer: Any) -> int:
    """Bytes that autograd keeps for the backward pass of ``layer``, without what enters it."""
    apart = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}
    inside: list[Any] = []

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        entering = tree_leaves((args, kwargs))
        apart.update(t.untyped_storage()._cdata for t in entering if isinstance(t, Tensor))
        inside.append(layer)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage._cdata not in apart:
            found[storage._cdata] = storage
        return tensor

    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(
    ("family", "experts"),
    every_second([*((family, "grouped_mm") for family in FAMILIES), ("Mixtral", "batched_mm")]),
)
def test_what_a_layer_keeps_is_what_autograd_keeps(family: str, experts: str) -> None:
    model, inputs = build(family, experts_implementation=experts)
    model = model.to(torch.bfloat16)
    planned = next(block for block in blocks(model, inputs) if block.module == "model.layers.0")
    real = kept_bytes(model, inputs, model.model.layers[0])
    assert planned.saved_bytes == pytest.approx(real, rel=0.1)


def test_attention_with_sinks_is_one_operation_for_prices() -> None:
    model, inputs = build("GptOss", "meta", sliding_window=8)
    plain = blocks(model, inputs)
    with fused_sinks(model):
        fused = blocks(model, inputs)
    for one, other, window in zip(plain[1:3], fused[1:3], (8, 48), strict=True):
        assert not any(map(is_attention, (*one.forward_ops, *one.backward_ops)))
        (attention,) = filter(is_attention, other.forward_ops)
        assert attention.shapes[3] == (48, window)
        assert other.saved_bytes < one.saved_bytes
    with fused_sinks(build("Mixtral", "meta")[0]):
        assert blocks(model, inputs) == plain  # other models are left alone


@pytest.mark.parametrize("family", every_second(FAMILIES))
def test_one_graph_with_weights_and_without(family: str) -> None:
    found = [capture(*build(family, device), self_check=False).graph for device in ("cpu", "meta")]
    assert found[0] == found[1]


def test_as_many_multiplications_as_rows_meet_experts() -> None:
    grouped = [
        [op for op in ops if op.name == "aten._grouped_mm"]
        for block in blocks(*build("Mixtral"))
        if "layers" in block.name
        for ops in (block.forward_ops, block.backward_ops)
    ]
    rows, up, down = 48 * 2, 32 * 2 * 48, 48 * 32
    forward = 2 * rows * (up + down)
    assert [sum(op.flops * op.count for op in ops) for ops in grouped] == [forward, 2 * forward] * 2
    twice = blocks(*build("Mixtral", num_local_experts=16))
    assert sum(b.forward_flops for b in twice if "layers" in b.name) < 1.1 * sum(
        b.forward_flops for b in blocks(*build("Mixtral")) if "layers" in b.name
    )


def test_more_experts_keep_no_more() -> None:
    few, many = (
        sum(block.saved_bytes for block in blocks(*build("Qwen3Moe", num_experts=n)))
        for n in (8, 64)
    )
    assert many < 1.2 * few


def test_products_of_other_forms_are_left_alone() -> None:
    left, right = torch.randn(3, 4, 8), torch.randn(3, 8, 16)
    with grouped_without_values():
        found = torch.nn.functional.grouped_mm(left, right)
        rows = torch.nn.functional.grouped_mm(
            left[0], right, offs=torch.tensor([1, 2, 4], dtype=torch.int32)
        )
    torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)
    assert rows.shape == (4, 16)
    assert not rows.any()
