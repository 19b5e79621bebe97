"""The training loop: one optimizer step after another, driven by any executable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.checkpoint import agreed_resume_checkpoint
from ipu_pipeline.train.data import Collator, build_collator, train_batches
from ipu_pipeline.train.evaluate import EvalFn, Evaluation
from ipu_pipeline.train.results import TrainResult
from ipu_pipeline.train.run import Run


def train(
    executable: Executable,
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    *,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    eval_dataset: Dataset[Any] | None = None,
    eval_fn: EvalFn | None = None,
    collate_fn: Collator | None = None,
    tokenizer: Any = None,
) -> TrainResult:
    """Train, with progress, logs, evaluations, checkpoints and transformers callbacks.

    An interrupted run that resumes from a checkpoint computes what the uninterrupted run would
    have: data, dropout, schedule, logs. Results are written to ``arguments.output_dir`` under
    transformers' file names.

    Args:
        executable: What ``compile`` returned, with an optimizer.
        dataset: Samples by index.
        arguments: How to train.
        callbacks: Transformers callbacks, called in the order their Trainer calls them.
        eval_dataset: Evaluated at every evaluation; gives ``eval_loss``.
        eval_fn: Called with the executable at every evaluation; gives further metrics, whose
            names get the prefix ``eval_``.
        collate_fn: Makes a batch of samples; the default is that of transformers' Trainer.
        tokenizer: Pads batches, is kept in checkpoints and passed to callbacks.

    Returns:
        Steps, losses and metrics.

    Raises:
        ValueError: Executable, data and arguments do not fit together.
        CheckpointError: The checkpoint to resume from cannot be used.
        OSError: A checkpoint cannot be written; earlier ones are untouched. With ``async_save``
            it is raised at the next save, or at the end.
    """
    set_seed(arguments.seed)
    collator = build_collator(executable.model, arguments, collate_fn, tokenizer)
    run = Run(
        executable,
        train_batches(dataset, arguments, collator, divisor=executable.batch_divisor),
        arguments,
        callbacks=callbacks,
        evaluation=Evaluation(eval_dataset, eval_fn, collate_fn),
        tokenizer=tokenizer,
    )
    checkpoint = agreed_resume_checkpoint(executable, arguments)
    if checkpoint is not None:
        run.resume(checkpoint)
    with run:
        run.events.fire("on_train_begin")
        if arguments.eval_on_start and checkpoint is None:
            run.evaluate(follow=False)
        while run.goes_on:
            _train_epoch(run)
        return run.finish()


def _train_epoch(run: Run) -> None:
    run.events.fire("on_epoch_begin")
    for batch in run.batches():
        run.events.fire("on_step_begin")
        result = run.executable.train_step(batch)
        run.events.after_update()
        run.record(batch, result)
        run.events.fire("on_step_end")
        run.report()
        if run.stopping or run.events.control.should_epoch_stop:
            break
    run.end_epoch()
    run.events.fire("on_epoch_end")
    run.report()
