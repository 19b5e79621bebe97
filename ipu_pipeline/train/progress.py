"""How far a training is: transformers' trainer state, running losses, and what is due now."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback
from transformers.utils import logging

from ipu_pipeline.errors import StageError, shown
from ipu_pipeline.ir.codec import Amount, Count
from ipu_pipeline.stages.executable import StepResult
from ipu_pipeline.train.arguments import TrainingArguments

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a call of ``train`` did.

    Attributes:
        global_step: Optimizer steps tried, those before a resume included.
        training_loss: Mean loss over all these steps.
        metrics: Loss, runtime (s) and speeds under transformers' names; times are of this call.
        state: transformers' state; its ``log_history`` has everything logged, in order.
        skipped_steps: Steps that an overflow skipped, of all steps.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, Any]
    state: TrainerState
    skipped_steps: int = 0

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """Everything logged, in order."""
        return list(self.state.log_history)


def check_like(saved: object, own: object, name: str) -> None:
    """Refuse data of a checkpoint that are not made as one's own, which they shall replace.

    Args:
        saved: JSON data.
        own: The same keys, lengths and types; a number stands for any that is finite, a whole
            one for a count.
        name: Of the data, for the message.

    Raises:
        ValueError: They are not; says where.
    """
    if isinstance(own, dict) and isinstance(saved, dict) and own.keys() == saved.keys():
        for key, value in own.items():
            check_like(saved[key], value, f"{name}.{key}")
    elif isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        for index, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
            check_like(theirs, mine, f"{name}[{index}]")
    else:
        number = isinstance(saved, int | float) and abs(saved) <= sys.float_info.max
        count = type(saved) is int and 0 <= saved < 2**62
        fits: dict[type, bool] = {dict: False, list: False, float: number, int: count}
        if not fits.get(type(own), type(saved) is type(own)):
            raise ValueError(f"{name} is {shown(saved)}")


@dataclass
class _Kept:
    """What of transformers' state a resumed training takes over; the rest is that of now."""

    global_step: Count
    log_history: list[dict[str, Any]]
    num_input_tokens_seen: Count
    total_flos: Amount
    best_metric: float | None
    best_global_step: Count | None
    best_model_checkpoint: str | None
    trial_name: str | None
    trial_params: dict[str, str | float | int | bool] | None


@dataclass
class LossMeter:
    """Losses since the start and since the last log; its fields are kept in checkpoints.

    Steps that an overflow skipped count as steps; their losses count only if they are finite.
    """

    total: float = 0.0
    steps: Count = 0
    skipped: Count = 0
    window_total: float = 0.0
    window_steps: Count = 0
    window_skipped: Count = 0
    window_grad_norm: float | None = None

    def add(self, result: StepResult) -> None:
        """Count one step."""
        if result.skipped:
            self.skipped += 1
            self.window_skipped += 1
        else:
            self.window_grad_norm = result.grad_norm
        if math.isfinite(result.loss) or not result.skipped:
            self.total += result.loss
            self.steps += 1
            self.window_total += result.loss
            self.window_steps += 1

    @property
    def mean(self) -> float:
        """Mean loss since the start; NaN before the first step."""
        return self.total / self.steps if self.steps else math.nan

    def flush(self) -> dict[str, Any]:
        """Return what is to be logged now and begin a new window."""
        logs: dict[str, Any] = {
            "loss": self.window_total / self.window_steps if self.window_steps else math.nan
        }
        if self.window_grad_norm is not None:
            logs["grad_norm"] = self.window_grad_norm
        if self.window_skipped:
            logs["skipped_steps"] = self.window_skipped
        self.window_total, self.window_steps, self.window_skipped = 0.0, 0, 0
        self.window_grad_norm = None
        return logs


@dataclass
class FiniteLosses:
    """Which steps of one call of transformers' training had a finite loss.

    There a step with a gradient of NaN is made as any other, and nothing says so at the end.
    """

    first: int | None = None
    last_finite: int | None = None
    warned: bool = False

    def add(self, step: int, loss: float) -> None:
        """Count the loss of a step, or of a part of it."""
        self.first = step if self.first is None else self.first
        if math.isfinite(loss):
            self.last_finite = step
        elif not self.warned:
            self.warned = True
            logger.warning("the loss of step %d is %g", step + 1, loss)

    def check_trained(self, model: nn.Module, steps: int) -> None:
        """Refuse to end well when nothing was learned.

        Raises:
            StageError: No loss was finite; or that of the first step only, and weights are not.
        """
        if self.first is None or self.last_finite not in (None, self.first):
            return
        finite = "none" if self.last_finite is None else "only the first one"
        broken = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken or self.last_finite is None:
            where = f", and {broken[0]} is not finite now" if broken else ""
            raise StageError(
                f"{steps - self.first} optimizer steps have taught the model nothing: {finite} of "
                f"them had a finite loss (neither NaN nor infinite){where}; look for what is not "
                "finite in the weights, the data and the loss, or lower the learning rate"
            )


class Progress:
    """Where training is, besides weights, optimizer and random state.

    The step counter says which batch is next: an epoch has ``steps_per_epoch``.
    """

    def __init__(self, arguments: TrainingArguments, steps_per_epoch: int) -> None:
        self._arguments = arguments
        self._steps_per_epoch = steps_per_epoch
        self.losses = LossMeter()
        self.state = TrainerState(train_batch_size=arguments.train_batch_size)
        self._describe_length()

    def advance(self, result: StepResult) -> TrainerControl:
        """Count one optimizer step; return whether to log, to save and to stop now."""
        self.losses.add(result)
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self._steps_per_epoch
        flow = DefaultFlowCallback()
        wanted = flow.on_step_end(self._arguments, self.state, TrainerControl())
        if wanted.should_training_stop or self.state.global_step % self._steps_per_epoch == 0:
            wanted = flow.on_epoch_end(self._arguments, self.state, wanted)
        return wanted

    def log(self, logs: dict[str, Any], bar: tqdm[Any]) -> None:
        """Add ``logs`` to the history, and print them above the bar unless that is hidden."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        items = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items())
        if not bar.disable:
            bar.write(f"step {self.state.global_step}  {'  '.join(items)}")
            sys.stdout.flush()  # tqdm does not, and a run may end any time

    def check_trained(self) -> None:
        """Refuse to end well when nothing was learned; a few skipped steps are normal.

        Raises:
            StageError: Every step of the run was skipped.
        """
        steps = self.state.global_step
        if steps and self.losses.skipped >= steps:
            raise StageError(
                f"none of the {steps} optimizer steps changed a weight: the gradients were not "
                "finite (NaN or infinite) in any of them, so all were skipped; look for what is "
                "not finite in the weights, the data and the loss, or with fp16 lower "
                "loss_scaling or use bf16"
            )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {"state": asdict(self.state), "losses": asdict(self.losses)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what :meth:`to_json` gave; how long and how often are those of now.

        Raises:
            ValueError, TypeError, KeyError: It did not give that; nothing is changed.
        """
        kept = msgspec.convert(saved["state"], _Kept)
        losses = msgspec.convert(saved["losses"], LossMeter)
        if max(losses.steps, losses.skipped) > kept.global_step:
            raise ValueError(f"losses of {losses.steps} steps, {losses.skipped} of them skipped")
        self.state, self.losses = replace(self.state, **vars(kept)), losses
        self.state.epoch = kept.global_step / self._steps_per_epoch
        self._describe_length()

    def _describe_length(self) -> None:
        state, arguments = self.state, self._arguments
        state.max_steps = arguments.max_steps
        if arguments.max_steps <= 0:
            state.max_steps = math.ceil(arguments.num_train_epochs * self._steps_per_epoch)
        state.num_train_epochs = math.ceil(state.max_steps / self._steps_per_epoch)
        state.is_local_process_zero = state.is_world_process_zero = arguments.should_save
        state.compute_steps(arguments, state.max_steps)
