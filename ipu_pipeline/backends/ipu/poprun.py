"""Several processes for one plan: the ``poprun`` command that starts its bundle, and a Slurm file.

``poprun`` comes with Graphcore's SDK. It starts instances (processes, on one host or several), each
of which drives an equal part of the replicas; the bundle's ``run.py`` asks ``popdist`` which.

Source: PopDist and PopRun user guide, SDK 3.1.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ipu_pipeline.backends.ipu.check import MOST_IPUS, is_power_of_two
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan

_HOSTS = '"$HOSTS"'


@dataclass(frozen=True)
class PopRun:
    """What ``poprun`` is to start.

    Attributes:
        program: Script of a bundle and its arguments.
        instances: Processes.
        replicas: Of all instances together.
        ipus_per_replica: IPUs of one replica.
        num_hosts: Hosts that the instances are spread over.
    """

    program: tuple[str, ...]
    instances: int
    replicas: int
    ipus_per_replica: int
    num_hosts: int = 1

    def arguments(self, python: str) -> list[str]:
        """Return the words of the command, quoted for a shell."""
        words = [
            "poprun",
            f"--num-instances={self.instances}",
            f"--num-replicas={self.replicas}",
            f"--ipus-per-replica={self.ipus_per_replica}",
        ]
        if self.num_hosts > 1:
            words.append(f"--host={_HOSTS}")
        return [*words, shlex.join((python, *self.program))]


def make_poprun(
    plan: Plan, program: Sequence[str], *, instances: int | None = None, hosts: int | None = None
) -> PopRun:
    """Return what is started; ``None`` takes the fewest instances, on one host.

    Raises:
        LoweringError: Instances, hosts and replicas do not divide each other.
    """
    per_replica = max(stage.device for stage in plan.stages) + 1
    if not is_power_of_two(per_replica):
        raise LoweringError(
            f"a replica has {per_replica} IPUs, poprun takes 1, 2, 4, 8, ...; plan with another "
            "number of IPUs"
        )
    hosts = hosts or 1
    least = max(hosts, -(-plan.replicas * per_replica // MOST_IPUS))
    number = instances or next(
        (n for n in range(least, plan.replicas + 1) if plan.replicas % n == 0 and n % hosts == 0),
        least,
    )
    if plan.replicas % number or number % hosts:
        raise LoweringError(
            f"{plan.replicas} replicas do not divide evenly over {number} processes on {hosts} "
            "hosts; choose --processes that divides the replicas and is a multiple of --nodes, or "
            "plan with other replicas"
        )
    if plan.replicas // number * per_replica > MOST_IPUS:
        raise LoweringError(
            f"{plan.replicas // number} replicas of {per_replica} IPUs in one process are more "
            f"than {MOST_IPUS} IPUs; use at least {least} processes"
        )
    return PopRun(tuple(program), number, plan.replicas, per_replica, hosts)


def command_text(run: PopRun, *, python: str, folder: Path) -> str:
    """Return the command for one of the hosts."""
    lines = [f"cd {shlex.quote(str(folder))}", " \\\n  ".join(run.arguments(python))]
    if run.num_hosts > 1:
        lines.insert(0, f"HOSTS=...  # the names of {run.num_hosts} hosts, separated by commas")
    return "\n".join(lines)


def slurm_text(run: PopRun, *, python: str, folder: Path, name: str) -> str:
    """Return a complete file for ``sbatch``; ``poprun`` runs on its first node.

    Args:
        run: What to start.
        python: Interpreter that has poptorch, on every node.
        folder: Where it is started.
        name: Of the job; what is no letter, digit or one of ``_.-`` becomes ``_``.
    """
    name = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    ipus = run.replicas * run.ipus_per_replica
    lines = [
        "#!/bin/bash",
        f"# {run.replicas} replicas of {run.ipus_per_replica} IPUs ({ipus}) in {run.instances} "
        f"processes on {run.num_hosts} hosts.",
        "# Partition, account, time and the IPU partition (IPUOF_VIPU_API_PARTITION_ID) are yours",
        "# to add.",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={run.num_hosts}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --output={name}-%j.log",
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        'HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)',
        " \\\n  ".join(run.arguments(python)),
    ]
    return "\n".join(lines) + "\n"
