"""Scores of a model, and of the trivial baseline, on the same batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ipu_pipeline.stages.executable import EvalResult, Executable
from ipu_pipeline.train import TrainingArguments, evaluate_loop
from tasks.features import EncodedDataset, Setup
from tasks.scores import Predict, Scores
from tasks.table import Task


def evaluate_task(
    task: Task,
    executable: Executable,
    data: EncodedDataset,
    arguments: TrainingArguments,
    setup: Setup,
) -> dict[str, Any]:
    """Return the loss and the scores of every sample, each with the prefix ``eval_``."""
    output = evaluate_loop(
        executable, data, arguments, collate_fn=task.collator(setup), measure=task.measure
    )
    found = task.metrics(output.outputs, setup)
    scores = {f"eval_{name}": value for name, value in found.items()}
    return output.metrics | scores | {"eval_samples": output.num_samples}


def baseline_scores(
    task: Task,
    model: nn.Module,
    train: EncodedDataset,
    data: EncodedDataset,
    arguments: TrainingArguments,
    setup: Setup,
) -> Scores:
    """Return the scores of the trivial answer that the training data suggests.

    Args:
        task: Its ``fit_baseline`` is asked.
        model: Says which columns a batch has; it is not run.
        train: What the baseline learns from.
        data: What it is scored on.
        arguments: Batch sizes and seed: the batches are those of :func:`evaluate_task`.
        setup: As in :func:`evaluate_task`.
    """
    predict = task.fit_baseline(train, setup)
    output = evaluate_loop(
        cast(Executable, _Baseline(model, predict)),
        data,
        arguments,
        collate_fn=task.collator(setup),
        measure=task.measure,
    )
    return task.metrics(output.outputs, setup)


@dataclass(frozen=True)
class _Baseline:
    """Answers batches as an executable does."""

    model: nn.Module
    predict: Predict

    def eval_step(self, batch: Mapping[str, Tensor]) -> EvalResult:
        return EvalResult(None, self.predict(batch))
