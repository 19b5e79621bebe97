"""From a plan to its processes: how many there are and what they are told. Plain data, no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from ipu_pipeline.backends.cluster.launch.cores import threads_per_process
from ipu_pipeline.backends.cluster.layout import make_layout
from ipu_pipeline.backends.cluster.schedules import torch_schedule
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan

# What a script finds in its environment.
PLAN_VARIABLE = "IPU_PIPELINE_PLAN"
TARGET_VARIABLE = "IPU_PIPELINE_TARGET"
SCHEDULE_VARIABLE = "IPU_PIPELINE_SCHEDULE"
# torch reads both when it is imported; whichever the user has set stays.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class LaunchSpec:
    """What is to be started, and where.

    Attributes:
        plan_path: Absolute path of the plan.
        program: A script with its arguments, or ``-m``, a module, and its arguments.
        num_processes: On all nodes together.
        described: What the processes are, in words.
        schedule: Told to the script; ``None`` where the plan's own is used.
        num_nodes: Machines that share the processes evenly.
        gpus_per_node: GPUs that every node has; 0 for none, or unknown.
        max_restarts: How often all processes start again after one of them failed.
        num_threads: Of every process; ``None`` for an even share of the node's cores.
    """

    plan_path: Path
    program: tuple[str, ...]
    num_processes: int
    described: str
    schedule: str | None = None
    num_nodes: int = 1
    gpus_per_node: int = 0
    max_restarts: int = 0
    num_threads: int | None = None

    @property
    def processes_per_node(self) -> int:
        """Processes on each node."""
        return self.num_processes // self.num_nodes

    def settings(self) -> dict[str, str]:
        """Return what the script is told through its environment, threads apart."""
        told = {PLAN_VARIABLE: str(self.plan_path), TARGET_VARIABLE: "distributed"}
        return told if self.schedule is None else {**told, SCHEDULE_VARIABLE: self.schedule}

    def threads(self, environment: Mapping[str, str], num_cores: int) -> dict[str, str]:
        """Return the variables that set the threads of a process.

        Args:
            environment: What the user has set wins, unless ``num_threads`` was asked for.
            num_cores: Physical cores of this machine.
        """
        share = self.num_threads or threads_per_process(self.processes_per_node, num_cores)
        wanted = dict.fromkeys(THREAD_VARIABLES, str(share))
        if self.num_threads is not None:
            return wanted
        return {name: environment.get(name, value) for name, value in wanted.items()}


def choose_processes(plan: Plan, schedule: str, room: int) -> int:
    """Return how many processes run the plan, all replicas together.

    One per stage, or half as many for schedules that put two stages into a process. Where a
    schedule takes turns over its processes, as many as there is room for: a divisor of the stages,
    with at least two stages each if that leaves more than one process.

    Args:
        plan: What is to run.
        schedule: Its name.
        room: Processes for which there are devices or cores.

    Raises:
        LoweringError: There is no such schedule, or it cannot run the plan.
    """
    placement = torch_schedule(schedule).placement
    if placement == "one":
        return plan.num_stages * plan.replicas
    if placement == "v":
        return max(1, plan.num_stages // 2) * plan.replicas
    divisors = [n for n in range(1, plan.num_stages + 1) if plan.num_stages % n == 0]
    possible = [n for n in divisors if _runs(plan, schedule, n)] or [plan.num_stages]
    roomy = [n for n in possible if n * plan.replicas <= room] or possible[:1]
    several = [n for n in roomy if 1 < n < plan.num_stages]
    return max(several or roomy) * plan.replicas


def describe(plan: Plan, schedule: str, num_processes: int) -> str:
    """Return what the processes are, such as ``4 processes: 2 stages x 2 replicas, 1f1b``.

    Raises:
        LoweringError: So many processes cannot run the plan.
    """
    make_layout(plan, schedule, 0, num_processes)
    return (
        f"{_count(num_processes, 'process', 'processes')}: "
        f"{_count(plan.num_stages, 'stage', 'stages')} x "
        f"{_count(plan.replicas, 'replica', 'replicas')}, {schedule}"
    )


def check_program(program: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return the program as it is started, its script with an absolute path.

    Args:
        program: Script or ``-m module``, and arguments.
        folder: Where the processes start.

    Raises:
        ValueError: There is no such script or module.
    """
    if not program or list(program) == ["-m"]:
        raise ValueError("nothing to start: give a script, or -m and a module, after --")
    if program[0] == "-m":
        name = program[1].split(".")[0]
        if PathFinder.find_spec(name, [str(folder), *sys.path]) is None:
            raise ValueError(
                f"there is no module {name!r}, neither installed nor in {folder}; start where it "
                "is, or set PYTHONPATH"
            )
        return tuple(program)
    script = folder / program[0]
    if not script.is_file():
        raise ValueError(
            f"there is no script {script}; give launch's own options before --, then the script "
            "and its arguments: ipu-pipeline launch plan.json -- script.py --its-option"
        )
    return (str(script), *program[1:])


def notes(spec: LaunchSpec, num_cores: int, num_gpus: int) -> list[str]:
    """Return what the user should know before the processes start on this machine."""
    number = spec.num_processes
    if num_gpus and number > num_gpus:
        return [
            f"{number} processes are more than the {_count(num_gpus, 'GPU', 'GPUs')} of this "
            "machine, and nccl gives each process one of its own; plan with fewer stages"
        ]
    if not num_gpus and number > num_cores:
        return [
            f"{number} processes share {_count(num_cores, 'core', 'cores')}, so they slow each "
            "other down; plan with fewer stages, or use more machines (--nodes)"
        ]
    return []


def _runs(plan: Plan, schedule: str, num_ranks: int) -> bool:
    try:
        make_layout(plan, schedule, 0, num_ranks * plan.replicas)
    except LoweringError:
        return False
    return True


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
