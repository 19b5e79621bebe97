"""Outputs of an executable over a data set; scores of a task, and of its trivial baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import find_batch_size, torch_pad_and_concatenate
from transformers.trainer_utils import speed_metrics

from ipu_pipeline.stages.executable import EvalResult, Executable
from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.data import BatchLoader, Collator, EpochBatches, build_collator
from tasks.features import EncodedDataset, Setup
from tasks.packing import STARTS, PackedDataset, unpacked
from tasks.scores import Predict, Scores
from tasks.table import Task

Measure = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class EvalOutput:
    """What an evaluation computed.

    Attributes:
        loss: Mean over the samples; ``None`` when the data holds no labels.
        outputs: The model's outputs by name, all samples joined on axis 0 in the data's order.
            Where lengths differ between batches, axis 1 is padded with -100.
        num_samples: Samples evaluated.
        metrics: ``eval_loss``, ``eval_runtime`` and speeds.
    """

    loss: float | None
    outputs: dict[str, Tensor]
    num_samples: int
    metrics: dict[str, Any] = field(default_factory=dict)


def evaluate_loop(
    executable: Executable,
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    *,
    collate_fn: Collator | None = None,
    measure: Measure | None = None,
) -> EvalOutput:
    """Evaluate every sample of ``dataset`` once, in order.

    A batch is ``per_device_eval_batch_size * gradient_accumulation_steps * replicas`` samples;
    the last one is whatever is left. Its loss weighs as many samples as it has.

    Args:
        executable: Runs ``eval_step``.
        dataset: Samples with or without labels, perhaps several in a row.
        arguments: Batch sizes and workers are read.
        collate_fn: As in ``train``.
        measure: Called with the outputs and the batch; what it returns (axis 0: samples) is kept
            in place of the outputs, such as a few numbers in place of logits over a vocabulary.
    """
    start_s = time.time()
    collator = build_collator(executable.model, arguments, collate_fn)
    size = arguments.per_device_eval_batch_size * arguments.samples_divisor
    sampler = EpochBatches(len(dataset), size, seed=arguments.seed, shuffle=False)  # type: ignore[arg-type]
    loader = BatchLoader(dataset, sampler, collator, arguments.dataloader_num_workers)
    losses: list[tuple[float, int]] = []
    parts: dict[str, list[Tensor]] = {}
    num_samples = 0
    for batch in loader.batches():
        result = executable.eval_step(batch)
        outputs: Mapping[str, Tensor] = result.outputs
        if STARTS in batch:
            outputs, batch = unpacked(outputs, batch)
        size = find_batch_size(batch)
        num_samples += size
        if result.loss is not None:
            losses.append((result.loss, size))
        outputs = outputs if measure is None else measure(outputs, batch)
        for name, tensor in outputs.items():
            if tensor.ndim:
                parts.setdefault(name, []).append(tensor.detach().cpu())
    loss = math.fsum(x * n for x, n in losses) / sum(n for _, n in losses) if losses else None
    metrics = {} if loss is None else {"eval_loss": loss}
    metrics |= speed_metrics("eval", start_s, num_samples=num_samples, num_steps=len(loader))
    joined = {name: _joined(tensors) for name, tensors in parts.items()}
    if isinstance(dataset, PackedDataset):
        joined = {name: dataset.in_order(values) for name, values in joined.items()}
    return EvalOutput(loss, joined, num_samples, metrics)


def _joined(tensors: list[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    joined: Tensor = reduce(torch_pad_and_concatenate, tensors)
    return joined


def evaluate_task(
    task: Task,
    executable: Executable,
    data: EncodedDataset | PackedDataset,
    arguments: TrainingArguments,
    setup: Setup,
    collate_fn: Collator | None = None,
) -> dict[str, Any]:
    """Return the loss and the scores of every sample, each with the prefix ``eval_``."""
    collate_fn = collate_fn or task.collator(setup)
    output = evaluate_loop(executable, data, arguments, collate_fn=collate_fn, measure=task.measure)
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
