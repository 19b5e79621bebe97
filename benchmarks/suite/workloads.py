"""``workloads.yaml`` as checked dataclasses; its comments say what the fields mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.stage_models import MODELS

FILE = Path(__file__).resolve().parent.parent / "workloads.yaml"
KINDS = ("eager", "compiled", "local", "distributed", "ddp", "raw")
# Kinds that run in one process per core; the others use all cores from one.
MANY_PROCESSES = ("distributed", "ddp", "raw")
PRECISIONS = ("float32", "bf16")
T = TypeVar("T")


class WorkloadError(ValueError):
    """``workloads.yaml`` says what cannot be run."""


def _one_of(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in known:
        raise WorkloadError(f"unknown {what} {name!r}; use one of {'; '.join(known)}")


def _each_of(what: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]) -> None:
    if not names:
        raise WorkloadError(f"no {what} is listed; use some of {'; '.join(known)}")
    for name in names:
        _one_of(what, name, known)


def _at_least_one(entry: Any, *names: str) -> None:
    for name in names:
        value = getattr(entry, name)
        if not isinstance(value, int) or value < 1:
            raise WorkloadError(f"{name} is {value!r}; use a whole number, at least 1")


@dataclass(frozen=True)
class Contestant:
    """A way to train."""

    kind: str
    stages: int = 1
    schedule: str | None = None
    quick: bool = True

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)


@dataclass(frozen=True)
class Workload:
    """A model and a batch to train it on."""

    model: str
    task: str
    config: Mapping[str, Any]
    sequence: int
    micro_batch: int
    microbatches: int
    check_microbatches: int
    precisions: Sequence[str]
    rounds: int
    limit_s: float
    contestants: Sequence[str]
    quick: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "sequence", "micro_batch", "microbatches", "rounds")
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
    microbatches: int
    steps: int
    contestants: Sequence[str]
    quick: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _at_least_one(self, "microbatches", "steps")


@dataclass(frozen=True)
class Planning:
    """A model that is captured and planned."""

    model: str
    task: str
    config: Mapping[str, Any]
    sequence: int
    micro_batch: int
    stages: int
    microbatches: int
    rounds: int
    quick: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "sequence", "micro_batch", "stages", "microbatches", "rounds")


@dataclass(frozen=True)
class Solving:
    """Chains for the solver."""

    lengths: Sequence[int]
    devices: int
    tight: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "devices")

    @property
    def name(self) -> str:
        """What results are filed under."""
        blocks = "+".join(map(str, self.lengths))
        return f"{blocks} blocks, {self.devices} devices" + (", tight memory" if self.tight else "")


@dataclass(frozen=True)
class Stages:
    """Models whose stage times are predicted and measured."""

    models: Sequence[str]
    steps: int
    quick_models: Sequence[str]

    def __post_init__(self) -> None:
        _at_least_one(self, "steps")
        _each_of("model", self.models, MODELS)
        _each_of("model", self.quick_models, MODELS)


@dataclass(frozen=True)
class Kernels:
    """How often operations are timed."""

    rounds: int
    quick_rounds: int

    def __post_init__(self) -> None:
        _at_least_one(self, "rounds", "quick_rounds")


@dataclass(frozen=True)
class Suite:
    """Everything that is measured."""

    cores: int
    quick_rounds: int
    contestants: Mapping[str, Contestant]
    workloads: Mapping[str, Workload]
    memory: Sequence[Memory]
    planning: Mapping[str, Planning]
    solver: Sequence[Solving]
    stages: Stages
    kernels: Kernels

    def __post_init__(self) -> None:
        _at_least_one(self, "cores", "quick_rounds")
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
    given = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    for name, kind in (
        ("contestants", Contestant),
        ("workloads", Workload),
        ("planning", Planning),
    ):
        entries = given.get(name, {}).items()
        given[name] = {key: _make(kind, entry, f"{name}: {key}") for key, entry in entries}
    for name, kind in {"memory": Memory, "solver": Solving}.items():
        given[name] = [_make(kind, entry, name) for entry in given.get(name, ())]
    for name, kind in {"stages": Stages, "kernels": Kernels}.items():
        if name in given:
            given[name] = _make(kind, given[name], name)
    return _make(Suite, given, path.name)


def _make(kind: type[T], given: Mapping[str, Any], where: str) -> T:
    known = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise WorkloadError(
            f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(known)}"
        )
    missing = [
        name
        for name, each in known.items()
        if name not in given and each.default is dataclasses.MISSING
    ]
    if missing:
        raise WorkloadError(f"{where}: {', '.join(missing)} is missing")
    try:
        return kind(**given)
    except WorkloadError as error:
        raise WorkloadError(f"{where}: {error}") from None
