"""The answer with the caller's names: which blocks run where, how, at what cost, how proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import PlannedStage, VocabularyRows
from ipu_pipeline.ir.text import about_megabytes
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.problem import Problem, Slot, bits
from ipu_pipeline.planner.search.stage_price import PricedPipeline


@dataclass(frozen=True)
class Partition:
    """A split with its price and the proof of its quality.

    Attributes:
        stages: In pipeline order, with the predictions of the search; parameters that another
            stage of the same memory also uses count in each.
        objective: Seconds per optimizer step.
        lower_bound: No allowed split is quicker than this, in seconds per optimizer step.
        binding: What limits it: the stage that paces the pipeline, and a memory that forced
            recomputation or serialization, if any.
        schedule: Schedule the times are for.
        num_microbatches: Microbatches per step of one pipeline.
        replicas: Copies of the pipeline, each with its own devices.
        settings: The backend's own settings that the split was priced under, as JSON data.
        vocabulary: Which stage holds which rows, where the vocabulary is spread.
    """

    stages: tuple[PlannedStage, ...]
    objective: float
    lower_bound: float
    binding: str
    schedule: str
    num_microbatches: int
    replicas: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    vocabulary: VocabularyRows | None = None

    @property
    def gap(self) -> float:
        """Relative distance to the bound: 0.0 when the split is proven optimal."""
        if self.objective <= self.lower_bound:
            return 0.0
        return (self.objective - self.lower_bound) / self.objective

    @property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Blocks of every stage."""
        return tuple(stage.blocks for stage in self.stages)

    @property
    def devices(self) -> tuple[int, ...]:
        """Device of every stage."""
        return tuple(stage.device for stage in self.stages)

    def with_bound(self, lower_bound: float) -> Partition:
        """Return this split with another proven bound (never above its own price)."""
        return replace(self, lower_bound=min(lower_bound, self.objective))


def to_partition(
    found: PricedPipeline,
    built: Problem,
    slots: Sequence[Slot],
    machine: Machine,
    constraints: Constraints,
) -> Partition:
    """Name the stages of ``found``; its bound is not known here."""
    stages, done = [], 0
    for boundary, price, slot in zip(found.boundaries, found.prices, slots, strict=True):
        picks = zip(bits(boundary & ~done), price.picks, strict=True)
        ways = {built.names[block]: built.options[block][pick] for block, pick in picks}
        choices = tuple(ways.values())
        held = price.memory_bytes + _tied_bytes(built, boundary & ~done, slot, slots)
        weights = _weights(built, boundary & ~done)
        space = max((choice.workspace_bytes for choice in choices), default=0)
        stages.append(
            PlannedStage(
                device=slot.device,
                blocks=tuple(ways),
                recompute=tuple(name for name, way in ways.items() if way.recompute),
                serialize={
                    name: way.serialize_factor
                    for name, way in ways.items()
                    if way.serialize_factor > 1
                },
                forward_s=price.forward_s,
                backward_s=price.backward_s,
                transfer_s=price.send_forward_s + price.send_backward_s,
                memory_bytes=round(held - (_never_at_once(choices) if built.frees_in_order else 0)),
                in_flight=slot.in_flight,
                weight_bytes=round(weights),
                vocabulary_s=price.softmax_s + price.rows_s,
                stash_bytes=round(max(0.0, held - weights - space) / max(1, slot.in_flight)),
            )
        )
        done = boundary
    return Partition(
        stages=tuple(stages),
        objective=found.objective,
        lower_bound=0.0,
        binding=_binding(stages, built, slots, found.prices, machine),
        schedule=constraints.schedule,
        num_microbatches=constraints.num_microbatches,
        replicas=constraints.replicas,
    )


def _weights(built: Problem, stage: int) -> float:
    """Bytes of all parameters that the stage uses, each once."""
    shared = sum(item.num_bytes for item in built.shared_weights if item.users & stage)
    return shared + sum(built.held[block] for block in bits(stage))


def _never_at_once(choices: Sequence[BlockChoice]) -> float:
    """Bytes by which the largest workspace plus the whole stash exceeds the stage's real peak.

    While a block runs, forward or backward, of its microbatch only its own stash and that of the
    blocks before it are there. The search adds up the largest of both, which is never too low.
    """
    if not choices:
        return 0
    stashed = list(accumulate(choice.stash_bytes for choice in choices))
    peak = max(s + choice.workspace_bytes for s, choice in zip(stashed, choices, strict=True))
    return stashed[-1] + max(choice.workspace_bytes for choice in choices) - peak


def _tied_bytes(built: Problem, stage: int, slot: Slot, slots: Sequence[Slot]) -> float:
    """Shared parameters, where the search priced the memory they are in as a whole."""
    if [other.pool for other in slots].count(slot.pool) == 1:
        return 0.0
    return sum(item.num_bytes for item in built.shared_weights if item.users & stage)


def _binding(
    stages: Sequence[PlannedStage],
    built: Problem,
    slots: Sequence[Slot],
    prices: Sequence[StagePrice],
    machine: Machine,
) -> str:
    loads: dict[int, float] = {}
    for stage in stages:
        load_s = stage.forward_s + stage.backward_s + stage.transfer_s + stage.vocabulary_s
        loads[stage.device] = loads.get(stage.device, 0.0) + load_s
    busiest = max(loads, key=lambda device: loads[device])
    indices = [str(index) for index, stage in enumerate(stages) if stage.device == busiest]
    text = (
        f"time: stage {'+'.join(indices)} on {machine.devices[busiest].name} paces the pipeline "
        f"with {loads[busiest] * 1e3:.4g} ms per microbatch"
    )
    slowed = [
        index
        for index, (stage, slot, price) in enumerate(zip(stages, slots, prices, strict=True))
        if _slower_than_fastest(stage, built, slot, price)
    ]
    if slowed:
        fullest = max(slowed, key=lambda index: stages[index].memory_bytes)
        limit = machine.devices[stages[fullest].device]
        text += (
            f"; memory: stage {_ranges(slowed)} recompute or serialize to fit (fullest: stage "
            f"{fullest} with {about_megabytes(stages[fullest].memory_bytes)} of "
            f"{about_megabytes(limit.memory_bytes - limit.reserved_bytes)} MB)"
        )
    return text


def _ranges(indices: Sequence[int]) -> str:
    """Return ascending numbers as text, runs shortened: ``0-3, 5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _slower_than_fastest(
    stage: PlannedStage, built: Problem, slot: Slot, price: StagePrice
) -> bool:
    names = {name: index for index, name in enumerate(built.names)}
    least = sum(built.fastest[names[name]].total_s for name in stage.blocks) / slot.speed
    return price.forward_s + price.backward_s > least * (1 + 1e-9)
