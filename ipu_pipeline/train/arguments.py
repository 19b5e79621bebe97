"""Training arguments under the names that transformers uses, frozen and checked.

Every field is acted upon. Transformers callbacks receive the object as ``args``, so what
they read (``to_dict``, ``world_size``, ``report_to``, ...) is here too.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from ipu_pipeline.stages.executable import ExecutionOptions

logger = logging.getLogger(__name__)

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "replicas",
    "logging_steps",
    "save_steps",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "warmup_steps",
    "dataloader_num_workers",
    "eval_delay",
)
_STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True)
class TrainingArguments:
    """How to train. Names and defaults follow ``transformers.TrainingArguments``.

    One optimizer step reads ``per_device_train_batch_size * gradient_accumulation_steps *
    replicas`` samples.

    Attributes:
        output_dir: Folder of checkpoints and results.
        num_train_epochs: Passes over the data; may be fractional. Unused if ``max_steps`` is set.
        max_steps: Optimizer steps in all; -1 derives it from ``num_train_epochs``.
        per_device_train_batch_size: Samples per microbatch (micro batch size).
        per_device_eval_batch_size: The same for evaluation.
        gradient_accumulation_steps: Microbatches per optimizer step; equals the plan's.
        replicas: Copies of the pipeline that share the data; equals the plan's.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decay of the weights that transformers decays (no bias, no norm).
        adam_beta1: Decay rate of the first moment, in [0, 1).
        adam_beta2: Decay rate of the second moment, in [0, 1).
        adam_epsilon: Added to the denominator of the update.
        stochastic_rounding: AdamW rounds bfloat16 weights at random, right on average, so that
            updates below half of their spacing are not lost; needs a model that holds such weights.
        max_grad_norm: Clip the gradient norm over all stages to this; 0 for no clipping.
        lr_scheduler_type: A name that ``transformers.get_scheduler`` knows.
        lr_scheduler_kwargs: Further arguments of that scheduler; a JSON object as text works.
        warmup_ratio: Share of all steps that warm up, in [0, 1]; not with ``warmup_steps``.
        warmup_steps: Steps that warm up; below 1 it is a share of all steps, as in transformers.
        seed: Root of every random number: order of the data, dropout, workers.
        data_seed: Root of the order of the data only; ``None`` takes ``seed``.
        logging_strategy: ``no``, ``steps`` or ``epoch``.
        logging_steps: Log every so many steps.
        logging_first_step: Log the first step as well.
        eval_strategy: ``no``, ``steps`` or ``epoch``; ``None``: ``steps`` if ``eval_steps`` is set.
        eval_steps: Evaluate every so many steps; ``None`` takes ``logging_steps``.
        eval_delay: Steps (or epochs) before the first evaluation.
        eval_on_start: Evaluate once before the first step.
        prediction_loss_only: Evaluation keeps the loss and drops the outputs.
        save_strategy: ``no``, ``steps`` or ``epoch``.
        save_steps: Save every so many steps; the last step is saved too.
        save_total_limit: Complete checkpoints to keep; ``None`` keeps all.
        async_save: Write checkpoints while training goes on; costs host memory for a copy of what
            a process saves. An error is raised at the next save, or at the end. Transformers has
            no such argument.
        load_best_model_at_end: Go back to the best checkpoint when training ends.
        metric_for_best_model: Metric that decides; ``None`` takes ``loss`` where one is needed.
        greater_is_better: ``None`` derives it: a metric that ends in ``loss`` should fall.
        dataloader_num_workers: Processes that prepare batches; 0 for none.
        dataloader_drop_last: Drop a last batch that is smaller than the others.
        remove_unused_columns: Hide columns that the model's ``forward`` does not take.
        fp16: Compute in float16 with ``loss_scaling``.
        bf16: Compute in bfloat16.
        loss_scaling: Static factor of the loss in the backward pass; used with ``fp16`` only.
        replicated_tensor_sharding: Divide optimizer state among the replicas (``distributed``
            target; named as in ``ipu_config.json``).
        resume_from_checkpoint: A checkpoint folder; ``latest`` (or ``true``) for the newest in
            ``output_dir``; ``auto`` for the newest if there is one, else a fresh start.
        ignore_data_skip: On resume, start the epoch over instead of at the next batch.
        disable_tqdm: No progress bar.
        run_name: Name of the run for trackers.
    """

    output_dir: str = "trainer_output"
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    replicas: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    stochastic_rounding: bool = False
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    warmup_ratio: float = 0.0
    warmup_steps: float = 0
    seed: int = 42
    data_seed: int | None = None
    logging_strategy: str = "steps"
    logging_steps: int = 500
    logging_first_step: bool = False
    eval_strategy: str | None = None
    eval_steps: int | None = None
    eval_delay: float = 0
    eval_on_start: bool = False
    prediction_loss_only: bool = False
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    async_save: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    dataloader_num_workers: int = 0
    dataloader_drop_last: bool = False
    remove_unused_columns: bool = True
    fp16: bool = False
    bf16: bool = False
    loss_scaling: float = 1.0
    replicated_tensor_sharding: bool = False
    resume_from_checkpoint: str | None = None
    ignore_data_skip: bool = False
    disable_tqdm: bool = False
    run_name: str | None = None

    def __post_init__(self) -> None:
        self._resolve()
        self._check_numbers()
        self._check_length()
        self._check_choices()
        self._check_best_model()

    def _resolve(self) -> None:
        """Fill in what follows from other fields, as transformers does."""
        resolved: dict[str, Any] = {
            "output_dir": str(Path(self.output_dir).expanduser()),
            "lr_scheduler_type": str(
                getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            ),
        }
        if isinstance(self.lr_scheduler_kwargs, str):
            resolved["lr_scheduler_kwargs"] = _json_object(self.lr_scheduler_kwargs)
        if self.eval_strategy is None:
            resolved["eval_strategy"] = "no" if self.eval_steps is None else "steps"
        if self.eval_steps is None:
            resolved["eval_steps"] = self.logging_steps
        metric = self.metric_for_best_model
        needs_metric = resolved["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy")
        if metric is None and (self.load_best_model_at_end or needs_metric):
            metric = resolved["metric_for_best_model"] = "loss"
        if metric is not None and self.greater_is_better is None:
            resolved["greater_is_better"] = not metric.endswith("loss")
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name in (*_AT_LEAST_ONE, "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"save_total_limit must be at least 1, got {self.save_total_limit}; "
                "use None to keep every checkpoint"
            )
        if not 0 < self.loss_scaling < math.inf:
            raise ValueError(f"loss_scaling must be above 0, got {self.loss_scaling}")

    def _check_length(self) -> None:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps must be at least 1, or -1 to follow num_train_epochs, "
                f"got {self.max_steps}"
            )
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps} "
                "contradict each other; set one of them"
            )

    def _check_choices(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both set; choose one")
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            value = getattr(self, name)
            if value not in _STRATEGIES:
                raise ValueError(f"{name} {value!r} is unknown; use one of {_STRATEGIES}")
        known = [scheduler.value for scheduler in SchedulerType]
        if self.lr_scheduler_type not in known:
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type!r} is unknown; use one of {known}"
            )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and (
            self.eval_strategy == "no"
        ):
            raise ValueError(
                f"lr_scheduler_type {self.lr_scheduler_type!r} follows an evaluation metric; "
                "set eval_strategy to 'steps' or 'epoch'"
            )

    def _check_best_model(self) -> None:
        if not self.load_best_model_at_end:
            return
        if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
            raise ValueError(
                "load_best_model_at_end needs a checkpoint at every evaluation, but eval_strategy "
                f"is {self.eval_strategy!r} and save_strategy {self.save_strategy!r}; "
                "set both to 'steps' or both to 'epoch'"
            )
        if self.eval_strategy == "steps" and self.save_steps % self.eval_interval:
            raise ValueError(
                f"load_best_model_at_end needs save_steps ({self.save_steps}) to be a multiple of "
                f"eval_steps ({self.eval_interval})"
            )

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations, with the default filled in."""
        return self.logging_steps if self.eval_steps is None else self.eval_steps

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.per_device_train_batch_size * self.samples_divisor

    @property
    def samples_divisor(self) -> int:
        """A training batch splits evenly into this many parts: microbatches times replicas."""
        return self.gradient_accumulation_steps * self.replicas

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return how many of ``num_training_steps`` steps warm up."""
        share = self.warmup_ratio or (self.warmup_steps if self.warmup_steps < 1 else 0.0)
        if share:
            return math.ceil(num_training_steps * share)
        return int(self.warmup_steps)

    def execution_options(self, **overrides: Any) -> ExecutionOptions:
        """Return the options a target runs with: precision, clipping, seed, ...

        Args:
            **overrides: Fields of :class:`ExecutionOptions` to set otherwise.
        """
        if self.loss_scaling != 1 and not self.fp16:
            logger.warning(
                "loss_scaling %g is not applied: it keeps float16 gradients from underflowing, and "
                "fp16 is off",
                self.loss_scaling,
            )
        options: dict[str, Any] = {
            "precision": "fp16" if self.fp16 else "bf16" if self.bf16 else "float32",
            "loss_scaling": self.loss_scaling if self.fp16 else 1.0,
            "max_grad_norm": self.max_grad_norm or None,
            "seed": self.seed,
            "replicated_tensor_sharding": self.replicated_tensor_sharding,
        }
        return ExecutionOptions(**(options | overrides))

    # ------------------------------------------------ what transformers callbacks read
    @property
    def train_batch_size(self) -> int:
        """Samples per microbatch, under the name that callbacks read."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Samples per evaluation microbatch, under the name that callbacks read."""
        return self.per_device_eval_batch_size

    @property
    def n_gpu(self) -> int:
        """Devices this process spreads a batch over by itself: none, the target places stages."""
        return 0

    @property
    def report_to(self) -> list[str]:
        """Trackers by name: none, pass their callbacks to ``train`` instead."""
        return []

    @property
    def process_index(self) -> int:
        """Rank of this process, 0 without torch.distributed."""
        return torch.distributed.get_rank() if _distributed() else 0

    @property
    def world_size(self) -> int:
        """Number of processes, 1 without torch.distributed."""
        return torch.distributed.get_world_size() if _distributed() else 1

    @property
    def should_save(self) -> bool:
        """Whether this process writes results."""
        return self.process_index == 0

    @property
    def do_eval(self) -> bool:
        """Whether evaluations take place while training."""
        return self.eval_strategy != IntervalStrategy.NO

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        return asdict(self)

    def to_json_string(self) -> str:
        """Return all fields as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return all fields, those that are no plain number or text as text (for trackers)."""
        data = self.to_dict() | {
            "train_batch_size": self.train_batch_size,
            "eval_batch_size": self.eval_batch_size,
        }
        plain = (bool, int, float, str)
        return {name: v if isinstance(v, plain) else str(v) for name, v in data.items()}


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _text(value: Any) -> str:
    """Return the text of a choice that may be given as a transformers enum."""
    return str(getattr(value, "value", value))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"lr_scheduler_kwargs is not JSON: {error}; got {text!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"lr_scheduler_kwargs must be a JSON object, got {text!r}")
    return value
