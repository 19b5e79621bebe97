"""The thin loop: how an executable is driven, one optimizer step after another.

It trains, logs, saves and resumes, on every target and in every process of a target. What else
transformers' arguments can ask for (callbacks, trackers, evaluations, best model, early stopping)
belongs to ``PipelineTrainer``; the loop refuses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerState
from transformers.trainer_utils import set_seed, speed_metrics

from ipu_pipeline.stages.executable import Executable, StepResult
from ipu_pipeline.train.arguments import TrainingArguments, unread_by_the_loop
from ipu_pipeline.train.checkpoints import Checkpoints
from ipu_pipeline.train.data import Collator, build_collator, train_batches
from ipu_pipeline.train.optimizers import build_scheduler
from ipu_pipeline.train.progress import Progress, TrainResult
from ipu_pipeline.train.trainer_checks import check_plan


def train(
    executable: Executable,
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    *,
    collate_fn: Collator | None = None,
    tokenizer: Any = None,
    on_step: Callable[[TrainerState, StepResult], None] | None = None,
) -> TrainResult:
    """Train; a run that resumes from a checkpoint computes what the uninterrupted one would have.

    Args:
        executable: What ``compile`` returned, with an optimizer.
        dataset: Samples by index.
        arguments: How to train; the names that are read are ``READ_BY_THE_LOOP``.
        collate_fn: Makes a batch of samples; the default is that of transformers' Trainer.
        tokenizer: Pads batches, and is kept in checkpoints.
        on_step: Called after every optimizer step, before it is logged or saved.

    Raises:
        ValueError: Executable, data and arguments do not fit together.
        CheckpointError: The checkpoint to resume from cannot be used.
        OSError: A checkpoint cannot be written; earlier ones are untouched.
        StageError: No step has changed a weight: all of them were skipped.
    """
    optimizer = _checked(executable, arguments)
    set_seed(arguments.seed)
    collator = build_collator(executable.model, arguments, collate_fn, tokenizer)
    divisor, share_of = executable.batch_divisor, executable.share_of
    loader = train_batches(dataset, arguments, collator, divisor=divisor, share_of=share_of)
    progress = Progress(arguments, len(loader))
    scheduler = build_scheduler(optimizer, arguments, progress.state.max_steps)
    checkpoints = Checkpoints(executable, arguments, scheduler, loader.sampler, tokenizer)
    checkpoints.resume(progress)
    state, losses, first = progress.state, progress.losses, progress.state.global_step
    start_s, num_samples = time.time(), 0
    executable.model.train()  # as transformers' loop does; a step leaves modes as they are
    hidden = arguments.disable_tqdm or not arguments.should_save
    with checkpoints, tqdm(total=state.max_steps, initial=first, disable=hidden) as bar:
        while state.global_step < state.max_steps:
            for batch in loader.batches(*divmod(state.global_step, len(loader))):
                learning_rate = scheduler.get_last_lr()[0]
                result = executable.train_step(batch)
                if not result.skipped:
                    scheduler.step()
                num_samples += result.num_samples
                wanted = progress.advance(result)
                bar.update()
                if on_step is not None:
                    on_step(state, result)
                if wanted.should_log:
                    progress.log(losses.flush() | {"learning_rate": learning_rate}, bar)
                if wanted.should_save:
                    checkpoints.save(progress)
                if wanted.should_training_stop:
                    break
        steps = state.global_step - first
        metrics = speed_metrics("train", start_s, num_samples=num_samples, num_steps=steps)
        metrics |= {"train_loss": losses.mean, "epoch": state.epoch}
        progress.log(metrics, bar)
        progress.check_trained()
    return TrainResult(state.global_step, losses.mean, metrics, state, losses.skipped)


def _checked(executable: Executable, arguments: TrainingArguments) -> Optimizer:
    if executable.optimizer is None:
        raise ValueError("the executable has no optimizer; compile it with optimizer=...")
    if unread := unread_by_the_loop(arguments):
        raise ValueError(f"train() does not read {', '.join(unread)}; use PipelineTrainer")
    check_plan(executable.plan, arguments)
    return executable.optimizer
