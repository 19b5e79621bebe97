"""One optimizer step of a pipeline of ranks: seconds by the schedule's replay, bytes of every rank.

The stages are given as what each does for one microbatch (:class:`RankBlock`); the schedules are
those of :mod:`ipu_pipeline.planner.schedules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankParameters, RankPricer
from ipu_pipeline.planner.schedules import PipelineShape, StageTimes, schedule_kind, step_seconds
from ipu_pipeline.planner.schedules.stage_loads import Copies

# A schedule that torch has no class for: weights' gradients fill all bubbles, with twice as many
# microbatches in flight. Source: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, ZB-2p.
ZERO_BUBBLE_2P = "zero_bubble_2p"
_ZERO_BUBBLE_1P = "interleaved_zero_bubble"
# Workspaces of products and buffers of collectives.
BUFFER_BYTES = 400_000_000
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
        ranks: Rank of every stage, from 0; empty: where the schedule places them.
        given_copies: Seconds of the copies of every stage; empty: of the residual stream.
        given_outer_s: Seconds of the update of every stage; empty: of all its parameters.
        whole: Stages whose backward pass is not split.
    """

    pricer: RankPricer
    stages: tuple[RankBlock, ...]
    schedule: str
    num_microbatches: int
    more_in_flight: float = 0.0
    in_flight_factor: float = 1.0
    ranks: tuple[int, ...] = ()
    given_copies: tuple[Copies, ...] = ()
    given_outer_s: tuple[float, ...] = ()
    whole: frozenset[int] = frozenset()

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """Rank of every stage."""
        depth, pp, placed = len(self.stages), self.pricer.sizes.pp, None
        if self.schedule != ZERO_BUBBLE_2P:
            placed = schedule_kind(self.schedule).place(depth, pp)
        return self.ranks or placed or tuple(stage % pp for stage in range(depth))

    @cached_property
    def shape(self) -> PipelineShape:
        """Stages and their ranks."""
        return PipelineShape.of(len(self.stages), self.num_microbatches, self.rank_of)

    def on_rank(self, rank: int) -> list[int]:
        """Return the stages of a rank."""
        return [stage for stage, own in enumerate(self.rank_of) if own == rank]

    def weights_s(self, stage: int) -> float:
        """Seconds of the backward pass that a split one computes later."""
        return 0.0 if stage in self.whole else self.stages[stage].backward_s / 2

    def passes_s(self) -> float:
        """Return the seconds of all passes and copies of a step."""
        times = [
            StageTimes(s.forward_s + copy.forward_s, s.backward_s + copy.backward_s,
                       self.weights_s(number))
            for number, (s, copy) in enumerate(zip(self.stages, self.copies, strict=True))
        ]  # fmt: skip
        if self.schedule == ZERO_BUBBLE_2P:
            return self.num_microbatches * max(one.forward_s + one.backward_s for one in times)
        return step_seconds(schedule_kind(self.schedule), self.shape, times)

    def step_s(self) -> float:
        """Return the seconds of one optimizer step."""
        return self.passes_s() + self.once_s()

    @cached_property
    def copies(self) -> tuple[Copies, ...]:
        """Seconds of the copies of one microbatch over both boundaries of every stage."""
        if self.given_copies:
            return self.given_copies
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
        return tuple(Copies(before, behind, behind, before) for before, behind in pairwise(found))

    def once_s(self) -> float:
        """Return the seconds of update and reduction that the last backward passes do not hide."""
        worst = 0.0
        for rank in range(self.pricer.sizes.pp):
            numbers = self.on_rank(rank)
            own = [self.stages[number] for number in numbers]
            held = sum((stage.parameters for stage in own), RankParameters())
            update_s = self.pricer.update_s(held)
            if self.given_outer_s:
                update_s = sum(self.given_outer_s[number] for number in numbers)
            reduction_s = self.pricer.reduction_s(held)
            beside_s = sum(stage.backward_s for stage in own)
            worst = max(worst, update_s + max(0.0, reduction_s - beside_s))
        return worst

    def memory_bytes(self) -> tuple[float, ...]:
        """Return the most bytes that every rank of the pipeline holds."""
        found = []
        for rank, kept in enumerate(self.kept_bytes()):
            own = [self.stages[number] for number in self.on_rank(rank)]
            held = sum((stage.parameters for stage in own), RankParameters())
            more = self.more_in_flight * own[-1].saved_bytes
            used = self.pricer.state_bytes(held) + self.in_flight_factor * kept + more
            used += max(stage.workspace_bytes for stage in own) + BUFFER_BYTES
            found.append(self.pricer.engine.reserved_share * used)
        return tuple(found)

    def kept_bytes(self) -> Sequence[float]:
        """Most bytes of saved tensors on every rank at one time: its passes one after another."""
        saved, depth = [stage.saved_bytes for stage in self.stages], self.pricer.sizes.pp
        if self.schedule == ZERO_BUBBLE_2P:
            return [2 * depth * one for one in saved]
        if self.schedule == _ZERO_BUBBLE_1P and len(saved) == depth:
            return [depth * one for one in saved]  # weights' gradients wait, too
        kind, found = schedule_kind(self.schedule), []
        if len(saved) == depth:
            flying = kind.in_flight(self.shape)
            return [number * one for number, one in zip(flying, saved, strict=True)]
        for actions in kind.rows(kind.shortened(self.shape, 4 * depth)).rows:
            now = most = 0.0
            for action in actions:
                sign = {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
                now += sign * saved[action.stage]
                most = max(most, now)
            found.append(most)
        return found
