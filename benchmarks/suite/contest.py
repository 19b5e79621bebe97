"""Contestants in worker processes, stepped by turns: one works, all others sleep in a read."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any

from typing_extensions import Self

from benchmarks.processes import rotations
from benchmarks.suite.workloads import MANY_PROCESSES, Contestant, Suite, Workload

ROOT = Path(__file__).resolve().parent.parent.parent
# Relative difference of losses without dropout that rounding explains.
TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
_LOOK_S = 1.0


class ContestError(RuntimeError):
    """A contestant failed, or computes something else than the first one."""


@dataclass(frozen=True)
class Contest:
    """What a contest found.

    Attributes:
        seconds: Of every step, by contestant; entry ``i`` of all is of one round.
        losses: Of the first, small batch without dropout.
        unavailable: Why a contestant did not run.
    """

    seconds: Mapping[str, list[float]]
    losses: Mapping[str, float]
    unavailable: Mapping[str, str]


class Team:
    """The processes of some contestants.

    Args:
        workload: What they train.
        precision: How.
        processes: How many.
        threads: Of each.
    """

    def __init__(self, workload: Workload, precision: str, processes: int, threads: int) -> None:
        job = {"workload": asdict(workload), "precision": precision, "threads": threads}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the team
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        port = str(_free_port())
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.suite.worker", json.dumps(job)],
                env={**environment, **(_place(rank, processes, port) if processes > 1 else {})},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for rank in range(processes)
        ]

    def ask(self, do: str, name: str, **arguments: Any) -> Any:
        """Tell all processes to do something; return what the first one answers.

        Raises:
            ContestError: One of them ended.
        """
        command = json.dumps({"do": do, "name": name, "with": arguments})
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(command + "\n")
                process.stdin.flush()
            answers = [self._answer(process) for process in self._processes]
        except (EOFError, BrokenPipeError):
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")
            raise ContestError(
                f"{name} failed in {do!r}; its process said:\n{said[-3000:]}"
            ) from None
        return answers[0]

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        # Others may wait for one that has ended, for ever.
        while not select.select([process.stdout], [], [], _LOOK_S)[0]:
            if any(each.poll() is not None for each in self._processes):
                raise EOFError
        line = process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def __enter__(self) -> Self:
        """Return the team; leaving the block ends its processes."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._log.close()


def contest(suite: Suite, workload: Workload, precision: str, rounds: int) -> Contest:
    """Check that the contestants of a workload compute the same, then time them by turns.

    Each round begins with another contestant. No round is begun after the workload's limit, once
    there are two.

    Raises:
        ContestError: One of them failed, or has another loss than the first one.
    """
    with ExitStack() as stack:
        teams: dict[bool, Team] = {}
        places: dict[str, Team] = {}
        unavailable: dict[str, str] = {}
        for name in workload.contestants:
            contestant = suite.contestants[name]
            several = contestant.kind in MANY_PROCESSES
            if several not in teams:
                teams[several] = stack.enter_context(_team(suite, workload, precision, contestant))
            problem = teams[several].ask("make", name, contestant=asdict(contestant))
            if problem:
                unavailable[name] = problem
            else:
                places[name] = teams[several]
        losses = {name: float(team.ask("loss", name)) for name, team in places.items()}
        check_losses(losses, TOLERANCE[precision])
        for name, team in places.items():
            team.ask("warm", name)
        seconds: dict[str, list[float]] = {name: [] for name in places}
        began = monotonic()
        for number, order in enumerate(rotations(list(places), rounds)):
            if number >= 2 and monotonic() - began > workload.limit_s:
                break
            for name in order:
                seconds[name].append(places[name].ask("step", name))
    return Contest(seconds, losses, unavailable)


def memory(
    suite: Suite, workload: Workload, precision: str, name: str, *, microbatches: int, steps: int
) -> dict[str, Any] | str:
    """Train a contestant in processes of its own.

    Returns:
        ``seconds`` of the steps and peak resident ``bytes`` of every process; or why it cannot run.

    Raises:
        ContestError: It failed.
    """
    smaller = replace(workload, microbatches=microbatches, check_microbatches=microbatches)
    contestant = suite.contestants[name]
    with _team(suite, smaller, precision, contestant) as team:
        problem = team.ask("make", name, contestant=asdict(contestant))
        found: dict[str, Any] | str = problem or team.ask("memory", name, steps=steps)
    return found


def check_losses(losses: Mapping[str, float], tolerance: float) -> None:
    """Refuse to time contestants that compute different things.

    Raises:
        ContestError: A loss is not that of the first one.
    """
    first = next(iter(losses.values()))
    wrong = [name for name, loss in losses.items() if not abs(loss / first - 1) <= tolerance]
    if wrong:
        raise ContestError(
            f"{', '.join(wrong)} computed another loss than {next(iter(losses))}: {dict(losses)}; "
            f"relative differences up to {tolerance:g} are taken for rounding. Nothing was timed"
        )


def _team(suite: Suite, workload: Workload, precision: str, contestant: Contestant) -> Team:
    several = contestant.kind in MANY_PROCESSES
    processes = suite.cores if several else 1
    return Team(workload, precision, processes, suite.cores // processes)


def _place(rank: int, processes: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port
