"""``workloads.yaml`` as checked dataclasses; its comments say what the fields mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from benchmarks.stage_models import MODELS
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.codec import Amount, from_json
from ipu_pipeline.ir.files import read_text
from ipu_pipeline.ir.yaml_text import parse_yaml

FILE = Path(__file__).resolve().parent.parent / "workloads.yaml"
Kind = Literal["eager", "compiled", "local", "distributed", "ddp", "raw"]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
# Kinds that run in one process per core; the others use all cores from one.
MANY_PROCESSES = ("distributed", "ddp", "raw")
PRECISIONS = ("float32", "bf16")
T = TypeVar("T")


class WorkloadError(PipelineError):
    """``workloads.yaml`` says what cannot be run."""


def _one_of(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in known:
        raise WorkloadError(f"unknown {what} {name!r}; use one of {'; '.join(known)}")


def _each_of(what: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    if not names:
        raise WorkloadError(f"no {what} is listed; use some of {'; '.join(known)}")
    for name in names:
        _one_of(what, name, known)


@dataclass(frozen=True)
class Contestant:
    """A way to train."""

    kind: Kind
    stages: AtLeastOne = 1
    replicas: AtLeastOne = 1
    schedule: str | None = None
    quick: bool = True


@dataclass(frozen=True)
class Workload:
    """A model and a batch to train it on."""

    model: str
    task: str
    config: Mapping[str, Any]
    sequence: AtLeastOne
    micro_batch: AtLeastOne
    microbatches: AtLeastOne
    check_microbatches: AtLeastOne
    precisions: Sequence[str]
    rounds: AtLeastOne
    limit_s: Amount
    contestants: Sequence[str]
    quick: bool = False

    def __post_init__(self) -> None:
        _each_of("precision", self.precisions, PRECISIONS)
        if not 1 <= self.check_microbatches <= self.microbatches:
            raise WorkloadError(
                f"check_microbatches is {self.check_microbatches}; use 1 to {self.microbatches}, "
                "the microbatches of the step"
            )


@dataclass(frozen=True)
class Memory:
    """A workload whose memory is measured."""

    workload: str
    precision: str
    microbatches: AtLeastOne
    steps: AtLeastOne
    contestants: Sequence[str]
    quick: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Planning:
    """A model that is captured and planned."""

    model: str
    task: str
    config: Mapping[str, Any]
    sequence: AtLeastOne
    micro_batch: AtLeastOne
    stages: AtLeastOne
    microbatches: AtLeastOne
    rounds: AtLeastOne
    quick: bool = False


@dataclass(frozen=True)
class Solving:
    """Chains for the solver."""

    lengths: Annotated[Sequence[AtLeastOne], msgspec.Meta(min_length=1)]
    devices: AtLeastOne
    tight: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """What results are filed under."""
        blocks = "+".join(map(str, self.lengths))
        return f"{blocks} blocks, {self.devices} devices" + (", tight memory" if self.tight else "")


@dataclass(frozen=True)
class Stages:
    """Models whose stage times are predicted and measured."""

    models: Sequence[str]
    steps: AtLeastOne
    quick_models: Sequence[str]

    def __post_init__(self) -> None:
        _each_of("model", self.models, MODELS)
        _each_of("model", self.quick_models, MODELS)


@dataclass(frozen=True)
class Kernels:
    """How often operations are timed."""

    rounds: AtLeastOne
    quick_rounds: AtLeastOne


@dataclass(frozen=True)
class Suite:
    """Everything that is measured."""

    cores: AtLeastOne
    quick_rounds: AtLeastOne
    contestants: Mapping[str, Contestant]
    workloads: Mapping[str, Workload]
    memory: Sequence[Memory]
    planning: Mapping[str, Planning]
    solver: Sequence[Solving]
    stages: Stages
    kernels: Kernels

    def __post_init__(self) -> None:
        for workload in self.workloads.values():
            _each_of("contestant", workload.contestants, self.contestants)
        for memory in self.memory:
            _one_of("workload", memory.workload, self.workloads)
            _each_of("contestant", memory.contestants, self.contestants)

    def wanted(self, names: Sequence[str], *, quick: bool) -> list[str]:
        """Return the contestants to run of those listed."""
        return [name for name in names if self.contestants[name].quick or not quick]


def load(path: Path = FILE) -> Suite:
    """Read a file of workloads.

    Raises:
        WorkloadError: A field is missing, unknown, or out of range; says where and what to write.
    """
    given = from_json(dict[str, Any], _read_yaml(path), str(path), WorkloadError)
    for name, kind in (
        ("contestants", Contestant),
        ("workloads", Workload),
        ("planning", Planning),
    ):
        entries = _entries(dict[str, Any], given, name, path)
        given[name] = {
            key: from_json(kind, entry, f"{path}: {name}: {key}", WorkloadError)
            for key, entry in entries.items()
        }
    for name, kind in {"memory": Memory, "solver": Solving}.items():
        entries = _entries(list[Any], given, name, path)
        given[name] = [
            from_json(kind, entry, f"{path}: {name}[{number}]", WorkloadError)
            for number, entry in enumerate(entries)
        ]
    return from_json(Suite, given, str(path), WorkloadError)


def _entries(kind: type[T], given: Mapping[str, Any], name: str, path: Path) -> T:
    if name not in given:
        raise WorkloadError(f"{path}: missing field {name!r}")
    return from_json(kind, given[name], f"{path}: {name}", WorkloadError)


def _read_yaml(path: Path) -> Any:
    """Return what a file of YAML holds, which is what JSON can hold."""
    text = read_text(path, "the workloads", WorkloadError)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise WorkloadError(f"cannot read the workloads {path}: {error}") from error
