"""transformers' own training arguments, with the few that a pipeline adds.

``PipelineTrainer`` reads all of them, and takes transformers' class as well. The thin loop acts on
those in ``READ_BY_THE_LOOP`` and refuses the others, so nothing that is asked for is ignored.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers.hf_argparser import HfArg

from ipu_pipeline.errors import shown
from ipu_pipeline.ir.limits import LIMITS, check_count
from ipu_pipeline.stages.executable import ExecutionOptions

logger = logging.getLogger(__name__)
option: Any = HfArg  # the field of a dataclass that is an option of a command line

READ_BY_THE_LOOP = frozenset(
    """
    output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps seed data_seed
    logging_strategy logging_steps logging_first_step save_strategy save_steps save_total_limit
    dataloader_num_workers dataloader_drop_last remove_unused_columns fp16 bf16
    resume_from_checkpoint disable_tqdm run_name
    """.split()  # noqa: SIM905
)
# They say what a script does, or where transformers would place a model that is in one piece.
_FOR_OTHERS = frozenset(
    ("do_train", "do_eval", "do_predict", "use_cpu", "dataloader_pin_memory", "local_rank")
)
# The limit and the smallest of every count.
_COUNTS = {
    "per_device_train_batch_size": ("micro_batch", 1),
    "per_device_eval_batch_size": ("micro_batch", 1),
    "replicas": ("replicas", 1),
    "gradient_accumulation_steps": ("num_microbatches", 1),
    "num_stages": ("num_stages", 1),
    "max_steps": ("steps", -1),
    "dataloader_num_workers": ("workers", 0),
    "seed": ("training_seed", 0),
    "data_seed": ("training_seed", 0),
}
# The largest of what may be a fraction.
_AMOUNTS = {
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "warmup_steps"),
                    LIMITS["steps"]),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), sys.float_info.max),
}  # fmt: skip


def num_processes() -> int:
    """Return how many processes were started, whatever accelerate makes of them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return the rank of this process, 0 where there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """``transformers.TrainingArguments`` and what a pipeline adds; a command line has all of them.

    One optimizer step reads ``per_device_train_batch_size * gradient_accumulation_steps *
    replicas`` samples: micro batch size, microbatches, and copies of the pipeline.

    Raises:
        ValueError: A value is out of its range, or two contradict each other.
    """

    use_cpu: bool = option(
        default=True, help="The stages of a plan choose their devices, not transformers."
    )
    num_stages: int | None = option(default=None, help="Pipeline stages; default: every device.")
    machine: str | None = option(default=None, help="Machine to plan for; default: local.")
    plan: str | None = option(default=None, help="Run this plan.json instead of planning.")
    costs: str = option(
        default="analytic", help="Prices of the blocks: analytic, or profiled here."
    )
    replicas: int = option(
        default=1, help="Copies of the pipeline that share the data; equals the plan's."
    )
    warmup_ratio: float = option(
        default=0.0, help="Share of the steps that warm up; not with warmup_steps."
    )
    loss_scaling: float | None = option(
        default=None, help="Static factor of the loss with --fp16; default: torch's GradScaler."
    )
    master_weights: bool = option(
        default=False, help="The optimizer steps float32 copies of 16-bit weights."
    )
    stochastic_rounding: bool = option(
        default=False, help="AdamW rounds bfloat16 weights at random, right on average."
    )
    replicated_tensor_sharding: bool = option(
        default=False, help="Divide optimizer state among the replicas (distributed target)."
    )
    batches: str = option(
        default="whole",
        help="What a process reads: whole batches, or the share of its replica (distributed).",
    )
    async_save: bool = option(
        default=False,
        help="Write checkpoints while training goes on; costs host memory for a copy.",
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        super().__post_init__()
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(
                f"save_total_limit must be at least 1, got {self.save_total_limit}; "
                "use None to keep every checkpoint"
            )
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if not isinstance(self.lr_scheduler_kwargs or {}, dict):
            raise ValueError(
                f"lr_scheduler_kwargs must be settings by name, got {self.lr_scheduler_kwargs!r}"
            )
        ExecutionOptions(batches=self.batches)
        if self.loss_scaling is not None and self.loss_scaling <= 0:
            raise ValueError(f"loss_scaling must be above 0, got {self.loss_scaling}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps} "
                "contradict each other; set one of them"
            )

    def _check_numbers(self) -> None:
        for name, (limit, least) in _COUNTS.items():
            value = getattr(self, name)
            if name == "max_steps" and isinstance(value, float) and value.is_integer():
                value = int(value)  # 1e3, which transformers takes
            if value is not None:
                check_count(name, value, limit, least=least)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} must be finite, got {value}")
        for name, most in _AMOUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
            if value > most:
                raise ValueError(f"{name} may be {most} at most, got {shown(value)}")

    @property
    def folder(self) -> Path:
        """``output_dir``: where checkpoints and results go."""
        return Path(str(self.output_dir))

    @property
    def train_batch_size(self) -> int:
        """Samples of one microbatch of every copy: what transformers' loop reads at a time."""
        return int(super().train_batch_size) * self.replicas

    @property
    def samples_divisor(self) -> int:
        """A training batch splits evenly into this many parts: microbatches times replicas."""
        return self.gradient_accumulation_steps * self.replicas

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.per_device_train_batch_size * self.samples_divisor

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return how many of ``num_training_steps`` steps warm up."""
        if self.warmup_ratio:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return int(super().get_warmup_steps(num_training_steps))

    def execution_options(self, **overrides: Any) -> ExecutionOptions:
        """Return the options that a plan is compiled with: precision, clipping, seed, ...

        Args:
            **overrides: Fields of :class:`ExecutionOptions` to set otherwise.
        """
        if self.loss_scaling not in (None, 1) and not self.fp16:
            logger.warning(
                "loss_scaling %g is not applied: it keeps float16 gradients from underflowing, and "
                "fp16 is off",
                self.loss_scaling,
            )
        options: dict[str, Any] = {
            "precision": "fp16" if self.fp16 else "bf16" if self.bf16 else "float32",
            "loss_scaling": self.loss_scaling if self.fp16 else 1.0,
            "master_weights": self.master_weights,
            "max_grad_norm": self.max_grad_norm or None,
            "seed": self.seed,
            "replicated_tensor_sharding": self.replicated_tensor_sharding,
            "batches": self.batches,
        }
        return ExecutionOptions(**(options | overrides))

    # ---- one process of several: the target starts the process group, not these arguments ----

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        if num_processes() == 1:
            device: torch.device = super()._setup_devices
            return device
        self.distributed_state, self._n_gpu = None, 0
        return torch.device("cpu")

    @property
    def process_index(self) -> int:
        """Rank of this process, 0 where there is one."""
        return process_index()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return num_processes()


def unread_by_the_loop(arguments: TrainingArguments) -> list[str]:
    """Return the names of transformers' arguments that are set and that the thin loop ignores."""
    others = {f.name for f in fields(transformers.TrainingArguments)}
    others -= READ_BY_THE_LOOP | _FOR_OTHERS
    plain = _defaults()
    return sorted(n for n in others if getattr(arguments, n) != getattr(plain, n))


@functools.cache
def _defaults() -> TrainingArguments:
    return TrainingArguments()
