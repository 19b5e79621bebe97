"""The step of a published run, from its stages alone: what a plan says otherwise is derived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankPricer
from ipu_pipeline.backends.cluster.prices.rank_step import BUFFER_BYTES, RankStep
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.stage_loads import Copies, StageLoad

# A schedule that torch has no class for: weights' gradients fill all bubbles, with twice as many
# microbatches in flight. Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, ZB-2p.
ZERO_BUBBLE_2P = "zero_bubble_2p"
_HALF_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class PublishedStep(RankStep):
    """A pipeline of ranks whose schedule may be one that no plan can have.

    Attributes:
        more_in_flight: Microbatches that every stage keeps besides the schedule's, in units of
            one microbatch.
        in_flight_factor: How many times the schedule's microbatches every stage keeps.
        reserved_share: Bytes that are counted as a rank's, per byte that it uses: above 1 where
            what its allocator reserved is counted.
    """

    more_in_flight: float = 0.0
    in_flight_factor: float = 1.0
    reserved_share: float = 1.0

    @classmethod
    def of(
        cls, pricer: RankPricer, stages: Sequence[RankBlock], schedule: str,
        num_microbatches: int, shares: Sequence[tuple[float, float]] = (), **more: float,
    ) -> PublishedStep:  # fmt: skip
        """Return a step with its stages where the schedule places them, else on rank ``s % pp``.

        Args:
            pricer: Of the blocks.
            stages: Every stage as one block.
            schedule: Name of the schedule.
            num_microbatches: Of one step.
            shares: Seconds of softmax and rows of every stage, where the vocabulary is spread.
            more: Other fields.
        """
        depth, pp, placed = len(stages), pricer.sizes.pp, None
        if schedule != ZERO_BUBBLE_2P:
            placed = schedule_kind(schedule).place(depth, pp)
        ranks = placed or tuple(stage % pp for stage in range(depth))
        shape = PipelineShape.of(depth, num_microbatches, ranks)
        flying = [2 * pp] * depth  # of ZB-2p
        if schedule != ZERO_BUBBLE_2P:
            flying = list(schedule_kind(schedule).in_flight(shape))
        loads = [
            StageLoad(rank, stage.forward_s, stage.backward_s, copies,
                      round(pricer.state_bytes(stage.parameters)), round(stage.saved_bytes),
                      round(stage.workspace_bytes), number, weights_s=stage.backward_s / 2,
                      softmax_s=softmax_s, rows_s=rows_s)
            for rank, stage, copies, number, (softmax_s, rows_s) in zip(
                ranks, stages, _copies(pricer, ranks), flying, shares or [(0.0, 0.0)] * depth,
                strict=True)
        ]  # fmt: skip
        return cls(
            pricer=pricer,
            loads=tuple(loads),
            parameters=tuple(stage.parameters for stage in stages),
            schedule=schedule,
            num_microbatches=num_microbatches,
            update_s=tuple(pricer.update_s(stage.parameters) for stage in stages),
            spread=tuple(range(depth)) if shares else (),
            **more,
        )

    def passes_s(self) -> float:
        """Return the seconds of all passes and copies of a step."""
        if self.schedule != ZERO_BUBBLE_2P:
            return super().passes_s()
        return self.num_microbatches * max(load.price.load_s for load in self.loads)

    def memory_bytes(self) -> tuple[float, ...]:
        """Return the most bytes that every rank of the pipeline holds."""
        found = []
        for own, kept in zip(self.of_ranks, self.kept_bytes(), strict=True):
            more = self.more_in_flight * self.loads[own[-1]].stash_bytes
            used = self.pricer.state_bytes(self.held_by(own)) + self.in_flight_factor * kept + more
            used += max(self.loads[number].workspace_bytes for number in own) + BUFFER_BYTES
            found.append(self.reserved_share * used)
        return tuple(found)


def _copies(pricer: RankPricer, ranks: Sequence[int]) -> tuple[Copies, ...]:
    """Seconds of the copies of the residual stream over both boundaries of every stage."""
    machine, sizes = pricer.machine, pricer.sizes
    kernels, apart = machine.devices[0].kernels, sizes.num_devices
    num_bytes = _HALF_BYTES * pricer.tokens * pricer.hidden / pricer.shared
    share = 1.0 if kernels is None else kernels.link_share
    shown = 1.0 - (pricer.engine.pipeline_overlap if len(ranks) > sizes.pp else 0.0)
    found = [0.0]
    for places in pairwise(ranks):
        here, there = (place * apart // sizes.pp for place in places)
        link = machine.link_between(here, there)
        one_s = link.latency_s + num_bytes / (link.bytes_per_s * share)
        found.append(0.0 if here == there else shown * one_s)
    found.append(0.0)
    return tuple(Copies(before, behind, behind, before) for before, behind in pairwise(found))


def total_of(parts: Iterable[tuple[RankBlock, float]]) -> RankBlock:
    """Return blocks, each so many times, one after the other; below one: a share of it."""
    found = RankBlock()
    for block, number in parts:
        if number:
            found = RankBlock(
                found.forward_s + block.forward_s * number,
                found.backward_s + block.backward_s * number,
                found.saved_bytes + block.saved_bytes * number,
                max(found.workspace_bytes, block.workspace_bytes * min(1.0, number)),
                found.parameters + block.parameters.times(number),
            )
    return found
