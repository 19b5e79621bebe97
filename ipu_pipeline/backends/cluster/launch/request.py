"""What a user asks of ``launch``, made into a specification that fits plan and machines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipu_pipeline.backends.cluster.launch.cluster import Nodes, choose_nodes
from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec, choose_processes, describe
from ipu_pipeline.backends.ipu.prices import is_ipu
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan


@dataclass(frozen=True)
class Request:
    """The choices of a user; ``None`` leaves one to the plan and the machine.

    Attributes:
        processes: Of all nodes.
        schedule: Other than the plan's.
        threads: Of every process.
        max_restarts: How often all processes start again after one of them failed.
        here: Start on this machine; otherwise a text for other machines is wanted.
        nodes: Machines that share the processes.
        gpus_per_node: GPUs of each.
        machine: Describes all of them together.
    """

    processes: int | None = None
    schedule: str | None = None
    threads: int | None = None
    max_restarts: int = 0
    here: bool = True
    nodes: int | None = None
    gpus_per_node: int | None = None
    machine: Machine | None = None

    def __post_init__(self) -> None:
        """Refuse nodes where nothing is written for them."""
        if self.here and (self.nodes or self.gpus_per_node or self.machine):
            raise ValueError(
                "launch starts processes on this machine only; for other machines add --print "
                "(the command for every node) or --slurm FILE"
            )


def make_spec(
    plan: Plan, plan_path: Path, program: tuple[str, ...], request: Request, room: int | None = None
) -> LaunchSpec:
    """Return what is to be started.

    Args:
        plan: What is to run.
        plan_path: Its absolute path.
        program: From ``check_program``.
        request: What the user asked for.
        room: Processes that this machine has GPUs or cores for; only with ``request.here``.

    Raises:
        LoweringError: Plan, schedule, processes and nodes do not fit each other.
    """
    schedule = request.schedule or plan.schedule
    machine = request.machine
    if not request.here and machine is None and not (request.nodes or request.gpus_per_node):
        machine = _planned_nodes(plan.machine)
    if room is None:
        room = _room(plan, request, machine)
    number = request.processes or choose_processes(plan, schedule, room)
    described = describe(plan, schedule, number)
    nodes = Nodes()
    if not request.here:
        nodes = choose_nodes(number, request.nodes, request.gpus_per_node, machine)
    return LaunchSpec(
        plan_path=plan_path,
        program=program,
        num_processes=number,
        described=described,
        schedule=request.schedule,
        num_nodes=nodes.num_nodes,
        gpus_per_node=nodes.gpus_per_node,
        max_restarts=request.max_restarts,
        num_threads=request.threads,
    )


def _planned_nodes(machine: Machine) -> Machine | None:
    """Return the plan's own machine where that is nodes with GPUs."""
    return machine if machine.devices_per_board and not is_ipu(machine) else None


def _room(plan: Plan, request: Request, machine: Machine | None) -> int:
    if machine is not None:
        return len(machine.devices)
    if request.nodes and request.gpus_per_node:
        return request.nodes * request.gpus_per_node
    return plan.num_stages * plan.replicas
