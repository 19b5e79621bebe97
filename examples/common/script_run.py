"""What the scripts do alike: check the folder, plan, hand over the options, end with one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import typer
from plan_report import local_note, say
from script_options import CommonOptions, as_command
from torch import Tensor

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig, find_config
from ipu_pipeline.errors import DatasetError, PipelineError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.train import TrainingArguments

_Options = TypeVar("_Options", bound=CommonOptions)
_Rows = TypeVar("_Rows")


def check_output_dir(options: CommonOptions) -> None:
    """Refuse to train into a folder that holds another run."""
    folder = options.output_dir
    fresh = options.do_train and options.resume_from_checkpoint is None
    if fresh and not options.overwrite_output_dir and folder.is_dir() and any(folder.iterdir()):
        raise PipelineError(
            f"{folder} is not empty; resume with --resume_from_checkpoint latest, start over with "
            "--overwrite_output_dir, or choose another --output_dir"
        )


def split_of(
    stored: Mapping[str, _Rows], split: str, options: CommonOptions, file: str = "file"
) -> _Rows:
    """Return one part of the data set that ``--dataset_name`` names.

    Args:
        stored: All parts.
        split: ``train`` or ``validation``.
        options: The command line.
        file: What to write instead, for the message.

    Raises:
        DatasetError: There is no such part.
    """
    if split not in stored:
        raise DatasetError(
            f"data set {options.dataset_name!r} has no split {split!r}, only {', '.join(stored)}; "
            f"write that part to a {file} and pass both by --train_file and --validation_file"
        )
    return stored[split]


def read_ipu_config(options: CommonOptions) -> IPUConfig | None:
    """Return the configuration that the IPU options describe, ``None`` when all are absent."""
    name, overrides = options.ipu_config_name, options.ipu_config_overrides
    if name is None and not overrides and options.pod_type is None:
        return None
    config = IPUConfig() if name is None else find_config(name)
    return config.apply_overrides(overrides).for_pod(options.pod_type)


def make_plan(
    options: CommonOptions,
    model: Any,
    columns: Mapping[str, Tensor],
    config: IPUConfig | None,
    constraints: Constraints | None = None,
) -> Plan:
    """Read the plan of ``--plan``, or find the best split.

    Args:
        options: The command line.
        model: With a loss for ``columns``.
        columns: Samples of the data, at least as many as a microbatch holds where there are so
            many; axis 0 counts them.
        config: What :func:`read_ipu_config` gave, adapted to the model or not.
        constraints: Further limits.
    """
    if options.plan is not None:
        return Plan.load(options.plan)
    microbatches = options.gradient_accumulation_steps
    if microbatches is None:
        microbatches = 1 if config is None else config.gradient_accumulation_steps
    replicas = 1 if config is None else config.replicas()
    if config is not None and options.target == "local":
        replicas = 1
        if note := local_note(config):
            say(note)
    pod = options.pod_type if options.target == "poptorch" else None
    size = microbatch_size(options)
    return ipp.plan(
        model,
        {name: column[:size] for name, column in columns.items()},
        machine=options.machine or pod or "local",
        num_stages=options.num_stages,
        microbatches=microbatches,
        replicas=replicas,
        schedule=options.schedule,
        costs=options.costs,
        config=config,
        constraints=constraints,
    )


def microbatch_size(options: CommonOptions) -> int:
    """Return the samples of a microbatch that a plan is made for."""
    if options.do_train:
        return options.per_device_train_batch_size
    return options.per_device_eval_batch_size


def training_arguments(
    options: CommonOptions, config: IPUConfig | None, *, microbatches: int, replicas: int
) -> TrainingArguments:
    """Hand over every option that ``TrainingArguments`` has a field for.

    Args:
        options: The command line.
        config: What :func:`make_plan` was given.
        microbatches: Of an optimizer step, where the options do not say.
        replicas: Of the plan.
    """
    names = {item.name for item in fields(TrainingArguments)} & {f.name for f in fields(options)}
    given: dict[str, Any] = {name: getattr(options, name) for name in sorted(names)}
    given |= {"output_dir": str(options.output_dir), "replicas": replicas}
    if options.gradient_accumulation_steps is None:
        given["gradient_accumulation_steps"] = microbatches
    if config is not None and options.target == "distributed":
        given["replicated_tensor_sharding"] = config.replicated_tensor_sharding
    return TrainingArguments(**given)


def run_command_line(run: Callable[[_Options], None], kind: type[_Options]) -> None:
    """Run the command line; an error that the user can act on is one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(as_command(run, kind))
    try:
        app()
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")
