"""Benchmarks of several processes: one command starts them, steps are timed side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch.distributed as dist

Step = Callable[[], object]
T = TypeVar("T")


def is_started() -> bool:
    """Whether this process is one of a job that :func:`start` (or torchrun) made."""
    return "RANK" in os.environ


def start(module: str, processes: int, arguments: Sequence[str], *, threads: int = 1) -> int:
    """Run a module of this folder under torchrun on this machine; return the exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


def from_first(make: Callable[[], T]) -> T:
    """Return what ``make`` gives on the first process, on all of them."""
    found: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    made: T = found[0]
    return made


@dataclass
class Times:
    """What the timed steps of one contestant took.

    Attributes:
        seconds: From when all processes begin until all have ended, by round.
        cpu_s: Processor seconds of this process, by round: the load of the machine hardly
            matters to them.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self, step: Step) -> None:
        """Take one step and note its times. Every process of a job must call this."""
        _together()
        begin, cpu = perf_counter(), process_time()
        step()
        self.cpu_s.append(process_time() - cpu)
        _together()
        self.seconds.append(perf_counter() - begin)

    def cpu_by_rank(self) -> list[float]:
        """Return the median processor seconds of every process."""
        return everyones(median(self.cpu_s))


def interleaved(steps: Mapping[str, Step], rounds: int, warmup: int = 2) -> dict[str, Times]:
    """Time every contestant in every round; each round begins with another one.

    The load of the machine falls on all alike. Every process must call this.

    Args:
        steps: What to time, by name.
        rounds: Rounds that count.
        warmup: Rounds before them (captures, first messages).
    """
    times = {name: Times() for name in steps}
    for number, order in enumerate(rotations(list(steps), warmup + rounds)):
        for name in order:
            (times[name] if number >= warmup else Times()).run(steps[name])
    return times


def rotations(names: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """Yield the names once per round; each round begins with another one."""
    for number in range(1, rounds + 1):
        first = number % len(names)
        yield [*names[first:], *names[:first]]


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


def everyones(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def ratio(seconds: Sequence[float], of: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the rounds' ratios ``seconds / of``."""
    return spread([a / b for a, b in zip(seconds, of, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles; of one value, three times that."""
    if len(values) < 2:
        return {"low": values[0], "median": values[0], "high": values[0]}
    quarter = quantiles(values, n=4, method="inclusive")
    return {"low": quarter[0], "median": median(values), "high": quarter[2]}
