"""One training run: what the loop steps through, resumes from and reports to."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.optimization import GreedyLR
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import speed_metrics

from ipu_pipeline.checkpoint import is_complete
from ipu_pipeline.stages.executable import Executable, StepResult
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.callbacks import Events
from ipu_pipeline.train.checkpoint import (
    TrainingPoint,
    checkpoint_path,
    describe_data,
    resume_position,
    rotate_checkpoints,
)
from ipu_pipeline.train.data import Batch, BatchLoader, DataPosition
from ipu_pipeline.train.evaluate import Evaluation, find_metric
from ipu_pipeline.train.optimizers import build_scheduler
from ipu_pipeline.train.progress import TrainingProgress
from ipu_pipeline.train.results import LossMeter, TrainResult, save_results, write_json

logger = logging.getLogger(__name__)


class Run:
    """State of one call of ``train``. The loop asks for batches and tells what happened.

    Args:
        executable: Trains; has an optimizer.
        loader: Training batches.
        arguments: How to train.
        callbacks: Transformers callbacks.
        evaluation: What an evaluation runs.
        tokenizer: Kept in the checkpoints.
    """

    def __init__(
        self,
        executable: Executable,
        loader: BatchLoader,
        arguments: TrainingArguments,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        evaluation: Evaluation,
        tokenizer: Any,
    ) -> None:
        optimizer = _check(executable, arguments, evaluation)
        self.executable = executable
        self.arguments = arguments
        self.loader = loader
        self.evaluation = evaluation
        self.tokenizer = tokenizer
        self.max_steps = arguments.max_steps
        if self.max_steps < 0:
            self.max_steps = math.ceil(arguments.num_train_epochs * len(loader))
        self.num_epochs = math.ceil(self.max_steps / len(loader))
        self.scheduler: LRScheduler = build_scheduler(optimizer, arguments, self.max_steps)
        self.progress = TrainingProgress(disable=arguments.disable_tqdm)
        self.events = Events(
            [*callbacks, self.progress],
            arguments,
            model=executable.model,
            optimizer=optimizer,
            scheduler=self.scheduler,
            tokenizer=tokenizer,
            train_dataloader=loader.dataloader,
        )
        self.position = DataPosition()
        self.losses = LossMeter()
        self.learning_rate = self._current_lr()
        self._being_saved: Path | None = None
        self.first_step = 0
        self.num_samples = 0
        self.start_s = time.time()
        self._flops_per_token = _flops_per_token(executable.model)
        self._describe_length()
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        self._stack.callback(self.progress.stop)
        self._stack.enter_context(self.events.watching_optimizer())
        self.start_s = time.time()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stack.close()
        if error is not None:
            with contextlib.suppress(Exception):  # logged; the error that ended the run goes on
                self.settle_save()

    @property
    def stopping(self) -> bool:
        """Whether a callback asked to stop training."""
        return bool(self.events.control.should_training_stop)

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch to begin or, after a resume, to end."""
        if self.stopping:
            return False
        # With max_steps given, epochs go on until it is reached.
        if self.arguments.max_steps < 0 and self.position.epoch >= self.num_epochs:
            return False
        steps_left = self.events.state.global_step < self.max_steps
        return bool(steps_left or self.position.step >= len(self.loader))

    def resume(self, path: Path) -> None:
        """Go on where the checkpoint at ``path`` was written.

        Raises:
            CheckpointError: It cannot be loaded, or does not fit data or arguments.
        """
        extra = self.executable.load_checkpoint(path)
        point = TrainingPoint.from_json(extra, path)
        data = describe_data(self.loader.sampler)
        self.position = resume_position(point, data, self.arguments, path)
        self.losses = point.losses
        self.scheduler.load_state_dict(dict(point.scheduler))
        self.learning_rate = self._current_lr()
        self.events.restore(point.trainer_state)
        state = self.events.state
        if state.best_model_checkpoint and not Path(state.best_model_checkpoint).is_dir():
            logger.warning("the best checkpoint %s is gone", state.best_model_checkpoint)
            state.best_model_checkpoint = None
        self.first_step = state.global_step
        self._describe_length()
        logger.info("resuming from %s at step %d", path, state.global_step)

    def batches(self) -> Iterator[Batch]:
        """Yield the rest of the epoch, as far as ``max_steps`` allows."""
        if self.events.state.global_step < self.max_steps:
            for batch in self.loader.batches(self.position):
                yield batch
                if self.events.state.global_step >= self.max_steps:
                    return

    def record(self, batch: Batch, result: StepResult) -> None:
        """Take note of one optimizer step; the schedule moves on unless it was skipped."""
        state = self.events.state
        size = find_batch_size(batch) or result.num_samples
        self.learning_rate = self._current_lr()
        if not result.skipped and not self._follows_metric():
            self.scheduler.step()
        self.losses.add(result)
        self.num_samples += size
        tokens = batch.get(getattr(self.executable.model, "main_input_name", "input_ids"))
        state.total_flos += self._flops_per_token * (tokens.numel() if tokens is not None else 0)
        state.global_step += 1
        self.position = replace(self.position, step=self.position.step + 1)
        state.epoch = self.position.epoch + self.position.step / len(self.loader)
        self.progress.advance(loss=result.loss, learning_rate=self.learning_rate, num_samples=size)

    def end_epoch(self) -> None:
        """Move on to the next epoch, unless training stops in the middle of this one."""
        done = self.position.step >= len(self.loader) or self.events.control.should_epoch_stop
        if done:
            self.position = DataPosition(self.position.epoch + 1, 0)

    def report(self) -> None:
        """Log, evaluate and save, as far as the callbacks asked for it."""
        control = self.events.control
        if control.should_log and self.losses.pending:
            self.events.log(self.losses.flush() | {"learning_rate": self.learning_rate})
        if self.events.control.should_evaluate:
            self.evaluate()
        if self.events.control.should_save:
            self.save()
            self.events.fire("on_save")
        self.progress.restart_clock()

    def evaluate(self, *, follow: bool = True) -> dict[str, Any]:
        """Evaluate, log, and keep track of the best metric.

        Args:
            follow: Let the metric move a schedule that follows it and the best checkpoint.

        Raises:
            ValueError: There is nothing to evaluate, or the metric to follow is not computed.
        """
        metrics = self.evaluation.metrics(
            self.executable,
            self.arguments,
            tokenizer=self.tokenizer,
            on_step=lambda: self.events.fire("on_prediction_step"),
        )
        self.events.log(metrics)
        self.events.fire("on_evaluate", metrics=metrics)
        if follow and self.arguments.metric_for_best_model is not None:
            self._follow(find_metric(metrics, self.arguments.metric_for_best_model))
        return metrics

    def save(self) -> Path:
        """Write ``checkpoint-<step>``; then delete those beyond ``save_total_limit``.

        With ``async_save`` the deletion waits for the next save, or the end.
        """
        self.settle_save()
        state, arguments = self.events.state, self.arguments
        path = checkpoint_path(arguments.output_dir, state.global_step)
        if state.best_global_step:
            best = checkpoint_path(arguments.output_dir, state.best_global_step)
            if best == path or is_complete(best):
                state.best_model_checkpoint = str(best)
        state.stateful_callbacks = cast(Any, self.events.callback_states())
        point = TrainingPoint(
            position=self.position,
            data=describe_data(self.loader.sampler),
            scheduler=self.scheduler.state_dict(),
            trainer_state=asdict(state),
            losses=self.losses,
        )
        self.executable.save_checkpoint(
            path,
            extra=point.to_json(),
            blocking=not arguments.async_save,
            attach=self._add_files,
        )
        self._being_saved = path
        if not arguments.async_save:
            self.settle_save()
        return path

    def settle_save(self) -> None:
        """Wait until the last checkpoint is complete; only then delete what is too old."""
        newest, self._being_saved = self._being_saved, None
        if newest is None:
            return
        self.executable.wait_for_checkpoint()
        if self.arguments.should_save:
            rotate_checkpoints(
                self.arguments.output_dir,
                self.arguments.save_total_limit,
                newest=newest,
                best=self.events.state.best_model_checkpoint,
            )

    def finish(self) -> TrainResult:
        """Report the totals, go back to the best checkpoint if asked, write the result files."""
        self.settle_save()
        state, arguments = self.events.state, self.arguments
        metrics: dict[str, Any] = speed_metrics(
            "train",
            self.start_s,
            num_samples=self.num_samples,
            num_steps=state.global_step - self.first_step,
        )
        metrics |= {"total_flos": state.total_flos, "train_loss": self.losses.mean}
        self.events.log(metrics)
        best = self.executable.broadcast(state.best_model_checkpoint)
        if arguments.load_best_model_at_end and best:
            logger.info("loading the best checkpoint %s", best)
            self.executable.load_checkpoint(best)
        self.events.fire("on_train_end")
        if arguments.should_save:
            save_results(arguments.output_dir, "train", metrics)
            write_json(Path(arguments.output_dir) / "trainer_state.json", asdict(state))
        return TrainResult(
            global_step=state.global_step,
            training_loss=self.losses.mean,
            metrics=metrics,
            log_history=list(state.log_history),
            skipped_steps=self.losses.skipped,
            best_checkpoint=state.best_model_checkpoint,
        )

    def _add_files(self, folder: Path) -> None:
        """Add what people and transformers' tools read; resuming reads checkpoint.json alone."""
        write_json(folder / "trainer_state.json", asdict(self.events.state))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _follow(self, value: float) -> None:
        state, arguments = self.events.state, self.arguments
        if isinstance(self.scheduler, (ReduceLROnPlateau, GreedyLR)):
            self.scheduler.step(value)
        if math.isnan(value):
            return
        best = state.best_metric
        better = best is None or (value > best if arguments.greater_is_better else value < best)
        if better:
            state.best_metric = value
            if arguments.save_strategy != "no":
                state.best_global_step = state.global_step

    def _follows_metric(self) -> bool:
        return isinstance(self.scheduler, (ReduceLROnPlateau, GreedyLR))

    def _current_lr(self) -> float:
        return float(self.scheduler.optimizer.param_groups[0]["lr"])

    def _describe_length(self) -> None:
        state = self.events.state
        state.max_steps = self.max_steps
        state.num_train_epochs = self.num_epochs
        state.compute_steps(self.arguments, self.max_steps)


def _check(
    executable: Executable, arguments: TrainingArguments, evaluation: Evaluation
) -> torch.optim.Optimizer:
    """Return the executable's optimizer; refuse what could only fail later."""
    if executable.optimizer is None:
        raise ValueError(
            "the executable has no optimizer; compile it with "
            "optimizer=build_optimizer(model, arguments)"
        )
    plan = executable.plan
    for argument, planned in (
        ("gradient_accumulation_steps", plan.num_microbatches),
        ("replicas", plan.replicas),
    ):
        if getattr(arguments, argument) != planned:
            raise ValueError(
                f"{argument} is {getattr(arguments, argument)} and the plan was made for "
                f"{planned}; set it to {planned}, or plan again"
            )
    if arguments.do_eval and evaluation.is_empty:
        raise ValueError(
            f"eval_strategy is {arguments.eval_strategy!r} and there is nothing to evaluate; "
            "give train() eval_dataset or eval_fn"
        )
    return executable.optimizer


def _flops_per_token(model: torch.nn.Module) -> float:
    """Return transformers' estimate: 6 x parameters without embeddings; 0 if it has none."""
    count = getattr(model, "num_parameters", None)
    return 6.0 * count(exclude_embeddings=True) if count is not None else 0.0
