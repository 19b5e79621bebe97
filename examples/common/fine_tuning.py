"""From options to a trained and evaluated model: the part that is the same for every task.

A script loads its model and data, says how it is scored, and calls :func:`fine_tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

from plan_report import TimedExecutable, describe, is_first, measured_against_predicted, say
from script_options import CommonOptions, DataOptions
from script_run import (
    check_output_dir,
    follow_plan,
    make_plan,
    microbatch_size,
    write_results,
)
from torch import Tensor
from torch.utils.data import Dataset

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train import build_optimizer, train
from ipu_pipeline.train.data import Collator
from ipu_pipeline.train.output_folder import locked

Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a script trains, on what, and how it is scored.

    Attributes:
        model: A transformers model.
        tokenizer: Saved beside it.
        train_data: Samples to train on; ``None`` not to train.
        example: Returns the first so many samples as the batch that planning looks at.
        evaluate: Returns the scores of the model as it is now.
        in_words: Returns scores as a line.
        collate_fn: Makes a batch of samples; ``None`` for that of transformers' Trainer.
        ipu_config: Where the options name one: what to plan with and train by.
        constraints: Further limits of the split.
    """

    model: Any
    tokenizer: Any
    train_data: Dataset[Any] | None
    example: Callable[[int], Mapping[str, Tensor]]
    evaluate: Callable[[Executable], Scores]
    in_words: Callable[[Scores], str]
    collate_fn: Collator | None = None
    ipu_config: IPUConfig | None = None
    constraints: Constraints | None = None


def prepare(options: DataOptions) -> None:
    """Check the output folder, seed everything, and let transformers say less.

    Raises:
        PipelineError: The folder holds another run.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading and saving files
    if not is_first():
        set_verbosity_error()  # type: ignore[no-untyped-call]  # the first process says the same
    check_output_dir(options)
    set_seed(options.seed)  # the new head's weights


def fine_tune(options: CommonOptions, job: Job) -> None:
    """Plan, compile, train and evaluate as the options say; write results, model and plan.

    Raises:
        CheckpointError: Another process writes into the output folder.
    """
    with locked(options.folder) if is_first() else nullcontext():
        _fine_tune(options, job)


def _fine_tune(options: CommonOptions, job: Job) -> None:
    columns = job.example(microbatch_size(options))
    plan = make_plan(options, job.model, columns, job.ipu_config, constraints=job.constraints)
    say(describe(plan))
    follow_plan(options, plan, job.ipu_config)
    run_options = asdict(options.execution_options(schedule=options.schedule))
    if options.target == "poptorch":  # what the plan does not say: output mode, cache, ...
        run_options["ipu_config"] = job.ipu_config
    executable = ipp.compile(
        job.model,
        plan,
        target=options.target,
        optimizer=build_optimizer(job.model, options) if options.do_train else None,
        **run_options,
    )
    try:
        evaluate_before(options, job, executable)
        if job.train_data is not None:
            _train(options, job, executable)
        evaluate_after(options, job, executable)
        if is_first():
            plan.save(options.folder / "plan.json")
    finally:
        executable.close()


def _train(options: CommonOptions, job: Job, executable: Executable) -> None:
    """Train, compare the times with the plan's, and write results and the model."""
    assert job.train_data is not None
    timed = TimedExecutable(executable)
    result = train(
        cast(Executable, timed),
        job.train_data,
        options,
        collate_fn=job.collate_fn,
        tokenizer=job.tokenizer,
    )
    write_results(options, "train", result.metrics)
    if is_first():
        result.state.save_to_json(str(options.folder / "trainer_state.json"))
    say(measured_against_predicted(executable.plan, timed))
    save_model(options, job, executable)


def evaluate_before(options: CommonOptions, job: Job, executable: Executable) -> None:
    """Print and write the scores before training, if they are asked for."""
    if options.eval_before_training:
        scores = job.evaluate(executable)
        say(f"before training: {job.in_words(scores)}")
        write_results(options, "before", {f"before_{name}": scores[name] for name in scores})


def evaluate_after(options: CommonOptions, job: Job, executable: Executable) -> None:
    """Print and write the scores in the end, if they are asked for."""
    if options.do_eval:
        scores = job.evaluate(executable)
        say(f"{'after training' if options.do_train else 'result'}: {job.in_words(scores)}")
        write_results(options, "eval", scores)


def save_model(options: CommonOptions, job: Job, executable: Executable) -> None:
    """Write the model and its tokenizer, if this is the process that writes."""
    weights = executable.state_dict()  # of all processes, so all of them ask
    if is_first():
        job.model.save_pretrained(options.folder, state_dict=weights)
        job.tokenizer.save_pretrained(options.folder)
