"""From a plan to its processes: how many, on how many nodes, what they are told. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from ipu_pipeline.backends.cluster.layout import make_layout, torch_schedule
from ipu_pipeline.backends.cluster.prices.parallel_sizes import tensor_parallel_size
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.limits import check_count, count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import backend_of

# What a script finds in its environment, and what it finds there as the target.
PLAN_VARIABLE = "IPU_PIPELINE_PLAN"
TARGET_VARIABLE = "IPU_PIPELINE_TARGET"
TARGET = "distributed"
SCHEDULE_VARIABLE = "IPU_PIPELINE_SCHEDULE"
# Address of the store that only this machine reaches, and what signs the job's messages.
STORE_VARIABLE = "IPU_PIPELINE_STORE"
SECRET_VARIABLE = "IPU_PIPELINE_JOB_SECRET"
# torch reads both when it is imported; whichever the user has set stays.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CPU_FOLDER = Path("/sys/devices/system/cpu")
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class LaunchSpec:
    """What is to be started, and where.

    Attributes:
        plan_path: Absolute path of the plan.
        program: A script with its arguments, or ``-m``, a module, and its arguments.
        num_processes: On all nodes together.
        described: What the processes are, in words.
        schedule: Told to the script; ``None`` where the plan's own is used.
        num_nodes: Machines that share the processes, as evenly as possible.
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
        """Processes on each of the first :attr:`num_full_nodes`; the others have one less."""
        return -(-self.num_processes // self.num_nodes)

    @property
    def num_full_nodes(self) -> int:
        """Nodes that have as many processes as any."""
        return self.num_processes % self.num_nodes or self.num_nodes

    def settings(self) -> dict[str, str]:
        """Return what the script is told through its environment, threads apart."""
        told = {PLAN_VARIABLE: str(self.plan_path), TARGET_VARIABLE: TARGET}
        return told if self.schedule is None else {**told, SCHEDULE_VARIABLE: self.schedule}

    def threads(self, environment: Mapping[str, str], num_cores: int) -> dict[str, str]:
        """Return the variables that set the threads of a process on a machine of ``num_cores``.

        What the user has set in ``environment`` wins, unless ``num_threads`` was asked for.
        """
        if self.num_threads is not None:
            return dict.fromkeys(THREAD_VARIABLES, str(self.num_threads))
        share = str(max(1, num_cores // self.processes_per_node))
        return {name: environment.get(name, share) for name in THREAD_VARIABLES}


def make_spec(  # noqa: PLR0913 - the choices of a user by name
    plan: Plan,
    plan_path: Path,
    program: tuple[str, ...],
    *,
    processes: int | None = None,
    schedule: str | None = None,
    threads: int | None = None,
    max_restarts: int = 0,
    here: bool = True,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    machine: Machine | None = None,
    room: int | None = None,
) -> LaunchSpec:
    """Return what is to be started; ``None`` leaves a choice to the plan and the machine.

    Arguments that are no fields of :class:`LaunchSpec`: ``here`` starts on this machine, otherwise
    a text for other machines is wanted; ``machine`` describes all of those together; ``room`` is
    the number of processes that this machine has GPUs or cores for, with ``here`` only.

    Raises:
        ValueError: Nodes are named where nothing is written for them.
        LoweringError: Plan, schedule, processes and nodes do not fit each other.
    """
    elsewhere, chosen = bool(nodes or gpus_per_node or machine), schedule or plan.schedule
    if here and elsewhere:
        raise ValueError(
            "launch starts processes on this machine only; for other machines add --print "
            "(the command for every node) or --slurm FILE"
        )
    if not here and not elsewhere and _runs_processes(plan.machine):
        machine = plan.machine if plan.machine.devices_per_board else None
    if room is None:
        gpus = (nodes or 0) * (gpus_per_node or 0)
        most = plan.num_stages * plan.replicas * tensor_parallel_size(plan)
        room = gpus or most if machine is None else len(machine.devices)
    number = processes or choose_processes(plan, chosen, room)
    make_layout(plan, chosen, 0, number)
    split = (1, 0) if here else choose_nodes(number, nodes, gpus_per_node, machine)
    check_count("processes on one machine", -(-number // split[0]), "workers",
                error=LoweringError)  # fmt: skip
    return LaunchSpec(
        plan_path=plan_path,
        program=program,
        num_processes=number,
        described=_described(plan, number, chosen),
        schedule=schedule,
        num_nodes=split[0],
        gpus_per_node=split[1],
        max_restarts=max_restarts,
        num_threads=threads,
    )


def _described(plan: Plan, number: int, schedule: str) -> str:
    """Say what is started."""
    tp = tensor_parallel_size(plan)
    return (
        f"{count_of(number, 'process')}: {count_of(plan.num_stages, 'stage')} x "
        f"{count_of(plan.replicas, 'replica')}{f' x tp {tp}' if tp > 1 else ''}, "
        f"{schedule}"
    )


def choose_processes(plan: Plan, schedule: str, room: int) -> int:
    """Return how many processes run the plan, all replicas together.

    As many as the plan has devices, where it puts several stages on one. Otherwise as many as
    there is room for, of the numbers that the schedule can place the stages on, with at least two
    stages each if it can and that leaves more than one process.

    Args:
        plan: What is to run.
        schedule: Its name.
        room: Processes for which there are devices or cores.

    Raises:
        LoweringError: There is no such schedule, or it cannot run the plan.
    """
    kind, depth = torch_schedule(schedule), plan.num_stages
    each = plan.replicas * tensor_parallel_size(plan)
    placed = [n for n in range(1, depth + 1) if kind.place(depth, n) is not None]
    placed = placed or [max(1, depth // kind.stages_per_device[0])]
    possible = [n for n in placed if _runs(plan, schedule, n)] or placed[-1:]
    planned = len({stage.device for stage in plan.stages})
    if planned < depth and planned in possible:
        return planned * each
    roomy = [n for n in possible if n * each <= room] or possible[:1]
    several = [n for n in roomy if 1 < n < plan.num_stages]
    return max(several or roomy) * each


def choose_nodes(
    num_processes: int,
    num_nodes: int | None = None,
    gpus_per_node: int | None = None,
    machine: Machine | None = None,
) -> tuple[int, int]:
    """Return how many nodes share the processes, and the GPUs of each (0: none, or unknown).

    Args:
        num_processes: Of all nodes.
        num_nodes: ``None`` for the fewest that have a GPU for each process, or 1.
        gpus_per_node: ``None`` for what ``machine`` says.
        machine: Describes the GPUs of all nodes.

    Raises:
        LoweringError: The processes do not fit, or the machine has IPUs.
    """
    if machine is not None:
        _check_machine(machine, num_processes)
        gpus_per_node = gpus_per_node or machine.devices_per_board or len(machine.devices)
    gpus = gpus_per_node or 0
    if num_nodes is None:
        num_nodes = -(-num_processes // gpus) if gpus else 1
    if num_nodes > num_processes:
        raise LoweringError(
            f"{num_processes} processes leave some of {num_nodes} nodes without any; use at most "
            f"{num_processes} nodes"
        )
    most = -(-num_processes // num_nodes)
    if gpus and most > gpus:
        raise LoweringError(
            f"{num_processes} processes on {num_nodes} nodes need {most} GPUs per node, and a "
            f"node has {gpus}; use more nodes, or plan with fewer stages"
        )
    return num_nodes, gpus


def check_program(program: Sequence[str], folder: Path, *, here: bool = True) -> tuple[str, ...]:
    """Return the program as it is started, its script with an absolute path.

    Args:
        program: Script or ``-m module``, and arguments.
        folder: Where the processes start.
        here: Whether they start on this machine; others may have what this one has not.

    Raises:
        ValueError: There is no such script or module.
    """
    if not program or list(program) == ["-m"]:
        raise ValueError("nothing to start: give a script, or -m and a module, after --")
    if program[0] == "-m":
        if not here:
            return tuple(program)
        name = program[1].split(".")[0]
        if PathFinder.find_spec(name, [str(folder), *sys.path]) is None:
            raise ValueError(
                f"there is no module {name!r}, neither installed nor in {folder}; start where it "
                "is, or set PYTHONPATH"
            )
        return tuple(program)
    script = folder / program[0]
    if here and not script.is_file():
        raise ValueError(
            f"there is no script {script}; give launch's own options before --, then the script "
            "and its arguments: ipu-pipeline launch plan.json -- script.py --its-option"
        )
    return (str(script), *program[1:])


def crowding(num_processes: int, num_cores: int, num_gpus: int) -> str:
    """Return a warning if the processes are more than this machine has cores or GPUs for."""
    if num_gpus and num_processes > num_gpus:
        return (
            f"{num_processes} processes are more than the {count_of(num_gpus, 'GPU')} of "
            "this machine, and nccl gives each process one of its own; plan with fewer stages"
        )
    if not num_gpus and num_processes > num_cores:
        return (
            f"{num_processes} processes share {count_of(num_cores, 'core')}, so they slow "
            "each other down; plan with fewer stages, or use more machines (--nodes)"
        )
    return ""


def usable_cores() -> int:
    """Return how many physical cores this process may use, at least 1.

    Two threads of one core count once: matrix products fill a core with one. A container's limit
    on processor time (microseconds per period) counts as well.
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len({_siblings(processor) for processor in affinity(0)})
    try:
        limit, period = QUOTA_FILE.read_text(encoding="ascii").split()
        cores = min(cores, int(limit) // int(period))
    except (OSError, ValueError):
        pass  # no limit
    return max(1, cores)


def _siblings(processor: int) -> str:
    """Return what the hardware threads of one core have in common."""
    path = CPU_FOLDER / f"cpu{processor}" / "topology" / "thread_siblings_list"
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)  # not Linux, or not told: every processor is a core


def _check_machine(machine: Machine, num_processes: int) -> None:
    if not _runs_processes(machine):
        raise LoweringError(
            f"machine {machine.name} is for target {backend_of(machine).target}, which no "
            "processes under torchrun run; for IPUs write a bundle: ipu-pipeline emit"
        )
    if num_processes > len(machine.devices):
        raise LoweringError(
            f"{num_processes} processes are more than the {len(machine.devices)} devices of "
            f"machine {machine.name}; plan with fewer stages, or name a larger machine"
        )


def _runs_processes(machine: Machine) -> bool:
    return backend_of(machine).target in (TARGET, "local")


def _runs(plan: Plan, schedule: str, num_ranks: int) -> bool:
    try:
        make_layout(plan, schedule, 0, num_ranks * plan.replicas * tensor_parallel_size(plan))
    except LoweringError:
        return False
    return True
