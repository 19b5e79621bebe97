"""From what the search found to the answer with the caller's names and a readable limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.model import BlockChoice
from ipu_pipeline.planner.search.build import Built
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.labels import Found
from ipu_pipeline.planner.search.pricing import Price
from ipu_pipeline.planner.search.problem import Slot, bits
from ipu_pipeline.planner.search.result import Partition, StageAssignment
from ipu_pipeline.planner.search.shapes import Shape


def to_partition(
    found: Found,
    built: Built,
    slots: Sequence[Slot],
    machine: Machine,
    constraints: Constraints,
    shape: Shape,
) -> Partition:
    """Name the stages of ``found``; the bound is the search's own."""
    stages, done = [], 0
    for index, (boundary, price, slot) in enumerate(
        zip(found.boundaries, found.prices, slots, strict=True)
    ):
        blocks = list(bits(boundary & ~done))
        picks = zip(blocks, price.picks, strict=True)
        choices = tuple(built.choices[block][pick] for block, pick in picks)
        held = price.memory_bytes + _tied_bytes(built, boundary & ~done, slot, slots)
        weights = 0.0 if slot.host else _weights(built, boundary & ~done)
        space = max((choice.workspace_bytes for choice in choices), default=0)
        stages.append(
            StageAssignment(
                index=index,
                device=slot.device,
                blocks=tuple(built.problem.names[block] for block in blocks),
                choices=choices,
                forward_s=price.forward_s,
                backward_s=price.backward_s,
                transfer_s=price.send_forward_s + price.send_backward_s,
                memory_bytes=round(held - (_never_at_once(choices) if built.frees_in_order else 0)),
                in_flight=slot.in_flight,
                weight_bytes=round(weights),
                stash_bytes=round(max(0.0, held - weights - space) / max(1, slot.in_flight)),
            )
        )
        done = boundary
    return Partition(
        stages=tuple(stages),
        objective=found.objective,
        lower_bound=min(found.lower_bound, found.objective),
        binding=_binding(stages, built, slots, found.prices, machine),
        schedule=constraints.schedule,
        num_microbatches=shape.num_microbatches,
        replicas=shape.replicas,
    )


def _weights(built: Built, stage: int) -> float:
    """Bytes of all parameters that the stage uses, each once."""
    problem = built.problem
    shared = sum(item.num_bytes for item in problem.shared_weights if item.users & stage)
    return shared + sum(problem.held[block] for block in bits(stage))


def _never_at_once(choices: Sequence[BlockChoice]) -> int:
    """Bytes by which the largest workspace plus the whole stash exceeds the stage's real peak.

    While a block runs, forward or backward, of its microbatch only its own stash and that of the
    blocks before it are there. The search adds up the largest of both, which is never too low.
    """
    if not choices:
        return 0
    stashed = list(accumulate(choice.stash_bytes for choice in choices))
    peak = max(s + choice.workspace_bytes for s, choice in zip(stashed, choices, strict=True))
    return stashed[-1] + max(choice.workspace_bytes for choice in choices) - peak


def _tied_bytes(built: Built, stage: int, slot: Slot, slots: Sequence[Slot]) -> float:
    """Shared parameters, where the search priced the memory they are in as a whole."""
    if [other.pool for other in slots].count(slot.pool) == 1:
        return 0.0
    return sum(item.num_bytes for item in built.problem.shared_weights if item.users & stage)


def _binding(
    stages: Sequence[StageAssignment],
    built: Built,
    slots: Sequence[Slot],
    prices: Sequence[Price],
    machine: Machine,
) -> str:
    loads: dict[int, float] = {}
    for stage in stages:
        loads[stage.device] = loads.get(stage.device, 0.0) + stage.load_s
    busiest = max(loads, key=lambda device: loads[device])
    indices = [str(stage.index) for stage in stages if stage.device == busiest]
    text = (
        f"time: stage {'+'.join(indices)} on {machine.devices[busiest].name} paces the pipeline "
        f"with {loads[busiest] * 1e3:.4g} ms per microbatch"
    )
    slowed = [
        stage.index
        for stage, slot, price in zip(stages, slots, prices, strict=True)
        if _slower_than_fastest(stage, built, slot, price)
    ]
    if slowed:
        fullest = max((stages[index] for index in slowed), key=lambda stage: stage.memory_bytes)
        limit = machine.devices[fullest.device]
        text += (
            f"; memory: stage {_ranges(slowed)} recompute or serialize to fit (fullest: stage "
            f"{fullest.index} with {fullest.memory_bytes / 1e6:.4g} of "
            f"{(limit.memory_bytes - limit.reserved_bytes) / 1e6:.4g} MB)"
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


def _slower_than_fastest(stage: StageAssignment, built: Built, slot: Slot, price: Price) -> bool:
    names = {name: index for index, name in enumerate(built.problem.names)}
    least = sum(built.problem.fastest[names[name]].total_s for name in stage.blocks) / slot.speed
    return price.forward_s + price.backward_s > least * (1 + 1e-9)
