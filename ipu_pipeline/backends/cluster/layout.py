"""Which process runs what: replicas of a pipeline, ranks of a pipeline, stages of a rank."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.backends.cluster.schedules import (
    check_schedule,
    position_of_stages,
    torch_schedule,
)
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan


@dataclass(frozen=True)
class Layout:
    """Where this process stands. Rank = replica x ``num_ranks`` + position.

    Attributes:
        rank: Of this process among all.
        num_replicas: Copies of the pipeline.
        num_ranks: Processes of one pipeline.
        num_stages: Pipeline depth.
        positions: Position in the pipeline that runs each stage, as the schedule asks for.
    """

    rank: int
    num_replicas: int
    num_ranks: int
    num_stages: int
    positions: tuple[int, ...]

    @property
    def replica(self) -> int:
        """Index of the pipeline that this process is part of."""
        return self.rank // self.num_ranks

    @property
    def position(self) -> int:
        """Rank of this process inside of its pipeline."""
        return self.rank % self.num_ranks

    @property
    def own_stages(self) -> tuple[int, ...]:
        """Stages that this process runs, ascending."""
        return tuple(s for s in range(self.num_stages) if self.position_of(s) == self.position)

    def position_of(self, stage: int) -> int:
        """Return the position in the pipeline that runs ``stage``."""
        return self.positions[stage]


def make_layout(plan: Plan, schedule: str, rank: int, world_size: int) -> Layout:
    """Return the layout of ``plan`` over ``world_size`` processes.

    Raises:
        LoweringError: The processes cannot be shared out, or the schedule cannot run the split.
    """
    if world_size % plan.replicas:
        raise LoweringError(
            f"the plan has {plan.replicas} replicas, which cannot share {world_size} processes; "
            f"start a multiple of {plan.replicas}"
        )
    num_ranks = world_size // plan.replicas
    if num_ranks > plan.num_stages:
        raise LoweringError(
            f"{world_size} processes are more than the plan's {plan.num_stages} stages x "
            f"{plan.replicas} replicas; start {plan.num_stages * plan.replicas}"
        )
    check_schedule(schedule, plan.num_stages, num_ranks, plan.num_microbatches)
    positions = position_of_stages(torch_schedule(schedule), plan.num_stages, num_ranks)
    return Layout(rank, plan.replicas, num_ranks, plan.num_stages, positions)
