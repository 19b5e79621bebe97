"""The model in one piece, in a plain torch loop: what the split one is compared with.

No capture, plan, stages or checkpoints; batches, optimizer, schedule and clipping are those of the
split run, and with the same seed it starts from the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import typer
from torch import Tensor, nn

from ipu_pipeline.stages.executable import EvalResult
from ipu_pipeline.train import TrainingArguments, build_optimizer, build_scheduler
from ipu_pipeline.train.data import build_collator, train_batches
from tasks.visual_question_answering import VisualQuestionAnsweringDataset


class Unsplit:
    """A model with the two methods that an evaluation and the saving of a model ask for.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def eval_step(self, batch: Mapping[str, Tensor]) -> EvalResult:
        """Run the model in evaluation mode without gradients."""
        self.model.eval()
        with torch.no_grad():
            output = self.model(**batch)
        scores = {"question_answering_score": output.question_answering_score}
        return EvalResult(output.loss.item(), scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the model's weights."""
        return self.model.state_dict()

    def close(self) -> None:
        """Do nothing: there are no threads."""


def train_unsplit(
    model: nn.Module, dataset: VisualQuestionAnsweringDataset, arguments: TrainingArguments
) -> dict[str, float]:
    """Train; return ``train_loss``, ``train_runtime`` (s) and ``train_samples_per_second``.

    An optimizer step reads the samples of all its microbatches at once.
    """
    loader = train_batches(dataset, arguments, build_collator(model, arguments), divisor=1)
    optimizer = build_optimizer(model, arguments)
    num_steps = arguments.max_steps
    if num_steps < 0:
        num_steps = math.ceil(arguments.num_train_epochs * len(loader))
    scheduler = build_scheduler(optimizer, arguments, num_steps)
    start_s, losses, num_samples = time.time(), [], 0
    model.train()
    while len(losses) < num_steps:
        for batch in loader.batches(len(losses) // len(loader)):
            loss = model(**batch).loss
            loss.backward()
            if arguments.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            num_samples += len(batch["labels"])
            if len(losses) % arguments.logging_steps == 0:
                recent = losses[-arguments.logging_steps :]
                typer.echo(f"step {len(losses)}: loss {sum(recent) / len(recent):.4f}")
            if len(losses) == num_steps:
                break
    runtime_s = time.time() - start_s
    return {
        "train_loss": sum(losses) / len(losses),
        "train_runtime": runtime_s,
        "train_samples_per_second": num_samples / runtime_s,
    }
