"""The command line of the scripts: one field per option, under transformers' own spelling.

A field ``max_seq_length`` is the option ``--max_seq_length``; its text is the option's help. A
second text names an environment variable that the default is taken from; ``ipu-pipeline launch``
sets it. A script adds the fields of its task in a subclass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

import typer


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every script can be told: model, data, training, and where it runs."""

    file_format: ClassVar[str] = "a data file"

    model_name_or_path: Annotated[str, "Hub name or local folder."]
    output_dir: Annotated[Path, "Where checkpoints, predictions and results go."]
    # ---- data
    dataset_name: Annotated[str | None, "Data set of the hub."] = None
    dataset_config_name: Annotated[str | None, "Its configuration."] = None
    train_file: Annotated[Path | None, "File to train on."] = None
    validation_file: Annotated[Path | None, "File to evaluate on."] = None
    max_train_samples: Annotated[int | None, "Use only the first samples to train."] = None
    max_eval_samples: Annotated[int | None, "Use only the first samples to evaluate."] = None
    dataloader_num_workers: Annotated[int, "Processes that prepare batches."] = 0
    dataloader_drop_last: Annotated[bool, "Drop a last batch smaller than the others."] = False
    # ---- what to do
    do_train: Annotated[bool, "Train."] = False
    do_eval: Annotated[bool, "Evaluate, after training if there is any."] = False
    eval_before_training: Annotated[bool, "Evaluate before training as well."] = False
    # ---- training
    num_train_epochs: Annotated[float, "Passes over the training data."] = 3.0
    max_steps: Annotated[int, "Optimizer steps in all; -1 follows num_train_epochs."] = -1
    per_device_train_batch_size: Annotated[int, "Samples of a microbatch."] = 8
    per_device_eval_batch_size: Annotated[int, "Samples of an evaluation microbatch."] = 8
    gradient_accumulation_steps: Annotated[
        int | None, "Microbatches per optimizer step; default: the IPU configuration's, or 1."
    ] = None
    learning_rate: Annotated[float, "Peak learning rate of AdamW."] = 5e-5
    lr_scheduler_type: Annotated[str, "A schedule that transformers knows."] = "linear"
    warmup_ratio: Annotated[float, "Share of the steps that warm up."] = 0.0
    weight_decay: Annotated[float, "Of weights, not of biases and norms."] = 0.0
    max_grad_norm: Annotated[float, "Clip the gradients of all stages; 0 for no clipping."] = 1.0
    fp16: Annotated[bool, "Compute in float16, with --loss_scaling."] = False
    bf16: Annotated[bool, "Compute in bfloat16."] = False
    loss_scaling: Annotated[float, "Static factor of the loss; used with --fp16."] = 1.0
    seed: Annotated[int, "Of the new head's weights, the data's order, and dropout."] = 42
    logging_steps: Annotated[int, "Log every so many steps."] = 500
    save_steps: Annotated[int, "Save a checkpoint every so many steps."] = 500
    save_total_limit: Annotated[int | None, "Checkpoints to keep; default all."] = None
    resume_from_checkpoint: Annotated[
        str | None, "A checkpoint folder; 'latest'; or 'auto': latest if there is one."
    ] = None
    overwrite_output_dir: Annotated[bool, "Train into a folder that is not empty."] = False
    disable_tqdm: Annotated[bool, "No progress bar."] = False
    # ---- where and how it runs
    target: Annotated[
        str, "What runs the plan: local, distributed or poptorch.", "IPU_PIPELINE_TARGET"
    ] = "local"
    machine: Annotated[
        str | None, "Machine to plan for; default: the pod with --target poptorch, else local."
    ] = None
    num_stages: Annotated[int | None, "Pipeline stages; default: every device."] = None
    schedule: Annotated[
        str | None, "1f1b, gpipe, ...; default: the plan's.", "IPU_PIPELINE_SCHEDULE"
    ] = None
    costs: Annotated[str, "Prices of the blocks: analytic, or profiled here."] = "analytic"
    plan: Annotated[Path | None, "Run this plan.json instead of planning.", "IPU_PIPELINE_PLAN"] = (
        None
    )
    ipu_config_name: Annotated[
        str | None, "Published name such as Graphcore/bert-base-ipu, or a local ipu_config.json."
    ] = None
    ipu_config_overrides: Annotated[str, "Changes to it: a=1,b=[0.2 0.3],c=true."] = ""
    pod_type: Annotated[str | None, "Such as pod16: chooses the number of replicas."] = None

    def __post_init__(self) -> None:
        """Refuse combinations that leave nothing to do or contradict each other."""
        for wrong, message in self._mistakes():
            if wrong:
                raise ValueError(message)

    @property
    def evaluates(self) -> bool:
        """Whether validation samples are needed."""
        return self.do_eval or self.eval_before_training

    @property
    def splits(self) -> tuple[str, ...]:
        """Parts of the data that are needed."""
        needed = {"train": self.do_train, "validation": self.evaluates}
        return tuple(split for split, wanted in needed.items() if wanted)

    def source(self, split: str) -> tuple[Path | None, int | None]:
        """Return the file of ``train`` or ``validation``, and how many of its samples to use."""
        if split == "train":
            return self.train_file, self.max_train_samples
        return self.validation_file, self.max_eval_samples

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        hub = self.dataset_name is not None
        planned = [n for n in ("machine", "num_stages", "ipu_config_name") if getattr(self, n)]
        names = " and ".join(f"--{name}" for name in planned)
        return (
            (not (self.do_train or self.evaluates), "nothing to do: give --do_train or --do_eval"),
            (
                hub and (self.train_file is not None or self.validation_file is not None),
                f"--dataset_name {self.dataset_name} and --train_file or --validation_file are "
                "both given; give one of them",
            ),
            (
                self.do_train and not hub and self.train_file is None,
                f"--do_train needs --train_file ({self.file_format}) or --dataset_name",
            ),
            (
                self.evaluates and not hub and self.validation_file is None,
                f"evaluating needs --validation_file ({self.file_format}) or --dataset_name",
            ),
            (
                self.target == "distributed" and self.plan is None,
                "--target distributed runs in processes that share one plan: give --plan, or start "
                "with ipu-pipeline launch plan.json -- SCRIPT ...",
            ),
            (
                self.plan is not None and bool(planned),
                f"--plan {self.plan} already decides what {names} would; leave {names} out",
            ),
        )


_Options = TypeVar("_Options", bound=CommonOptions)


def described_fields(kind: type[CommonOptions]) -> list[tuple[Field[Any], tuple[Any, ...]]]:
    """Return every field of ``kind`` with type, help text, and its variable if any."""
    hints = get_type_hints(kind, include_extras=True)
    return [(item, get_args(hints[item.name])) for item in fields(kind)]


def as_command(run: Callable[[_Options], Any], kind: type[_Options]) -> Callable[..., None]:
    """Return a function that typer turns into the command line of the options ``kind``."""

    def command(**values: Any) -> None:
        run(kind(**values))

    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=Annotated[
                given, typer.Option(_flag(item), help=text, envvar=variable or None)
            ],
        )
        for item, (given, text, *variable) in described_fields(kind)
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    command.__doc__ = run.__doc__
    return command


def _flag(item: Field[Any]) -> str:
    """Return how a field is spelled; what is on by default can be switched off, as transformers."""
    return f"--{item.name}/--no_{item.name}" if item.default is True else f"--{item.name}"
