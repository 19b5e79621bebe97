"""What the scripts do alike: check the folder, choose the data, plan, write results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from plan_report import is_first, local_note, say
from script_options import CommonOptions, DataOptions
from torch import Tensor

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig, find_config
from ipu_pipeline.errors import DatasetError, PipelineError
from ipu_pipeline.ir.codec import from_json, read_json
from ipu_pipeline.ir.files import make_folder, write_text
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.train.output_folder import is_used

_Rows = TypeVar("_Rows")


def check_output_dir(options: DataOptions) -> None:
    """Make the folder; refuse one that holds another run, or may not be written."""
    folder = options.folder
    fresh = options.do_train and options.resume_from_checkpoint is None
    make_folder("--output_dir", folder)
    if fresh and not options.overwrite_output_dir and is_used(folder):
        raise PipelineError(
            f"{folder} is not empty; resume with --resume_from_checkpoint latest, start over with "
            "--overwrite_output_dir, or choose another --output_dir"
        )


def split_of(
    stored: Mapping[str, _Rows], split: str, options: DataOptions, file: str = "file"
) -> _Rows:
    """Return one part of the data set that ``--dataset_name`` names.

    Args:
        stored: All parts.
        split: ``train`` or ``validation``; ``validation_matched`` is one, too.
        options: The command line.
        file: What to write instead, for the message.

    Raises:
        DatasetError: There is no such part.
    """
    named = [name for name in (split, f"{split}_matched") if name in stored]
    if not named:
        raise DatasetError(
            f"data set {options.dataset_name!r} has no split {split!r}, only {', '.join(stored)}; "
            f"write that part to a {file} and pass both by --train_file and --validation_file"
        )
    return stored[named[0]]


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

    ``columns`` are samples of the data, for which the model computes a loss: at least as many as a
    microbatch holds where there are so many; axis 0 counts them.
    """
    if options.plan is not None:
        return Plan.load(options.plan)
    microbatches = options.gradient_accumulation_steps
    if microbatches is None and (config is not None or options.target != "poptorch"):
        microbatches = 1 if config is None else config.accumulation()
    replicas = 1 if config is None else config.replicas()
    if config is not None and options.target == "local":
        replicas = 1
        if note := local_note(config):
            say(note)
    size = microbatch_size(options)
    return ipp.plan(
        model,
        {name: column[:size] for name, column in columns.items()},
        machine=machine_of(options, config),
        num_stages=options.num_stages,
        microbatches=microbatches,
        replicas=replicas,
        schedule=options.schedule,
        costs=options.costs,
        config=config,
        constraints=constraints,
    )


def machine_of(options: CommonOptions, config: IPUConfig | None) -> str:
    """Return the machine that is asked for; on IPUs else the pod or as many as are needed."""
    if options.machine is not None or options.target != "poptorch":
        return options.machine or "local"
    needed = (options.num_stages or 1) if config is None else config.num_ipus() * config.replicas()
    return options.pod_type or f"pod{needed}"


def microbatch_size(options: CommonOptions) -> int:
    """Return the samples of a microbatch that a plan is made for."""
    if options.do_train:
        return options.per_device_train_batch_size
    return options.per_device_eval_batch_size


def follow_plan(options: CommonOptions, plan: Plan, config: IPUConfig | None) -> None:
    """Fill in what the options leave to the plan and to the IPU configuration."""
    options.replicas = plan.replicas
    if options.gradient_accumulation_steps is None:
        options.gradient_accumulation_steps = plan.num_microbatches
    if config is not None and options.target == "distributed":
        options.replicated_tensor_sharding = config.replicated_tensor_sharding


def write_results(options: DataOptions, split: str, scores: Mapping[str, Any]) -> None:
    """Let the first process write ``<split>_results.json``, and update ``all_results.json``."""
    if not is_first():
        return
    combined = options.folder / "all_results.json"
    for path, found in (
        (options.folder / f"{split}_results.json", scores),
        (combined, {**_written_before(combined), **scores}),
    ):
        write_text(path, json.dumps(dict(found), indent=4, sort_keys=True) + "\n")


def _written_before(combined: Path) -> dict[str, Any]:
    """Return the results that are in a file; none, with a line, if it is damaged."""
    if not combined.exists():
        return {}
    try:
        return from_json(dict[str, Any], read_json(combined, "earlier results", DatasetError),
                         str(combined), DatasetError)  # fmt: skip
    except DatasetError as error:
        say(f"begun anew: {error}")
        return {}
