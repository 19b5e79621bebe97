"""The command line of the scripts: transformers' training arguments, ours, and the scripts' own.

A field ``max_seq_length`` is the option ``--max_seq_length``. A script adds the fields of its task
in a subclass. ``ipu-pipeline launch`` sets the variables that some defaults are taken from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from transformers.hf_argparser import HfArgumentParser

from ipu_pipeline.errors import PipelineError, printable
from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.arguments import option, unread_by_the_loop

_TRANSFORMERS = frozenset(item.name for item in fields(TrainingArguments))


@dataclass(kw_only=True)
class DataOptions(TrainingArguments):
    """What every script can be told: model, data and training."""

    file_format: ClassVar[str] = "a data file"
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"doc_stride"})

    model_name_or_path: str = option(help="Hub name or local folder.")
    output_dir: str = option(help="Where checkpoints, predictions and results go.")
    overwrite_output_dir: bool = option(
        default=False, help="Train into a folder that is not empty."
    )
    dataset_name: str | None = option(default=None, help="Data set of the hub.")
    dataset_config_name: str | None = option(default=None, help="Its configuration.")
    train_file: Path | None = option(default=None, help="File to train on.")
    validation_file: Path | None = option(default=None, help="File to evaluate on.")
    max_train_samples: int | None = option(
        default=None, help="Use only the first samples to train."
    )
    max_eval_samples: int | None = option(
        default=None, help="Use only the first samples to evaluate."
    )

    def __post_init__(self) -> None:
        """Refuse combinations that leave nothing to do or contradict each other."""
        super().__post_init__()
        for name in {item.name for item in fields(self)} - _TRANSFORMERS:
            value, least = getattr(self, name), 0 if name in self.may_be_zero else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for wrong, message in self._mistakes():
            if wrong:
                raise ValueError(message)

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

    @property
    def evaluates(self) -> bool:
        """Whether validation samples are needed."""
        return self.do_eval

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        hub = self.dataset_name is not None
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
        )


@dataclass(kw_only=True)
class CommonOptions(DataOptions):
    """What a script over the thin loop can be told besides: where and how it runs."""

    gradient_accumulation_steps: int | None = option(
        default=None,
        help="Microbatches per optimizer step; default: the IPU configuration's; "
        "without one 1, on IPUs what the planner takes.",
    )
    disable_tqdm: bool = option(default=False, help="No progress bar and no lines of the loop.")
    eval_before_training: bool = option(default=False, help="Evaluate before training as well.")
    target: str = option(
        default_factory=partial(os.environ.get, "IPU_PIPELINE_TARGET", "local"),
        help="What runs the plan: local, distributed or poptorch.",
    )
    schedule: str | None = option(
        default_factory=partial(os.environ.get, "IPU_PIPELINE_SCHEDULE"),
        help="1f1b, gpipe, ...; default: the plan's.",
    )
    plan: str | None = option(
        default_factory=partial(os.environ.get, "IPU_PIPELINE_PLAN"),
        help="Run this plan.json instead of planning.",
    )
    ipu_config_name: str | None = option(
        default=None,
        help="Published name such as Graphcore/bert-base-ipu, or a local ipu_config.json.",
    )
    ipu_config_overrides: str = option(default="", help="Changes to it: a=1,b=[0.2 0.3],c=true.")
    pod_type: str | None = option(
        default=None, help="Such as pod16: chooses the number of replicas."
    )
    n_ipu: int | None = option(
        default=None, help="IPUs of the pod, as later releases of optimum-graphcore say it."
    )

    def __post_init__(self) -> None:
        """Read the pod from either of its two options."""
        super().__post_init__()
        if self.n_ipu is not None:
            self.pod_type = f"pod{self.n_ipu}"

    @property
    def evaluates(self) -> bool:
        """Whether validation samples are needed."""
        return self.do_eval or self.eval_before_training

    def _mistakes(self) -> tuple[tuple[bool, str], ...]:
        planned = [n for n in ("machine", "num_stages", "ipu_config_name") if getattr(self, n)]
        names = " and ".join(f"--{name}" for name in planned)
        unread = " and ".join(f"--{name}" for name in unread_by_the_loop(self))
        return (
            *super()._mistakes(),
            (
                self.n_ipu is not None and self.pod_type is not None,
                f"--n_ipu {self.n_ipu} and --pod_type {self.pod_type} say the same; give one",
            ),
            (bool(unread), f"this script does nothing with {unread}; leave {unread} out"),
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


_Options = TypeVar("_Options", bound=DataOptions)


def parse(kind: type[_Options], arguments: list[str] | None = None) -> _Options:
    """Return the options of a command line; ``None`` reads that of this process.

    Raises:
        ValueError: There is no such option, or options contradict each other.
    """
    parser = HfArgumentParser(kind, allow_abbrev=False)  # type: ignore[arg-type]
    (options,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    found: _Options = options
    return found


def run_command_line(run: Callable[[_Options], None], kind: type[_Options]) -> None:
    """Run the command line; an error that the user can act on is one line."""
    try:
        run(parse(kind))
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except OSError as error:
        sys.exit(f"error: {printable(str(error))}; make room, or write elsewhere")
