"""Evaluation over a data set: mean loss and joined outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import find_batch_size, torch_pad_and_concatenate
from transformers.trainer_utils import speed_metrics

from ipu_pipeline.targets.base import Executable
from ipu_pipeline.training.arguments import TrainingArguments
from ipu_pipeline.training.data import Collator, build_collator, eval_batches


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
    tokenizer: Any = None,
    on_step: Callable[[], None] | None = None,
) -> EvalOutput:
    """Evaluate every sample of ``dataset`` once, in order.

    A batch is ``per_device_eval_batch_size * gradient_accumulation_steps * replicas`` samples;
    the last one is whatever is left. Its loss weighs as many samples as it has.

    Args:
        executable: Runs ``eval_step``.
        dataset: Samples with or without labels.
        arguments: Batch sizes, workers and ``prediction_loss_only`` are read.
        collate_fn: As in ``train``.
        tokenizer: As in ``train``.
        on_step: Called after every batch.
    """
    start_s = time.time()
    collator = build_collator(executable.model, arguments, collate_fn, tokenizer)
    loader = eval_batches(dataset, arguments, collator)
    losses: list[tuple[float, int]] = []
    parts: dict[str, list[Tensor]] = {}
    num_samples = 0
    for batch in loader.batches():
        size = find_batch_size(batch)
        result = executable.eval_step(batch)
        num_samples += size
        if result.loss is not None:
            losses.append((result.loss, size))
        if not arguments.prediction_loss_only:
            for name, tensor in result.outputs.items():
                if tensor.ndim:
                    parts.setdefault(name, []).append(tensor.detach().cpu())
        if on_step is not None:
            on_step()
    loss = math.fsum(x * n for x, n in losses) / sum(n for _, n in losses) if losses else None
    metrics = {} if loss is None else {"eval_loss": loss}
    metrics |= speed_metrics("eval", start_s, num_samples=num_samples, num_steps=len(loader))
    outputs = {name: _joined(tensors) for name, tensors in parts.items()}
    return EvalOutput(loss, outputs, num_samples, metrics)


def _joined(tensors: list[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    joined: Tensor = reduce(torch_pad_and_concatenate, tensors)
    return joined
