"""Pricing a plan exactly as it is annotated: nothing about it is left to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph, TensorSpec
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.tables import VocabularyTable, looked_up, table_of
from ipu_pipeline.planner.options.vocabulary_shares import Share, VocabularyShares, with_shares
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.schedules.stage_loads import Copies, StageLoad
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.from_graph import build_problem, build_slots
from ipu_pipeline.planner.search.problem import mask_of
from ipu_pipeline.planner.search.result import Partition, to_partition
from ipu_pipeline.planner.search.stage_price import OptionPricer, PricedPipeline


def factors_of(plan: Plan) -> dict[str, int]:
    """Return the slices of every block; 1 is whole."""
    return {name: stage.serialize.get(name, 1) for stage in plan.stages for name in stage.blocks}


@dataclass(frozen=True)
class GivenStages:
    """The priced stages of a plan.

    Attributes:
        split: With the recomputation that saves something, and what limits it.
        loads: What a microbatch asks of every stage.
        once_s: Seconds that every stage spends once per optimizer step.
    """

    split: Partition
    loads: tuple[StageLoad, ...]
    once_s: tuple[float, ...]

    def halved(self, *, whole: bool = True) -> GivenStages:
        """Let gradients of weights be computed later than those of inputs.

        They take half of the backward pass each, as both take the operations of the forward pass;
        ``whole``: not in stages that recompute or run in slices.
        """
        pairs = zip(self.loads, self.split.stages, strict=True)
        loads = tuple(
            load
            if whole and (stage.recompute or stage.serialize)
            else replace(load, weights_s=load.backward_s / 2)
            for load, stage in pairs
        )
        return replace(self, loads=loads)


def price_stages(plan: Plan, costs: GraphCosts) -> GivenStages:
    """Price the stages of ``plan`` with its own recomputation, slices and shares of tables.

    A block that would save nothing by recomputation stays plain. Whether a stage fits its memory
    is not asked.

    Args:
        plan: The plan.
        costs: Prices of its blocks, and of its shares of the vocabulary (``with_shares``); they
            must offer the plan's numbers of slices.
    """
    whole, (plan, shares) = plan.graph, with_shares(plan)
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
    spread = _vocabulary_s(plan, whole, costs, shares)
    costs = _shares_apart(costs, shares)
    built = build_problem(graph, costs, plan.machine, limits)
    slots = build_slots(
        costs, plan.machine, limits, devices, graph, plan.num_microbatches, sorted(shares)
    )
    slots = tuple(replace(slot, capacity=inf, pool=i) for i, slot in enumerate(slots))
    pricer, done, prices, boundaries, copies = OptionPricer(built), 0, [], [], []
    for number, (stage, slot) in enumerate(zip(plan.stages, slots, strict=True)):
        mask = mask_of(graph.block_index[name] for name in stage.blocks)
        best = pricer.best(done, mask, slot)
        assert best is not None  # the memory has no limit here
        softmax_s, rows_s = spread.get(number, (0.0, 0.0))
        prices.append(replace(best, softmax_s=softmax_s, rows_s=rows_s))
        forward_in_s, backward_out_s = pricer.crossing_s(done, slot.link_in)
        done |= mask
        forward_out_s, backward_in_s = pricer.crossing_s(done, slot.link_out)
        copies.append(Copies(forward_in_s, forward_out_s, backward_in_s, backward_out_s))
        boundaries.append(done)
    found = PricedPipeline(0.0, tuple(boundaries), tuple(prices))
    split = to_partition(found, built, slots, plan.machine, limits)
    loads = tuple(map(_load, split.stages, copies, prices))
    return GivenStages(split, loads, tuple(price.outer_s for price in prices))


def _load(stage: PlannedStage, copies: Copies, price: StagePrice) -> StageLoad:
    held = stage.weight_bytes + stage.in_flight * stage.stash_bytes
    return StageLoad(
        device=stage.device,
        forward_s=stage.forward_s,
        backward_s=stage.backward_s,
        copies=copies,
        weight_bytes=stage.weight_bytes,
        stash_bytes=stage.stash_bytes,
        workspace_bytes=max(0, stage.memory_bytes - held),
        in_flight=stage.in_flight,
        softmax_s=price.softmax_s,
        rows_s=price.rows_s,
    )


def _shares_apart(costs: GraphCosts, shares: Mapping[int, Share]) -> GraphCosts:
    """Take the seconds of shares of the vocabulary out of their blocks: no pass has them."""
    quiet = {
        name: replace(costs.blocks[name].plain, forward_s=0.0, backward_s=0.0)
        for share in shares.values()
        for name in share.names
    }
    alone = {name: replace(costs.blocks[name], choices=(way,)) for name, way in quiet.items()}
    return replace(costs, blocks={**costs.blocks, **alone})


def _vocabulary_s(
    plan: Plan, graph: BlockGraph, costs: GraphCosts, shares: Mapping[int, Share]
) -> dict[int, tuple[float, float]]:
    """Return the seconds of softmax and rows of every share, with its messages.

    These go over the slowest link between two of the devices. Where they are no collectives, the
    last stage sends to and hears from every other one.
    """
    last = plan.num_stages - 1
    devices = {plan.stages[stage].device for stage in (*shares, last)}
    alone = len(devices) < 2 or plan.machine.shared_memory
    link = None if alone else plan.machine.link_between(min(devices), max(devices))
    overlap, found = costs.message_overlap, {}
    messages = VocabularyShares(graph).message_s(link, overlap) if shares else (0.0, 0.0)
    for stage, share in shares.items():
        speed = costs.speed(plan.stages[stage].device)
        softmax_s, rows_s = (
            sum(costs.blocks[name].plain.total_s for name in names) / speed
            for names in (share.softmax, share.rows)
        )
        others = 1 if overlap or stage != last else len(shares.keys() - {last})
        found[stage] = softmax_s + others * messages[0], rows_s + messages[1]
    return found


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
