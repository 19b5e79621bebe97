"""From options to a model that transformers' trainers train: over a pipeline, or in one piece.

A script loads its model and data, and calls :func:`run_trainer`. ``--unsplit`` leaves the pipeline
out of the same run: transformers' own trainer, on the same batches from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from plan_report import is_first, say
from script_options import DataOptions
from script_run import write_results
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback

from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.errors import DatasetError
from ipu_pipeline.train import PipelineMixin
from ipu_pipeline.train.arguments import num_processes, option
from ipu_pipeline.train.checkpoints import find_resume_checkpoint
from ipu_pipeline.train.data import Collator
from ipu_pipeline.train.output_folder import newest_checkpoint, run_of_trainer_checkpoint


@dataclass(kw_only=True)
class TrainerOptions(DataOptions):
    """What a script over a trainer can be told."""

    unsplit: bool = option(
        default=False, help="Train in one piece, in transformers' own trainer, to compare."
    )

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        given = [n for n in ("num_stages", "plan", "machine") if getattr(self, n)]
        several = ["torchrun"] if num_processes() > 1 else []
        return (
            *super()._mistakes(),
            (
                self.unsplit and bool(given or several),
                "--unsplit trains the whole model in this process; leave out "
                + " and ".join([*(f"--{name}" for name in given), *several]),
            ),
        )


@dataclass(kw_only=True)
class Seq2SeqOptions(TrainerOptions, Seq2SeqTrainingArguments):
    """What a script over a trainer that generates can be told."""


@dataclass(frozen=True)
class TrainerJob:
    """What a script trains, on what, and how it is scored.

    Attributes:
        model: A transformers model.
        processor: Its tokenizer, feature extractor, image processor or all of them; saved with it.
        data: The samples of ``train`` and ``validation``, as far as they are needed.
        collate_fn: Makes a batch of samples; ``None`` for the trainer's own.
        compute_metrics: As transformers' trainers take it.
        logits_for_metrics: Their ``preprocess_logits_for_metrics``.
        main_metric: The score that says most.
        trainer: Class of the trainer, which the pipeline is put under.
        callbacks: Further ones of the trainer.
    """

    model: Any
    processor: Any
    data: Mapping[str, Dataset[Any]]
    collate_fn: Collator | None = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    logits_for_metrics: Callable[[Any, Any], Any] | None = None
    main_metric: str = "loss"
    trainer: type[Trainer] = Trainer
    callbacks: Sequence[TrainerCallback] = ()


_newest = partial(newest_checkpoint, run_of=run_of_trainer_checkpoint)


def run_trainer(options: TrainerOptions, job: TrainerJob) -> Trainer:
    """Train and evaluate as the options say; write results, model and plan.

    Returns:
        The trainer, closed.
    """
    base = job.trainer
    kind = base if options.unsplit else type(base.__name__, (PipelineMixin, base), {})
    trainer = kind(
        job.model,
        options,
        job.collate_fn,
        train_dataset=job.data.get("train"),
        eval_dataset=job.data.get("validation"),
        processing_class=job.processor,
        compute_metrics=job.compute_metrics,
        preprocess_logits_for_metrics=job.logits_for_metrics,
        callbacks=[*job.callbacks],
    )
    try:
        with naming_ids(job.model, DatasetError):  # those of --unsplit are torch's own
            _run(options, job, trainer)
    finally:
        if isinstance(trainer, PipelineMixin):
            trainer.close()
    return trainer


def _run(options: TrainerOptions, job: TrainerJob, trainer: Trainer) -> None:
    if options.do_train:
        path = find_resume_checkpoint(options, _newest)
        result = trainer.train(resume_from_checkpoint=path and str(path))
        trainer.save_model()
        trainer.save_state()
        write_results(options, "train", result.metrics)
    if options.do_eval:
        scores = trainer.evaluate()
        write_results(options, "eval", scores)
        # with --prediction_loss_only there is no other score
        name = job.main_metric if f"eval_{job.main_metric}" in scores else "loss"
        say(f"{name} {scores[f'eval_{name}']:.4g} on {len(job.data['validation'])} samples")
    plan = getattr(trainer, "plan", None)
    if plan is not None and is_first():
        plan.save(options.folder / "plan.json")
