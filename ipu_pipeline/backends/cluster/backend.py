"""GPUs or CPU processes, over torch.distributed: every rank runs one stage of one replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ipu_pipeline.backends.cluster.layout import torch_schedules
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, refuse_sizes
from ipu_pipeline.backends.cluster.prices.rank_plan import RankCosts, rank_price
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Backend, Workload
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.price import (
    PlanPrice,
    best_split,
    counted_costs,
    replayed_price,
    workload_of,
)
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.search import Constraints, Partition

# Of proving the split of one number of replicas, where these are searched.
REPLICAS_S = 3.0


@dataclass(frozen=True)
class ClusterBackend(Backend):
    """Stages are processes."""

    name: str = "cluster"
    target: str = "distributed"

    @property
    def schedules(self) -> tuple[str, ...]:
        """Those that torch has a class for."""
        return tuple(kind.name for kind in torch_schedules())

    def own_machine(self, num_devices: int | None) -> Machine | None:
        """A cluster is described by its name or file."""
        return None

    def prices_machine(self, machine: Machine) -> bool:
        """Whether the devices have memories of their own and no cost model of another backend."""
        return not machine.shared_memory and machine.devices[0].kind == "generic"

    def rules(self, graph: BlockGraph, machine: Machine, limits: Constraints) -> Constraints:
        """In training some of torch's schedules need as many microbatches as stages.

        Raises:
            PartitionError: There are less.

        Source: torch.distributed.pipelining.schedules, ``Schedule1F1B._step_microbatches``.
        """
        kind = schedule_kind(limits.schedule)
        if not kind.torch_needs_depth or not graph.training:
            return limits
        if (limits.num_stages or 1) > limits.num_microbatches:
            raise PartitionError(
                f"schedule {kind.name} needs at least as many microbatches as stages, got "
                f"{limits.num_microbatches} microbatches and {limits.num_stages} stages; use more "
                "microbatches, or gpipe"
            )
        most = min(limits.max_stages or limits.num_microbatches, limits.num_microbatches)
        return replace(limits, max_stages=most)

    def default_microbatches(self, machine: Machine, num_stages: int | None, replicas: int) -> int:
        """As many as stages, at least eight."""
        return max(8, num_stages or len(machine.devices) // replicas)

    def costs(self, work: Workload) -> GraphCosts:
        """Price blocks by counted operations, or as a rank of GPUs runs its part of them.

        Raises:
            PlanError: A setting is wrong, or means nothing on this machine.
        """
        if _on_gpus(work.machine, work.graph, work.measured_s):
            return RankCosts(work).all()
        refuse_sizes(work.settings, work.machine)
        return counted_costs(work)

    def search(
        self, work: Workload, limits: Constraints, *, any_replicas: bool
    ) -> tuple[Partition, Workload]:
        """On GPUs also every number of replicas that divides the devices and the microbatches.

        The bound is that of all of them.

        Raises:
            PartitionError: Nothing fits, or what shares products would spread its vocabulary, too.
        """
        if limits.vocabulary is not None and (tp := GpuSettings.read(work.settings).tp) > 1:
            if limits.vocabulary != "auto":
                raise PartitionError(
                    f"tensor parallelism (tp {tp}) cuts tables whose rows are spread over stages; "
                    "leave it out, or plan without vocabulary"
                )
            limits = replace(limits, vocabulary=None)
        if not any_replicas or not _on_gpus(work.machine, work.graph, work.measured_s):
            return super().search(work, limits, any_replicas=False)
        found: list[tuple[Partition, Workload]] = []
        problems: list[PartitionError] = []
        for replicas in _replicas_to_try(work):
            count = work.num_microbatches // replicas
            one = replace(
                limits, replicas=replicas, num_microbatches=count, time_limit_s=REPLICAS_S
            )
            run = replace(work, replicas=replicas, num_microbatches=count)
            try:
                found.append((best_split(run, one), run))
            except PartitionError as error:
                problems.append(error)
        if not found:
            raise problems[0]
        best, run = min(found, key=lambda pair: pair[0].objective)
        return best.with_bound(min(split.lower_bound for split, _ in found)), run

    def step(self, plan: Plan) -> PlanPrice:
        """Replay the schedule over the stages."""
        if _on_gpus(plan.machine, plan.graph, plan.measured_s):
            return rank_price(plan)
        return replayed_price(plan, self.costs(workload_of(plan)), splits_backward=True)

    def lower(self, model: Any, plan: Plan, optimizer: Any, options: Any) -> Any:
        """Return this process's executable."""
        from ipu_pipeline.backends.cluster.executable import DistributedExecutable

        return DistributedExecutable(model, plan, optimizer, options)

    def doctor(self) -> tuple[str, str]:
        """Say whether torch can connect processes here."""
        import torch.distributed

        if not torch.distributed.is_available():
            return "unavailable", "this torch was built without torch.distributed"
        backends = [
            name
            for name, present in (
                ("gloo", torch.distributed.is_gloo_available()),
                ("nccl", torch.distributed.is_nccl_available() and torch.cuda.is_available()),
            )
            if present
        ]
        if not backends:
            return "unavailable", "torch.distributed has neither gloo nor a usable nccl"
        return "ready", f"processes under torchrun, over {' and '.join(backends)}"


def _on_gpus(machine: Machine, graph: BlockGraph, measured_s: Mapping[str, Any]) -> bool:
    """Whether steps are priced by what a GPU's kernels reach: in training, nothing measured."""
    return machine.devices[0].kernels is not None and graph.training and not measured_s


def _replicas_to_try(work: Workload) -> list[int]:
    devices, count = len(work.machine.devices), work.num_microbatches
    return [n for n in range(1, devices + 1) if devices % n == 0 and count % n == 0]


BACKEND = ClusterBackend()
