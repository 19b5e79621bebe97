"""Evaluation over a data set: mean loss and joined outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import find_batch_size, torch_pad_and_concatenate
from transformers.trainer_utils import denumpify_detensorize, speed_metrics

from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.data import Collator, build_collator, eval_batches

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
    tokenizer: Any = None,
    on_step: Callable[[], None] | None = None,
    measure: Measure | None = None,
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
        measure: Called with the outputs and the batch; what it returns (axis 0: samples) is kept
            in place of the outputs, such as a few numbers in place of logits over a vocabulary.
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
            outputs = result.outputs if measure is None else measure(result.outputs, batch)
            for name, tensor in outputs.items():
                if tensor.ndim:
                    parts.setdefault(name, []).append(tensor.detach().cpu())
        if on_step is not None:
            on_step()
    loss = math.fsum(x * n for x, n in losses) / sum(n for _, n in losses) if losses else None
    metrics = {} if loss is None else {"eval_loss": loss}
    metrics |= speed_metrics("eval", start_s, num_samples=num_samples, num_steps=len(loader))
    joined = {name: _joined(tensors) for name, tensors in parts.items()}
    return EvalOutput(loss, joined, num_samples, metrics)


EvalFn = Callable[[Executable], Mapping[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation during training runs.

    Attributes:
        dataset: Evaluated with :func:`evaluate_loop`; ``None`` to leave it out.
        function: Gives further metrics; ``None`` to leave it out.
        collate_fn: As in ``train``.
    """

    dataset: Dataset[Any] | None = None
    function: EvalFn | None = None
    collate_fn: Collator | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return self.dataset is None and self.function is None

    def metrics(
        self,
        executable: Executable,
        arguments: TrainingArguments,
        *,
        tokenizer: Any,
        on_step: Callable[[], None],
    ) -> dict[str, Any]:
        """Run it and return its metrics, every name with the prefix ``eval_``.

        Raises:
            ValueError: There is nothing to run.
        """
        metrics: dict[str, Any] = {}
        if self.is_empty:
            raise ValueError("an evaluation was asked for; give train() eval_dataset or eval_fn")
        if self.dataset is not None:
            output = evaluate_loop(
                executable,
                self.dataset,
                arguments,
                collate_fn=self.collate_fn,
                tokenizer=tokenizer,
                on_step=on_step,
            )
            metrics |= output.metrics
        if self.function is not None:
            found = denumpify_detensorize(dict(self.function(executable)))
            metrics |= {_prefixed(name): value for name, value in found.items()}
        return metrics


def find_metric(metrics: Mapping[str, Any], name: str) -> float:
    """Return a metric by its name with or without the prefix.

    Raises:
        ValueError: It was not computed.
    """
    if _prefixed(name) not in metrics:
        raise ValueError(
            f"metric_for_best_model is {name!r} and the evaluation gave {sorted(metrics)}; "
            "choose one of these"
        )
    return float(metrics[_prefixed(name)])


def _prefixed(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def _joined(tensors: list[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    joined: Tensor = reduce(torch_pad_and_concatenate, tensors)
    return joined
