"""Pricing a split that somebody else chose: an edited plan, a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.model import GraphCosts
from ipu_pipeline.planner.search.build import build_problem
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.engine import Candidate, Engine
from ipu_pipeline.planner.search.objective import least_microbatches
from ipu_pipeline.planner.search.pricing import Pricer
from ipu_pipeline.planner.search.problem import Problem, bits
from ipu_pipeline.planner.search.report import to_partition
from ipu_pipeline.planner.search.result import Partition
from ipu_pipeline.planner.search.search import candidate
from ipu_pipeline.planner.search.shapes import Shape


def evaluate(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    stages: Sequence[Sequence[str]],
) -> Partition:
    """Price a given split; how its blocks run (recompute, serialize) is still chosen exactly.

    Args:
        graph: The model.
        costs: Its prices on ``machine``.
        machine: Where it runs.
        constraints: As for :func:`~ipu_pipeline.planner.search.solve`; ``stage_devices`` says where
            stages share a device, otherwise stage i runs on device i.
        stages: Blocks of every stage; their order inside a stage does not matter.

    Returns:
        The split with its price. Its ``lower_bound`` is one over all splits of this depth that
        needs no search, so ``gap`` is an upper estimate of what a better split could save.

    Raises:
        PartitionError: A block is missing, unknown or placed twice; a stage is empty or reads
            from a later one; a constraint is violated; a stage does not fit.
    """
    shape = _shape(graph, machine, constraints, stages)
    built = build_problem(graph, costs, machine, constraints, shape.replicas)
    masks = _stage_masks(graph, stages)
    item = candidate(graph, costs, machine, constraints, shape, built)
    _check_order(built.problem, masks, constraints)
    _check_constraints(built.problem, masks, item)
    done = [0]
    for mask in masks:
        done.append(done[-1] | mask)
    engine = Engine(built, constraints, training=graph.training, masks=done)
    found = engine.run_labels(item, inf)
    if not found.prices:
        raise PartitionError(_overflow(built.problem, masks, item))
    bound = engine.at_once(item)
    partition = to_partition(found, built, item.slots, machine, constraints, shape)
    return partition.with_bound(bound)


def _shape(
    graph: BlockGraph, machine: Machine, constraints: Constraints, stages: Sequence[Sequence[str]]
) -> Shape:
    devices = constraints.stage_devices or tuple(range(len(stages)))
    if len(devices) != len(stages):
        raise PartitionError(
            f"the split has {len(stages)} stages, stage_devices has {len(devices)} entries"
        )
    if constraints.num_stages not in (None, len(stages)):
        raise PartitionError(
            f"the split has {len(stages)} stages, num_stages asks for {constraints.num_stages}"
        )
    if not stages or max(devices) >= len(machine.devices) or min(devices) < 0:
        raise PartitionError(
            f"{len(stages)} stages on devices {list(devices)} do not fit machine "
            f"{machine.name!r} with {len(machine.devices)} devices"
        )
    replicas, total = constraints.replicas or 1, constraints.total_microbatches
    microbatches = constraints.num_microbatches if total is None else total // replicas
    needed = least_microbatches(constraints.schedule, len(stages), training=graph.training)
    if microbatches < needed:
        raise PartitionError(
            f"PopART needs at least {needed} microbatches per step for {len(stages)} stages, got "
            f"{microbatches}"
        )
    return Shape(replicas, microbatches, devices)


def _stage_masks(graph: BlockGraph, stages: Sequence[Sequence[str]]) -> list[int]:
    masks, seen = [], 0
    for number, stage in enumerate(stages):
        mask = 0
        for name in stage:
            if name not in graph.block_index:
                raise PartitionError(
                    f"stage {number} names {name!r}, which the graph does not have"
                )
            bit = 1 << graph.block_index[name]
            if (seen | mask) & bit:
                raise PartitionError(f"block {name!r} is placed twice")
            mask |= bit
        if not mask:
            raise PartitionError(f"stage {number} is empty")
        masks.append(mask)
        seen |= mask
    missing = [b.name for i, b in enumerate(graph.blocks) if not seen >> i & 1]
    if missing:
        raise PartitionError(f"no stage holds {', '.join(missing)}")
    return masks


def _check_order(problem: Problem, masks: Sequence[int], constraints: Constraints) -> None:
    done = 0
    for number, mask in enumerate(masks):
        done |= mask
        for block in bits(mask):
            later = problem.preds[block] & ~done
            if later:
                reason = (
                    "which execution_order forbids"
                    if constraints.execution_order
                    else "whose output it may need"
                )
                raise PartitionError(
                    f"block {problem.names[block]!r} of stage {number} runs before "
                    f"{problem.names_of(later)[0]!r} of a later stage, {reason}"
                )


def _check_constraints(problem: Problem, masks: Sequence[int], item: Candidate) -> None:
    devices = [slot.device for slot in item.slots]
    for group in problem.together:
        if not any(group & ~mask == 0 for mask in masks):
            raise PartitionError(
                f"{' and '.join(problem.names_of(group))} must stay in one stage "
                "(forbidden_cuts, or their prices are those of a pair)"
            )
    for group in problem.same_device:
        used = {d for d, mask in zip(devices, masks, strict=True) if mask & group}
        if len(used) > 1:
            raise PartitionError(
                f"{', '.join(problem.names_of(group))} must be on one device, the split has them "
                f"on devices {sorted(used)}"
            )
    done = 0
    for number, (slot, mask) in enumerate(zip(item.slots, masks, strict=True)):
        if slot.forbidden & mask:
            raise PartitionError(
                f"block {problem.names_of(slot.forbidden & mask)[0]!r} is pinned elsewhere than "
                f"stage {number} on device {slot.device}"
            )
        done |= mask
        if item.rule is not None and not item.rule.allows(done, number + 1):
            raise PartitionError(
                f"stage {number} breaks layers_per_ipu: {item.rule.describe(done, number + 1)}"
            )


def _overflow(problem: Problem, masks: Sequence[int], item: Candidate) -> str:
    """Say which stage needs how much."""
    pricer, done, worst = Pricer(problem), 0, ""
    for number, (slot, mask) in enumerate(zip(item.slots, masks, strict=True)):
        least = pricer.least_bytes(done, mask, slot)
        done |= mask
        if least > slot.capacity:
            return (
                f"stage {number} needs at least {least / 1e6:.4g} MB, its memory is "
                f"{slot.capacity / 1e6:.4g} MB; move blocks to "
                "another stage, or recompute or serialize more of them"
            )
        worst = f"{slot.capacity / 1e6:.4g} MB"
    return (
        f"the stages that share a memory of {worst} need more than that together; move blocks to "
        "another device"
    )
