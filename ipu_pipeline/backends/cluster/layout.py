"""Which process runs what, and which schedules torch has a class for and can run so."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.backends.cluster.prices.parallel_sizes import tensor_parallel_size
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    ScheduleKind,
    schedule_kind,
    schedule_names,
)


def torch_schedules() -> tuple[ScheduleKind, ...]:
    """Return the schedules that torch has a class for."""
    return tuple(kind for kind in map(schedule_kind, schedule_names()) if kind.torch_class)


def torch_schedule(name: str) -> ScheduleKind:
    """Return a schedule by our name or by that of torch's class.

    Raises:
        LoweringError: There is none of this name.
    """
    wanted, known = _plain(name), torch_schedules()
    for kind in known:
        if wanted in (_plain(kind.name), _plain(kind.torch_class or "")):
            return kind
    names = ", ".join(kind.name for kind in known)
    raise LoweringError(f"the distributed target has no schedule {name!r}; use one of {names}")


def position_of_stages(
    name: str, num_stages: int, num_ranks: int, num_microbatches: int
) -> tuple[int, ...]:
    """Return the position in the pipeline, from 0, of the process that runs every stage.

    Raises:
        LoweringError: The schedule cannot place so many stages on so many processes, or cannot run
            them; says which requirement is not met, and what would meet it.
    """
    kind = torch_schedule(name)
    positions = kind.place(num_stages, num_ranks)
    if positions is None:
        others = [k.name for k in torch_schedules() if k.place(num_stages, num_ranks) is not None]
        raise LoweringError(
            f"schedule {kind.name} runs {kind.placement.replace('device', 'process')}: "
            f"{count_of(num_stages, 'stage')} do not fit {count_of(num_ranks, 'process')}; start "
            "as many processes as the plan has "
            f"devices{', or use ' if others else ''}{', '.join(others)}"
        )
    problem = kind.problem(PipelineShape.of(num_stages, num_microbatches, positions))
    if not problem and kind.torch_needs_depth and num_microbatches < num_stages:
        problem = (
            f"schedule {kind.name} needs at least as many microbatches as stages, got "
            f"{count_of(num_microbatches, 'microbatch')} and {count_of(num_stages, 'stage')}; use "
            "more microbatches, or gpipe"
        )
    if problem:
        raise LoweringError(problem)
    return positions


def schedule_for(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> str:
    """Return ``name`` if it can run so many microbatches, else one of its placement that can."""
    own = torch_schedule(name)
    others = (kind for kind in torch_schedules() if kind.place == own.place)
    for kind in sorted((own, *others), key=lambda kind: (kind is not own, kind.splits_backward)):
        try:
            position_of_stages(kind.name, num_stages, num_ranks, num_microbatches)
        except LoweringError:
            continue
        return kind.name
    return name


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").removeprefix("schedule")


@dataclass(frozen=True)
class Layout:
    """Where this process stands. Rank = (replica x ``num_ranks`` + position) x ``tp`` + slice.

    Attributes:
        rank: Of this process among all.
        num_replicas: Copies of the pipeline.
        num_ranks: Positions of one pipeline: its processes, those that share products as one.
        num_stages: Pipeline depth.
        positions: Position in the pipeline that runs each stage, as the schedule asks for.
        tp: Processes that share every product of a position, neighbours by rank.
    """

    rank: int
    num_replicas: int
    num_ranks: int
    num_stages: int
    positions: tuple[int, ...]
    tp: int = 1

    @property
    def replica(self) -> int:
        """Index of the pipeline that this process is part of."""
        return self.rank // (self.num_ranks * self.tp)

    @property
    def position(self) -> int:
        """Where this process is in its pipeline."""
        return self.rank // self.tp % self.num_ranks

    @property
    def slice(self) -> int:
        """Which slice of every product this process computes."""
        return self.rank % self.tp

    @property
    def own_stages(self) -> tuple[int, ...]:
        """Stages that this process runs, ascending."""
        return tuple(s for s in range(self.num_stages) if self.positions[s] == self.position)


def make_layout(plan: Plan, schedule: str, rank: int, world_size: int) -> Layout:
    """Return the layout of ``plan`` over ``world_size`` processes.

    Raises:
        LoweringError: The processes cannot be shared out, the schedule cannot run the split, or
            ranks of the plan share tokens, experts or optimizer states.
    """
    tp = tensor_parallel_size(plan)
    each, times_tp = plan.replicas * tp, f" x tp {tp}" if tp > 1 else ""
    if world_size % each:
        raise LoweringError(
            f"the plan has {count_of(plan.replicas, 'replica')}{times_tp}, which cannot share "
            f"{world_size} processes; start a multiple of {each}"
        )
    num_ranks = world_size // each
    if num_ranks > plan.num_stages:
        raise LoweringError(
            f"{count_of(world_size, 'process')} are more than the plan's "
            f"{count_of(plan.num_stages, 'stage')} x "
            f"{count_of(plan.replicas, 'replica')}{times_tp}; start {plan.num_stages * each}"
        )
    positions = position_of_stages(schedule, plan.num_stages, num_ranks, plan.num_microbatches)
    return Layout(rank, plan.replicas, num_ranks, plan.num_stages, positions, tp)
