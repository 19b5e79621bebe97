"""One model has one graph: captured without weights and with them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.ir.graph import BlockGraph
from tests.capture.toys import batch, toy
from tests.later import now, one_in
from tests.tiny_models import TINY
from tools.coverage.tiny_config import tiny_config

# DeBERTa's loss reads values, which there are none of without weights.
KNOWN = [name for name in TINY if name != "deberta-v2"]
MORE = {
    "albert": "masked-lm", "electra": "question-answering", "distilbert": "masked-lm",
    "mpnet": "masked-lm", "camembert": "masked-lm", "xlm-roberta": "token-classification",
    "opt": "causal-lm", "bloom": "causal-lm", "gpt_neo": "causal-lm", "gpt_neox": "causal-lm",
    "gptj": "causal-lm", "falcon": "causal-lm", "mistral": "causal-lm", "qwen2": "causal-lm",
    "gemma": "causal-lm", "phi": "causal-lm", "pegasus": "seq2seq-lm", "plbart": "seq2seq-lm",
    "mt5": "seq2seq-lm", "convnextv2": "image-classification", "beit": "image-classification",
}  # fmt: skip


def graph(model_type: str, task: str, device: str) -> BlockGraph:
    config = tiny_config(type(transformers.AutoConfig.for_model(model_type)))
    model, inputs = from_config(config, task, batch_size=2, seq_length=16, device=device)
    return capture(model, inputs, self_check=False).graph


# What is computed without dropout is computed with it, too.
@pytest.mark.parametrize(
    ("name", "dropout"),
    now(product(("gpt2-lm", "lxmert-qa", "t5", "mixtral"), [True]), product(KNOWN, [True, False])),
)
def test_known_architectures(name: str, dropout: bool) -> None:
    found = [
        capture(*TINY[name].build(device=device, dropout=dropout), self_check=False).graph
        for device in ("cpu", "meta")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("model_type", one_in(6, MORE))
def test_more_architectures(model_type: str) -> None:
    found = [graph(model_type, MORE[model_type], device) for device in ("cpu", "meta")]
    assert found[0] == found[1]


def attention_names(found: BlockGraph) -> set[str]:
    operations = [op for b in found.blocks for op in (*b.forward_ops, *b.backward_ops)]
    return {op.name for op in operations if "attention" in op.name or "softmax" in op.name}


def test_attention_is_one_operation_with_dropout_and_with_a_learned_bias() -> None:
    fused = "aten.scaled_dot_product_attention"
    loss = {"aten._log_softmax", "aten._log_softmax_backward_data"}
    for name, dropout, suffix in (
        ("llama", False, ""), ("gpt2-lm", True, "_dropout"), ("t5", False, "_bias"),
    ):  # fmt: skip
        found = attention_names(capture(*TINY[name].build(dropout=dropout), self_check=False).graph)
        assert {f"{fused}{suffix}", f"{fused}{suffix}_backward"} <= found
        assert not {op for op in found - loss if "softmax" in op}


def test_eager_attention_stays_the_models_own_operations() -> None:
    config = TINY["llama"].config(attn_implementation="eager")
    model, inputs = from_config(config, "causal-lm", batch_size=2, seq_length=16, device="cpu")
    assert "aten._softmax" in attention_names(capture(model, inputs, self_check=False).graph)


class Attending(nn.Module):
    """8 queries and keys of 4 in 2 heads, through torch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_inside_torchs_multi_head_attention_is_found() -> None:
    def body(self: Any, x: Any) -> Any:
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    inputs = batch(x=torch.ones(1, 8, 4))
    (op,) = [
        op for op in capture(toy(body, Attending), inputs).graph.blocks[0].forward_ops
        if "attention" in op.name
    ]  # fmt: skip
    assert op.shapes == ((1, 2, 8, 2),) * 3
    assert op.flops == 2 * 2 * (2 * 8 * 8 * 2)
    assert op.bytes_moved == 4 * (4 * (2 * 8 * 2) + 2 * 8)  # q, k, v, result; logsumexp


def test_what_a_fused_kernel_keeps() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Any) -> Any:
            q, k, v = (x * self.scale for _ in range(3))
            return functional.scaled_dot_product_attention(q, k, v)

    def body(self: Any, x: Any) -> Any:
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    first = capture(toy(body, Heads), batch(x=torch.ones(2, 3, 16, 8))).graph.blocks[0]
    heads = 2 * 3 * 16 * 8 * 4
    assert first.saved_bytes == 4 * heads + 2 * 3 * 16 * 4  # q, k, v, result; logsumexp
