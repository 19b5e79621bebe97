"""Pricing a split that somebody else chose: an edited plan, a baseline.

Pricing a plan exactly as it is annotated: nothing about it is left to choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.tables import VocabularyTable, looked_up, table_of
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.from_graph import build_problem, build_slots
from ipu_pipeline.planner.search.objective import schedule_problem
from ipu_pipeline.planner.search.parallel import ParallelConfiguration
from ipu_pipeline.planner.search.pipeline_search import CandidatePipeline, Engine, candidate
from ipu_pipeline.planner.search.problem import Problem, bits, mask_of
from ipu_pipeline.planner.search.result import Partition, to_partition
from ipu_pipeline.planner.search.stage_price import OptionPricer, PricedPipeline


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
    if costs.planning is not None:
        return costs.planning.evaluate(machine, constraints, stages)
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
    if not found.pipelines:
        raise PartitionError(_overflow(built.problem, masks, item))
    bound = engine.at_once(item)
    partition = to_partition(found.pipelines[0], built, item.slots, machine, constraints, shape)
    return partition.with_bound(bound)


def _shape(
    graph: BlockGraph, machine: Machine, constraints: Constraints, stages: Sequence[Sequence[str]]
) -> ParallelConfiguration:
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
    problem = schedule_problem(constraints.schedule, devices, microbatches, training=graph.training)
    if problem:
        raise PartitionError(problem)
    return ParallelConfiguration(replicas, microbatches, devices)


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


def _check_constraints(problem: Problem, masks: Sequence[int], item: CandidatePipeline) -> None:
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


def _overflow(problem: Problem, masks: Sequence[int], item: CandidatePipeline) -> str:
    """Say which stage needs how much."""
    pricer, done, worst = OptionPricer(problem), 0, ""
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


def factors_of(plan: Plan) -> dict[str, int]:
    """Return the slices of every block; 1 is whole."""
    return {name: stage.serialize.get(name, 1) for stage in plan.stages for name in stage.blocks}


def price_stages(plan: Plan, costs: GraphCosts) -> tuple[Partition, tuple[float, ...], BlockGraph]:
    """Price the stages of ``plan`` with its own recomputation, slices and split tables.

    A block that would save nothing by recomputation stays plain. Whether a stage fits its memory
    is not asked.

    Args:
        plan: The plan.
        costs: Prices of its blocks; they must offer the plan's numbers of slices.

    Returns:
        The stages, the seconds that each spends once per optimizer step, and the graph with the
        sums of split tables as tensors.
    """
    devices = tuple(stage.device for stage in plan.stages)
    limits = Constraints(
        stage_devices=devices,
        num_microbatches=plan.num_microbatches,
        replicas=plan.replicas,
        schedule=plan.schedule,
        recompute=tuple(name for stage in plan.stages for name in stage.recompute),
        serialize=factors_of(plan),
        tied=plan.settings.get("tied", "free"),
        update_s=plan.settings.get("update_s", {}),
    )
    graph, costs = _with_split_tables(plan.graph, costs, plan)
    built = build_problem(graph, costs, plan.machine, limits, plan.replicas)
    slots = build_slots(costs, plan.machine, limits, devices, graph, plan.num_microbatches)
    slots = tuple(replace(slot, capacity=inf, pool=i) for i, slot in enumerate(slots))
    pricer, done, prices, boundaries = OptionPricer(built.problem), 0, [], []
    for stage, slot in zip(plan.stages, slots, strict=True):
        mask = mask_of(graph.block_index[name] for name in stage.blocks)
        best = pricer.best(done, mask, slot)
        assert best is not None  # the memory has no limit here
        prices.append(best)
        done |= mask
        boundaries.append(done)
    found = PricedPipeline(0.0, tuple(boundaries), tuple(prices))
    shape = ParallelConfiguration(plan.replicas, plan.num_microbatches, devices)
    partition = to_partition(found, built, slots, plan.machine, limits, shape)
    return partition, tuple(one.outer_s for one in prices), graph


@dataclass(frozen=True)
class _Share:
    """What one stage holds of the table of a block that runs in ``home``."""

    block: str
    home: int
    stage: int
    first: int
    last: int
    slices: int


def _shares(plan: Plan) -> Iterator[_Share]:
    for index, stage in enumerate(plan.stages):
        for name, (first, last) in stage.table_slices.items():
            home = plan.stage_of[name]
            slices = plan.stages[home].serialize.get(name, 1)
            yield _Share(name, home, index, first, last, slices)


def _with_split_tables(
    graph: BlockGraph, costs: GraphCosts, plan: Plan
) -> tuple[BlockGraph, GraphCosts]:
    """Move slices of tables to the stages that hold them.

    Every stage adds what it found to the sums it received: one tensor of the looked-up rows
    crosses each boundary between them, and its gradient comes back.
    """
    weights = {name: dict(cost.weight_bytes) for name, cost in costs.blocks.items()}
    sums = []
    for share in _shares(plan):
        table = table_of(graph, graph[share.block])
        if table is None:
            raise PartitionError(
                f"stage {share.stage} holds slices of {share.block!r}, which has no table"
            )
        _move(weights, plan, share, table)
        if share.first == 0 and share.stage < share.home:
            sums.append(_partial_sums(graph, plan, share, table))
    if not any(stage.table_slices for stage in plan.stages):
        return graph, costs
    blocks = {
        name: replace(cost, weight_bytes=weights[name]) for name, cost in costs.blocks.items()
    }
    return replace(graph, tensors=(*graph.tensors, *sums)), replace(costs, blocks=blocks)


def _move(
    weights: Mapping[str, dict[str, int]], plan: Plan, share: _Share, table: VocabularyTable
) -> None:
    """Charge a stage with its part of a table, unless another block of it needs all of the table.

    The block itself keeps the part of its own stage, which comes last.
    """
    names = [name for name in plan.stages[share.stage].blocks if name != share.block]
    whole = weights[share.block][table.parameter]
    if share.stage == share.home:
        del weights[share.block][table.parameter]
    if any(table.parameter in weights[name] for name in names):
        if share.stage == share.home:
            weights[share.block][table.parameter] = whole
        return
    part = f"{table.parameter}[{share.first}:{share.last}]"
    holder = share.block if share.stage == share.home else names[0]
    weights[holder][part] = whole * (share.last - share.first) // share.slices


def _partial_sums(
    graph: BlockGraph, plan: Plan, share: _Share, table: VocabularyTable
) -> TensorSpec:
    """The sums that leave the first stage with slices and arrive, complete, at the block."""
    dtype = graph.parameter_by_fqn[table.parameter].dtype
    return TensorSpec(
        f"{share.block}:partial",
        (looked_up(graph[share.block], table), table.width),
        dtype,
        requires_grad=table.trainable,
        producer=min(plan.stages[share.stage].blocks, key=graph.block_index.__getitem__),
        consumers=(share.block,),
    )
