"""The processes of a plan on several machines: a command for every node, or a Slurm file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from ipu_pipeline.backends.ipu.prices import is_ipu
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.machine import Machine

# Where torchrun's rendezvous listens unless it is told otherwise.
PORT = 29400
# Physical cores of a node, in a shell: two threads of one core count once.
_CORES = "$(lscpu --parse=CORE,SOCKET | grep -v '#' | sort -u | wc -l)"


@dataclass(frozen=True)
class Nodes:
    """Machines of a cluster, all alike.

    Attributes:
        num_nodes: How many.
        gpus_per_node: GPUs of each; 0 for none, or unknown.
    """

    num_nodes: int = 1
    gpus_per_node: int = 0


def choose_nodes(
    num_processes: int,
    num_nodes: int | None = None,
    gpus_per_node: int | None = None,
    machine: Machine | None = None,
) -> Nodes:
    """Return the nodes that the processes run on, evenly, each process with a GPU if there are any.

    Args:
        num_processes: Of all nodes.
        num_nodes: ``None`` for the fewest that have enough GPUs, or 1.
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
        enough = -(-num_processes // gpus) if gpus else 1
        num_nodes = next(n for n in range(enough, num_processes + 1) if num_processes % n == 0)
    if num_processes % num_nodes:
        fitting = [str(n) for n in range(1, num_processes + 1) if num_processes % n == 0]
        raise LoweringError(
            f"{num_processes} processes cannot be shared evenly by {num_nodes} nodes; use "
            f"{', '.join(fitting)} nodes"
        )
    if gpus and num_processes // num_nodes > gpus:
        raise LoweringError(
            f"{num_processes} processes on {num_nodes} nodes need {num_processes // num_nodes} "
            f"GPUs per node, and a node has {gpus}; use more nodes, or plan with fewer stages"
        )
    return Nodes(num_nodes, gpus)


def node_command(spec: LaunchSpec, *, python: str, folder: Path, run_id: str, endpoint: str) -> str:
    """Return the shell command that starts this node's processes; the same one on every node.

    Args:
        spec: What to start.
        python: Interpreter that has torch.
        folder: Where it is started: relative paths in the arguments begin here.
        run_id: Tells this run from others at the same rendezvous.
        endpoint: ``host`` or ``host:port`` of the first node; unused for a single node.
    """
    where = endpoint if ":" in endpoint else f"{endpoint}:{PORT}"
    settings = [f"{name}={shlex.quote(value)}" for name, value in spec.settings().items()]
    number = spec.processes_per_node
    threads = [f"env OMP_NUM_THREADS={spec.num_threads}"]
    if spec.num_threads is None:
        share = f"$((cores / {number} + (cores < {number})))"  # at least 1
        threads = [f"cores={_CORES} &&", f"env OMP_NUM_THREADS={share}"]
    lines = [
        f"cd {shlex.quote(str(folder))} &&",
        *threads,
        *settings,
        *_torchrun(spec, shlex.quote(python), shlex.quote(run_id), shlex.quote(where)),
    ]
    return " \\\n    ".join(lines)


def described_command(spec: LaunchSpec, command: str, endpoint: str) -> str:
    """Return the command under comments that say where to run it."""
    where = "on this machine"
    if spec.num_nodes > 1:
        host = endpoint.rpartition(":")[0] or endpoint
        where = (
            f"on each of the {spec.num_nodes} nodes, in any order; {host} is one of them; all see "
            "plan and script under these paths"
        )
    return f"# {spec.described}\n# run this {where}:\n{command}"


def slurm_file(spec: LaunchSpec, *, python: str, folder: Path, name: str) -> str:
    """Return a complete file for ``sbatch``.

    Args:
        spec: What to start.
        python: Interpreter that has torch, on every node.
        folder: Where it is started.
        name: Of the job.
    """
    number = spec.processes_per_node
    options = [
        f"--job-name={name}",
        f"--nodes={spec.num_nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        f"--output={name}-%j.log",
    ]
    if spec.gpus_per_node:
        options.append(f"--gpus-per-node={spec.gpus_per_node}")
    if spec.max_restarts:
        # Restarts are for processes; a node that is lost brings the whole job back.
        options += ["--requeue", "--open-mode=append"]
    lines = [
        "#!/bin/bash",
        f"# {spec.described}; {number} on every node.",
        f"# Written by ipu-pipeline launch from {spec.plan_path}.",
        "# Partition, account and time are yours to add, here or to sbatch's arguments.",
        *(f"#SBATCH {option}" for option in options),
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in spec.settings().items()),
        *_slurm_threads(spec),
        "",
        "# The processes meet on the first node; the port differs from job to job.",
        'read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "endpoint=$first_node:$((20000 + SLURM_JOB_ID % 10000))",
        "",
        "# One torchrun per node, on all of its cores; a signal reaches every process.",
        " \\\n    ".join(
            [
                "srun --label --kill-on-bad-exit=1 --cpu-bind=none",
                *_torchrun(spec, shlex.quote(python), '"$SLURM_JOB_ID"', '"$endpoint"'),
            ]
        ),
    ]
    return "\n".join(lines) + "\n"


def _check_machine(machine: Machine, num_processes: int) -> None:
    if is_ipu(machine):
        raise LoweringError(
            f"machine {machine.name} has IPUs, which are not programmed by processes under "
            "torchrun; write a bundle for them: ipu-pipeline emit"
        )
    if num_processes > len(machine.devices):
        raise LoweringError(
            f"{num_processes} processes are more than the {len(machine.devices)} devices of "
            f"machine {machine.name}; plan with fewer stages, or name a larger machine"
        )


def _torchrun(spec: LaunchSpec, python: str, run_id: str, endpoint: str) -> list[str]:
    """Return the lines of the command, already quoted for a shell."""
    number = spec.processes_per_node
    lines = [f"{python} -m torch.distributed.run"]
    if spec.num_nodes == 1:
        lines.append("--standalone")
    else:
        lines.append(f"--nnodes {spec.num_nodes} --rdzv-id {run_id}")
        lines.append(f"--rdzv-backend c10d --rdzv-endpoint {endpoint}")
    lines.append(f"--nproc-per-node {number} --max-restarts {spec.max_restarts}")
    if number > 1:
        # One process per node prints; warnings and errors (stderr) are seen of all.
        quiet = ",".join(f"{rank}:1" for rank in range(1, number))
        lines.append(f"--redirects {quiet}")
    return [*lines, shlex.join(spec.program)]


def _slurm_threads(spec: LaunchSpec) -> list[str]:
    if spec.num_threads is not None:
        return [f"export OMP_NUM_THREADS={spec.num_threads}"]
    number = spec.processes_per_node
    return [
        "",
        "# The processes of a node share its cores.",
        f"cores={_CORES}",
        f"export OMP_NUM_THREADS=$((cores / {number} + (cores < {number})))",
    ]
