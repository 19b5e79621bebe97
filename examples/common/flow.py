"""From options to a trained and evaluated model: the part that is the same for every task.

A script loads its model and data, says how it is scored, and calls :func:`fine_tune`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast

import typer
from torch import Tensor
from torch.utils.data import Dataset

import ipu_pipeline as ipp
from common.options import CommonOptions, as_command
from common.report import (
    TimedExecutable,
    describe,
    is_first,
    local_note,
    measured_against_predicted,
    say,
)
from ipu_pipeline.config import IPUConfig, find_config
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.partition import Constraints
from ipu_pipeline.targets.base import Executable
from ipu_pipeline.training import TrainingArguments, build_optimizer, save_results, train
from ipu_pipeline.training.data import Collator

Scores = Mapping[str, Any]
_Options = TypeVar("_Options", bound=CommonOptions)


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
        ipu_config: The options' configuration, adapted to the model; ``None`` to leave it as it is.
        constraints: Further limits of the split.
    """

    model: Any
    tokenizer: Any
    train_data: Dataset[Any] | None
    example: Callable[[int], Mapping[str, Tensor]]
    evaluate: Callable[[Executable, TrainingArguments], Scores]
    in_words: Callable[[Scores], str]
    collate_fn: Collator | None = None
    ipu_config: IPUConfig | None = None
    constraints: Constraints | None = None


def prepare(options: CommonOptions) -> None:
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
    """Plan, compile, train and evaluate as the options say; write results, model and plan."""
    plan = make_plan(options, job)
    say(describe(plan))
    arguments = training_arguments(
        options, microbatches=plan.num_microbatches, replicas=plan.replicas
    )
    executable = ipp.compile(
        job.model,
        plan,
        target=options.target,
        optimizer=build_optimizer(job.model, arguments) if options.do_train else None,
        **asdict(arguments.execution_options(schedule=options.schedule)),
    )
    try:
        if options.eval_before_training:
            scores = job.evaluate(executable, arguments)
            say(f"before training: {job.in_words(scores)}")
            write_results(options, "before", {f"before_{name}": scores[name] for name in scores})
        if job.train_data is not None:
            _train(options, job, executable, arguments)
        if options.do_eval:
            scores = job.evaluate(executable, arguments)
            say(f"{'after training' if options.do_train else 'result'}: {job.in_words(scores)}")
            write_results(options, "eval", scores)
        if is_first():
            plan.save(options.output_dir / "plan.json")
    finally:
        executable.close()


def _train(
    options: CommonOptions, job: Job, executable: Executable, arguments: TrainingArguments
) -> None:
    """Train, compare the times with the plan's, and write the model."""
    assert job.train_data is not None
    timed = TimedExecutable(executable)
    train(
        cast(Executable, timed),
        job.train_data,
        arguments,
        collate_fn=job.collate_fn,
        tokenizer=job.tokenizer,
    )
    say(measured_against_predicted(executable.plan, timed))
    weights = executable.state_dict()  # of all processes, so all of them ask
    if is_first():
        job.model.save_pretrained(options.output_dir, state_dict=weights)
        job.tokenizer.save_pretrained(options.output_dir)


def check_output_dir(options: CommonOptions) -> None:
    """Refuse to train into a folder that holds another run."""
    folder = options.output_dir
    fresh = options.do_train and options.resume_from_checkpoint is None
    if fresh and not options.overwrite_output_dir and folder.is_dir() and any(folder.iterdir()):
        raise PipelineError(
            f"{folder} is not empty; resume with --resume_from_checkpoint latest, start over with "
            "--overwrite_output_dir, or choose another --output_dir"
        )


def make_plan(options: CommonOptions, job: Job) -> Plan:
    """Read the plan of ``--plan``, or find the best split."""
    if options.plan is not None:
        return Plan.load(options.plan)
    config = job.ipu_config or read_ipu_config(options)
    microbatches = options.gradient_accumulation_steps
    if microbatches is None:
        microbatches = 1 if config is None else config.gradient_accumulation_steps
    replicas = 1 if config is None else config.replicas()
    if config is not None and options.target == "local":
        replicas = 1
        if note := local_note(config):
            say(note)
    pod = options.pod_type if options.target == "poptorch" else None
    size = options.per_device_eval_batch_size
    if options.do_train:
        size = options.per_device_train_batch_size
    return ipp.plan(
        job.model,
        job.example(size),
        machine=options.machine or pod or "local",
        num_stages=options.num_stages,
        microbatches=microbatches,
        replicas=replicas,
        schedule=options.schedule,
        costs=options.costs,
        config=config,
        constraints=job.constraints,
    )


def read_ipu_config(options: CommonOptions) -> IPUConfig | None:
    """Return the configuration that the IPU options describe, ``None`` when all are absent."""
    name, overrides = options.ipu_config_name, options.ipu_config_overrides
    if name is None and not overrides and options.pod_type is None:
        return None
    config = IPUConfig() if name is None else find_config(name)
    return config.apply_overrides(overrides).for_pod(options.pod_type)


def training_arguments(
    options: CommonOptions, *, microbatches: int, replicas: int
) -> TrainingArguments:
    """Hand over every option that ``TrainingArguments`` has a field for."""
    names = {item.name for item in fields(TrainingArguments)} & {f.name for f in fields(options)}
    given: dict[str, Any] = {name: getattr(options, name) for name in sorted(names)}
    given |= {"output_dir": str(options.output_dir), "replicas": replicas}
    if options.gradient_accumulation_steps is None:
        given["gradient_accumulation_steps"] = microbatches
    config = read_ipu_config(options)
    if config is not None and options.target == "distributed":
        given["replicated_tensor_sharding"] = config.replicated_tensor_sharding
    return TrainingArguments(**given)


def write_results(options: CommonOptions, split: str, scores: Scores) -> None:
    """Write scores to the result files, if this is the process that writes."""
    if is_first():
        save_results(options.output_dir, split, scores)


def command_line(run: Callable[[_Options], Any], options: type[_Options]) -> None:
    """Run the command line; an error that the user can act on is one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(as_command(run, options))
    try:
        app()
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")
