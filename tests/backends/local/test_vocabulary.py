"""A vocabulary spread over stages: what unsplit models compute, in every schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from transformers.modeling_outputs import CausalLMOutput

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.planner.options.tables import fused_heads
from tests.backends.local.helpers import assert_equals_eager, planned
from tests.later import in_turn
from tests.tiny_models import TINY, TinyModel
from tests.versions import OLDER

GEMMA = TinyModel(
    transformers.Gemma2Config,
    "causal-lm",
    {**TINY["llama"].options, "head_dim": 8, "final_logit_softcapping": 5.0,
     "query_pre_attn_scalar": 8},
    {},
)  # fmt: skip
MT5 = TinyModel(
    transformers.MT5Config, "seq2seq-lm", {**TINY["t5"].options, "tie_word_embeddings": False},
    {"dropout_rate": 0.0},
)  # fmt: skip
MODELS = {
    **{name: TINY[name] for name in ("gpt2-lm", "llama", "t5", "bart", "bert-mlm")},
    "gemma2": GEMMA,
    "mt5": MT5,
}
WAYS: dict[str, tuple[int, Any]] = {
    "1f1b": (2, "even"),
    "gpipe": (4, [0, 1, 3, 2]),
    "interleaved": (4, "even"),
    "zbv": (4, "even"),
}


@pytest.mark.parametrize(("name", "schedule"), in_turn(MODELS, tuple(WAYS)))
def test_loss_and_every_gradient_equal_eager(name: str, schedule: str) -> None:
    if OLDER and (name, schedule) == ("bart", "zbv"):
        pytest.skip("it draws its LayerDrop in every layer before transformers 5.21")
    num_stages, shares = WAYS[schedule]
    model, example = MODELS[name].build()
    plan = ipp.plan(model, example, num_stages=num_stages, microbatches=4, vocabulary=shares)
    batch = MODELS[name].build(batch_size=8, seed=3)[1]
    assert_equals_eager(model, plan, batch, schedule=schedule)


def curve(vocabulary: Any, num_stages: int = 2, **options: Any) -> list[float]:
    """Train a tied model with dropout, of which one microbatch is short."""
    model, _ = TINY["gpt2-lm"].build(dropout=True)
    plan = planned(
        "gpt2-lm", dropout=True, num_stages=num_stages, microbatches=4, vocabulary=vocabulary
    )
    batch = TINY["gpt2-lm"].build(batch_size=7, seed=3)[1]
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with ipp.compile(
        model, plan, optimizer=optimizer, self_check=False, max_grad_norm=0.5, **options
    ) as executable:
        steps = [executable.train_step(batch) for _ in range(3)]
    return [value for step in steps for value in (step.loss, step.grad_norm)]


def test_curves_with_dropout_and_clipping_are_equal() -> None:
    plain, spread = curve(None), curve("even")
    assert spread == pytest.approx(plain, rel=1e-5)
    assert curve("even") == spread, "the same bits every time"
    assert curve((1, 0, 2), num_stages=3, recompute="all") == pytest.approx(plain, rel=1e-5)
    assert curve("even", sequential=True) == spread
    narrow = curve("even", precision="bf16")
    assert narrow == pytest.approx(curve(None, precision="bf16"), rel=2e-2)


def test_evaluation_and_checkpoints_know_nothing_of_it(tmp_path) -> None:
    model, _ = TINY["gpt2-lm"].build()
    batch = TINY["gpt2-lm"].build(batch_size=4, seed=3)[1]
    with torch.no_grad():
        expected = model.eval()(**batch)
    model.train()
    plan = planned("gpt2-lm", num_stages=2, microbatches=2, vocabulary="even")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with ipp.compile(model, plan, optimizer=optimizer, self_check=False) as executable:
        found = executable.eval_step(batch)
        torch.testing.assert_close(found.outputs["logits"], expected.logits)
        executable.train_step(batch)
        executable.save_checkpoint(tmp_path / "one")
        after = executable.forward_backward(batch)
    other, _ = TINY["gpt2-lm"].build(seed=5)
    whole = planned("gpt2-lm", num_stages=3, microbatches=2)
    optimizer = AdamW(other.parameters(), lr=1e-3)
    with ipp.compile(other, whole, optimizer=optimizer, self_check=False) as executable:
        executable.load_checkpoint(tmp_path / "one")
        assert executable.forward_backward(batch) == pytest.approx(after, rel=1e-6)


class Reading(nn.Module):
    """A model whose code between the blocks reads what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 40)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        scale = 2.0 if float(hidden.detach().sum()) > 1e9 else 1.0
        logits = self.head(hidden * scale)
        return {"loss": functional.cross_entropy(logits.view(-1, 40), labels.view(-1))}


class WithZLoss(nn.Module):
    """A model that keeps the normaliser of its softmax small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        logits = self.head(hidden).float()
        loss = functional.cross_entropy(logits.view(-1, 40), labels.view(-1), label_smoothing=0.1)
        return CausalLMOutput(loss + 0.1 * (logits.logsumexp(-1) ** 2).mean(), logits)  # type: ignore[arg-type]


def test_a_z_loss() -> None:
    batch = {name: torch.arange(16).reshape(8, 2) * 3 % 40 for name in ("ids", "labels")}
    model = WithZLoss()
    example = {name: value[:2] for name, value in batch.items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=4, vocabulary="even")
    assert_equals_eager(model, plan, batch)
    assert not fused_heads(plan.graph, ["head"])  # slices of tokens do without it
    assert len(fused_heads(plan.graph, ["head"], in_parts=True)) > 0


def test_glue_that_waits_is_refused() -> None:
    batch = {name: torch.arange(8).reshape(4, 2) % 40 for name in ("ids", "labels")}
    model = Reading()
    example = {name: value[:2] for name, value in batch.items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=2, vocabulary="even")
    with (
        ipp.compile(model, plan, self_check=False) as executable,
        pytest.raises(LoweringError, match="waits for values that they compute, and a loss"),
    ):
        executable.forward_backward(batch)


def test_schedules_in_lock_step_are_refused() -> None:
    model, _ = TINY["gpt2-lm"].build()
    plan = planned("gpt2-lm", num_stages=2, microbatches=4, vocabulary="even")
    with pytest.raises(LoweringError, match="leaves no place for the passes of a vocabulary"):
        ipp.compile(model, plan, schedule="popart")
