"""One optimizer step of a pipeline of ranks: seconds by the schedule's replay, bytes of every rank.

The schedules are those of :mod:`ipu_pipeline.planner.schedules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ipu_pipeline.backends.cluster.prices.rank import RankParameters, RankPricer
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind, step_seconds
from ipu_pipeline.planner.schedules.stage_loads import StageLoad

# Workspaces of products and buffers of collectives.
BUFFER_BYTES = 400_000_000


@dataclass(frozen=True)
class RankBytes:
    """The most bytes that the GPUs of one rank of a pipeline hold.

    Attributes:
        weights: As products read them.
        gradients: As they are added up.
        optimizer: What the optimizer keeps.
        kept: Most that is kept for backward passes at one time.
        workspace: Most that is needed besides while a pass runs.
        update: Needed besides the state while the optimizer steps, when nothing is kept.
        buffers: Workspaces of libraries and buffers of collectives.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    workspace: int
    update: int = 0
    buffers: int = BUFFER_BYTES

    @property
    def total(self) -> int:
        """All of them together."""
        state = self.weights + self.gradients + self.optimizer
        return state + max(self.kept + self.workspace, self.update) + self.buffers


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """A pipeline of ranks.

    Attributes:
        pricer: Model, machine, sizes, engine.
        loads: What a microbatch asks of every stage; the devices are ranks of the pipeline.
        parameters: Weights of every stage.
        schedule: Name of the schedule.
        num_microbatches: Of one step of one pipeline.
        update_s: Seconds of the update of every stage.
        spread: Stages that hold rows of a vocabulary that is spread.
        deferred: Bytes of every stage that a microbatch keeps from a backward pass without
            gradients of weights to the one that computes them.
    """

    pricer: RankPricer
    loads: tuple[StageLoad, ...]
    parameters: tuple[RankParameters, ...]
    schedule: str
    num_microbatches: int
    update_s: tuple[float, ...]
    spread: tuple[int, ...] = ()
    deferred: tuple[float, ...] = ()

    @cached_property
    def shape(self) -> PipelineShape:
        """Stages and their ranks, numbered in the order of their first stages."""
        devices = [load.device for load in self.loads]
        shape = PipelineShape.of(len(devices), self.num_microbatches, devices, spread=self.spread)
        return replace(shape, devices=shape.positions)

    @cached_property
    def of_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Stages of every rank."""
        numbers, ranks = range(self.shape.num_devices), self.shape.devices
        return tuple(tuple(s for s, own in enumerate(ranks) if own == n) for n in numbers)

    def held_by(self, stages: Sequence[int]) -> RankParameters:
        """Return the weights of some stages."""
        return sum((self.parameters[number] for number in stages), RankParameters())

    def passes_s(self) -> float:
        """Return the seconds of all passes and copies of a step."""
        prices = [load.price for load in self.loads]
        return step_seconds(schedule_kind(self.schedule), self.shape, prices)

    def step_s(self) -> float:
        """Return the seconds of one optimizer step."""
        return self.passes_s() + self.once_s()

    def once_s(self) -> float:
        """Return the seconds of update and reduction that the last backward passes do not hide."""
        worst = 0.0
        for own in self.of_ranks:
            reduction_s = self.pricer.reduction_s(self.held_by(own))
            beside_s = sum(self.loads[number].backward_s for number in own)
            update_s = sum(self.update_s[number] for number in own)
            worst = max(worst, update_s + max(0.0, reduction_s - beside_s))
        return worst

    @cached_property
    def rank_bytes(self) -> tuple[RankBytes, ...]:
        """The most bytes that every rank of the pipeline holds."""
        found = []
        engine = self.pricer.engine
        of_weights = replace(self.pricer, engine=replace(engine, gradient_bytes=0, state_bytes=0))
        of_gradients = replace(self.pricer, engine=replace(engine, weight_bytes=0, state_bytes=0))
        for own, kept in zip(self.of_ranks, self.kept_bytes(), strict=True):
            held = self.held_by(own)
            weights = round(of_weights.state_bytes(held))
            gradients = round(of_gradients.state_bytes(held))
            found.append(
                RankBytes(
                    weights=weights,
                    gradients=gradients,
                    optimizer=sum(self.loads[n].weight_bytes for n in own) - weights - gradients,
                    kept=kept,
                    workspace=max(self.loads[n].workspace_bytes for n in own),
                    update=round(self.pricer.widened_bytes(held)),
                )
            )
        return tuple(found)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest rank."""
        return max(one.total for one in self.rank_bytes)

    def kept_bytes(self) -> Sequence[int]:
        """Most bytes of saved tensors on every rank at one time: its passes one after another."""
        if self.shape.own_devices:
            return [load.in_flight * load.stash_bytes for load in self.loads]
        kind, found = schedule_kind(self.schedule), []
        deferred = self.deferred or (0.0,) * len(self.loads)
        for actions in kind.rows(kind.shortened(self.shape, 4 * self.shape.num_devices)).rows:
            now = most = 0.0
            for action in actions:
                stash, waits = self.loads[action.stage].stash_bytes, deferred[action.stage]
                change = {"F": stash, "B": -stash, "I": waits, "W": -stash - waits}
                now += change.get(action.kind, 0)
                most = max(most, now)
            found.append(round(most))
        return found
