"""One optimizer step of a pipeline of ranks: seconds by the schedule's replay, bytes of every rank.

The stages are given as what each does for one microbatch (:class:`RankBlock`); the schedules are
those of :mod:`ipu_pipeline.planner.schedules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ipu_pipeline.backends.cluster.rank import RankBlock, RankParameters, RankPricer
from ipu_pipeline.planner.schedules import PipelineShape, StageTimes, schedule_kind, step_seconds

# A schedule that torch has no class for: weights' gradients fill all bubbles, with twice as many
# microbatches in flight. Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, ZB-2p.
ZERO_BUBBLE_2P = "zero_bubble_2p"
_ZERO_BUBBLE_1P = "interleaved_zero_bubble"
# Workspaces of products and buffers of collectives.
_BUFFER_BYTES = 400_000_000
_HALF_BYTES = 2


@dataclass(frozen=True)
class RankStep:
    """A pipeline of ranks.

    Attributes:
        pricer: Model, machine, sizes, engine.
        stages: In order, on the ranks that the schedule places them on; else on rank ``s % pp``.
        schedule: Name of the schedule, or ``zero_bubble_2p``.
        num_microbatches: Of one step of one pipeline.
        more_in_flight: Microbatches that every stage keeps besides the schedule's, in units of
            one microbatch.
        in_flight_factor: How many times the schedule's microbatches every stage keeps.
    """

    pricer: RankPricer
    stages: tuple[RankBlock, ...]
    schedule: str
    num_microbatches: int
    more_in_flight: float = 0.0
    in_flight_factor: float = 1.0

    @cached_property
    def shape(self) -> PipelineShape:
        """Stages and their ranks."""
        depth, pp = len(self.stages), self.pricer.sizes.pp
        placed = None
        if self.schedule != ZERO_BUBBLE_2P:
            placed = schedule_kind(self.schedule).place(depth, pp)
        devices = placed or [stage % pp for stage in range(depth)]
        return PipelineShape.of(depth, self.num_microbatches, devices)

    def _of_rank(self, rank: int) -> list[RankBlock]:
        places = zip(self.stages, self.shape.devices, strict=True)
        return [stage for stage, place in places if place == rank]

    def step_s(self) -> float:
        """Return the seconds of one optimizer step."""
        times = [
            StageTimes(s.forward_s + copy_s, s.backward_s + copy_s, s.backward_s / 2)
            for s, copy_s in zip(self.stages, self.copies_s(), strict=True)
        ]
        if self.schedule == ZERO_BUBBLE_2P:
            busiest = max(one.forward_s + one.backward_s for one in times)
            passes_s = self.num_microbatches * busiest
        else:
            passes_s = step_seconds(schedule_kind(self.schedule), self.shape, times)
        return passes_s + self.once_s()

    def copies_s(self) -> list[float]:
        """Return the seconds of one pass's copies over both boundaries of every stage."""
        pricer, machine = self.pricer, self.pricer.machine
        sizes, kernels = pricer.sizes, machine.devices[0].kernels
        num_bytes = _HALF_BYTES * pricer.tokens * pricer.hidden / pricer.shared
        share, apart = (1.0 if kernels is None else kernels.link_share), sizes.num_devices
        shown = 1.0 - (pricer.engine.pipeline_overlap if len(self.stages) > sizes.pp else 0.0)
        found = [0.0]
        for stage in range(len(self.stages) - 1):
            places = self.shape.devices[stage : stage + 2]
            here, there = (place * apart // sizes.pp for place in places)
            link = machine.link_between(here, there)
            one_s = link.latency_s + num_bytes / (link.bytes_per_s * share)
            found.append(0.0 if here == there else shown * one_s)
        found.append(0.0)
        return [found[stage] + found[stage + 1] for stage in range(len(self.stages))]

    def once_s(self) -> float:
        """Return the seconds of update and reduction that the last backward passes do not hide."""
        worst = 0.0
        for rank in range(self.pricer.sizes.pp):
            own = self._of_rank(rank)
            held = sum((stage.parameters for stage in own), RankParameters())
            reduction_s = self.pricer.reduction_s(held)
            beside_s = sum(stage.backward_s for stage in own)
            worst = max(worst, self.pricer.update_s(held) + max(0.0, reduction_s - beside_s))
        return worst

    def memory_bytes(self) -> tuple[float, ...]:
        """Return the most bytes that every rank of the pipeline holds."""
        found = []
        for rank, kept in enumerate(self._kept_bytes()):
            own = self._of_rank(rank)
            held = sum((stage.parameters for stage in own), RankParameters())
            more = self.more_in_flight * own[-1].saved_bytes
            used = self.pricer.state_bytes(held) + self.in_flight_factor * kept + more
            used += max(stage.workspace_bytes for stage in own) + _BUFFER_BYTES
            found.append(self.pricer.engine.reserved_share * used)
        return tuple(found)

    def _kept_bytes(self) -> Sequence[float]:
        """Most bytes of saved tensors on every rank at one time: its passes one after another."""
        saved, depth = [stage.saved_bytes for stage in self.stages], self.pricer.sizes.pp
        if self.schedule == ZERO_BUBBLE_2P:
            return [2 * depth * one for one in saved]
        if self.schedule == _ZERO_BUBBLE_1P and len(saved) == depth:
            return [depth * one for one in saved]  # weights' gradients wait, too
        kind, found = schedule_kind(self.schedule), []
        for actions in kind.rows(kind.shortened(self.shape, 4 * depth)).rows:
            now = most = 0.0
            for action in actions:
                sign = {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
                now += sign * saved[action.stage]
                most = max(most, now)
            found.append(most)
        return found
