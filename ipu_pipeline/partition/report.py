"""From what the search found to the answer with the caller's names and a readable limit."""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.partition.build import Built
from ipu_pipeline.partition.constraints import Constraints
from ipu_pipeline.partition.labels import Found
from ipu_pipeline.partition.pricing import Price
from ipu_pipeline.partition.problem import Slot, bits
from ipu_pipeline.partition.result import Partition, StageAssignment
from ipu_pipeline.partition.shapes import Shape


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
        stages.append(
            StageAssignment(
                index=index,
                device=slot.device,
                blocks=tuple(built.problem.names[block] for block in blocks),
                choices=tuple(built.choices[block][pick] for block, pick in picks),
                forward_s=price.forward_s,
                backward_s=price.backward_s,
                transfer_s=price.send_forward_s + price.send_backward_s,
                memory_bytes=round(
                    price.memory_bytes + _tied_bytes(built, boundary & ~done, slot, slots)
                ),
                in_flight=slot.in_flight,
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
