"""Models with large tables, plans that serialize them, and gradients to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from tests.tiny_models import TINY, TinyModel

MICROBATCHES = 4
VOCAB = 99
# The serialized blocks of each model: lookups first, the projection last.
MODELS: dict[str, tuple[TinyModel, tuple[str, ...]]] = {
    "gpt2 (tied)": (TINY["gpt2-lm"], ("transformer.wte", "lm_head")),
    "bert-mlm (tied)": (TINY["bert-mlm"], ("bert.embeddings", "cls")),
    "t5 (tied)": (TINY["t5"], ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    "bart (tied, buffer added)": (
        TINY["bart"],
        ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
    "mt5 (untied)": (
        replace(TINY["t5"], make=transformers.MT5Config),
        ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    ),
    "llama (untied)": (TINY["llama"], ("model.embed_tokens", "lm_head")),
    "llama (tied)": (
        replace(TINY["llama"], options={**TINY["llama"].options, "tie_word_embeddings": True}),
        ("model.embed_tokens", "lm_head"),
    ),
    "gemma2 (capped logits)": (
        replace(
            TINY["llama"],
            make=transformers.Gemma2Config,
            options={**TINY["llama"].options, "head_dim": 8, "final_logit_softcapping": 2.0},
        ),
        ("model.embed_tokens", "lm_head"),
    ),
}


def built(
    name: str, *, dropout: bool = False, **changes: Any
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Return the model, an example microbatch, a batch of four, and the blocks to serialize."""
    tiny, blocks = MODELS[name]
    tiny = replace(tiny, options={**tiny.options, **changes})
    model, example = tiny.build(dropout=dropout)
    return model, example, tiny.batch(batch_size=2 * MICROBATCHES, seed=3), blocks


def serialized(plan: ipp.Plan, factors: dict[str, int]) -> ipp.Plan:
    """Return ``plan`` with these slices by block."""
    stages = (
        replace(stage, serialize={b: factors[b] for b in stage.blocks if b in factors})
        for stage in plan.stages
    )
    return replace(plan, stages=tuple(stages))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients out of ``model``."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def eager(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of plain torch for the whole batch."""
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.item(), gradients(model)


def assert_equal_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """Every gradient is dense and within ``tolerance`` of the largest one."""
    assert set(found) == set(expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for fqn, gradient in expected.items():
        assert not found[fqn].is_sparse
        torch.testing.assert_close(found[fqn], gradient, rtol=0, atol=tolerance * scale, msg=fqn)


class Reader(nn.Module):
    """A small language model whose way from the logits to the loss is given.

    Args:
        loss: From (logits of shape batch x length x classes, labels, model) to the loss.
        classes: Rows of the table.
        bias: Whether the projection has one.
    """

    def __init__(self, loss: Any, *, classes: int = 50, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 8, padding_idx=3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, classes, bias=bias)
        self.register_buffer("class_weight", torch.linspace(0.5, 2, classes))
        self.loss = loss

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        return {"loss": self.loss(logits, labels, self), "logits": logits}


def reader(loss: Any, **options: Any) -> tuple[Reader, dict[str, Tensor], dict[str, Tensor]]:
    """Return the model, an example microbatch and a batch; ignored labels included."""
    torch.manual_seed(0)
    model = Reader(loss, **options)
    classes = model.embed.num_embeddings
    ids = torch.randint(0, classes, (2 * MICROBATCHES, 6))
    ids[:, 1] = 3
    labels = torch.randint(0, classes, ids.shape)
    labels[:, 2] = -100
    batch = {"ids": ids, "labels": labels}
    return model, {name: value[:2] for name, value in batch.items()}, batch
