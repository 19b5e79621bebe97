"""From a solved split to a plan: everything decided and predicted, as plain data.

Passes may annotate a solved plan; it is then priced again exactly as it is annotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ipu_pipeline.capture import CapturedModel, model_identity
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedBlock, PlannedStage, PlannedTable
from ipu_pipeline.plan_request import offering
from ipu_pipeline.planner.options.block_cost import CostModel, GraphCosts
from ipu_pipeline.planner.options.tables import table_of, unfused_heads
from ipu_pipeline.planner.passes.manager import PassManager
from ipu_pipeline.planner.search import Constraints, Partition, StageAssignment
from ipu_pipeline.planner.search.given_split import evaluate_plan, factors_of


def make_plan(
    captured: CapturedModel, machine: Machine, costs: GraphCosts, partition: Partition
) -> Plan:
    """Write down a solved split as a plan."""
    graph = captured.graph
    made = Plan(
        model=model_identity(captured.model),
        machine=machine,
        stages=tuple(map(_planned_stage, partition.stages)),
        blocks=tuple(_planned_blocks(graph, costs)),
        tensors=tuple(spec for spec in graph.tensors if spec.consumers),
        inputs=graph.inputs,
        num_microbatches=partition.num_microbatches,
        replicas=partition.replicas,
        schedule=partition.schedule,
        granularity=captured.granularity,
        cost_source=costs.source,
        objective_s=partition.objective,
        lower_bound_s=partition.lower_bound,
        binding=partition.binding,
        tied_groups=graph.tied_groups,
    )
    return replace(made, decision_digest=made.digest())


def run_passes(made: Plan, manager: PassManager, price: Callable[[Plan], Partition]) -> Plan:
    """Run the passes and predict again for what they wrote.

    Args:
        made: The solved plan.
        manager: The passes.
        price: Prices a plan as it is annotated.

    Raises:
        PartitionError: The annotated plan does not fit.
    """
    if not manager.passes:
        return made
    annotated = manager.run(made)
    try:
        partition = price(annotated)
    except PartitionError as error:
        raise PartitionError(f"the plan after the passes {manager}: {error}") from error
    stages = tuple(
        replace(_planned_stage(stage), table_slices=before.table_slices)
        for stage, before in zip(partition.stages, annotated.stages, strict=True)
    )
    priced = replace(
        annotated,
        stages=stages,
        objective_s=partition.objective,
        lower_bound_s=min(made.lower_bound_s, partition.objective),
        binding=partition.binding,
    )
    return replace(priced, decision_digest=priced.digest())


def price_annotated(
    graph: BlockGraph, costs: CostModel, limits: Constraints, annotated: Plan
) -> Partition:
    """Price the split of ``annotated`` as the solver would, with its own slices and recomputation.

    Raises:
        PartitionError: It does not fit.
    """
    factors = factors_of(annotated)
    apart = unfused_heads(graph, annotated.stage_of, [n for n, f in factors.items() if f > 1])
    prices = offering(costs, factors, apart).estimate(graph, annotated.machine)
    return evaluate_plan(graph, prices, annotated.machine, limits, annotated)


def _planned_stage(stage: StageAssignment) -> PlannedStage:
    return PlannedStage(
        device=stage.device,
        blocks=stage.blocks,
        recompute=stage.recomputed,
        serialize=stage.serialized,
        forward_s=stage.forward_s,
        backward_s=stage.backward_s,
        transfer_s=stage.transfer_s,
        memory_bytes=stage.memory_bytes,
        in_flight=stage.in_flight,
        weight_bytes=stage.weight_bytes,
        stash_bytes=stage.stash_bytes,
    )


def _planned_blocks(graph: BlockGraph, costs: GraphCosts) -> list[PlannedBlock]:
    planned = []
    for block in graph.blocks:
        price = costs.blocks[block.name]
        planned.append(
            PlannedBlock(
                name=block.name,
                kind=block.kind,
                num_parameters=sum(graph.parameter_by_fqn[f].numel for f in block.parameters),
                weight_bytes=sum(price.weight_bytes.values()),
                forward_flops=block.forward_flops,
                forward_s=price.plain.forward_s,
                backward_s=price.plain.backward_s,
                stash_bytes=price.plain.stash_bytes,
                table=_planned_table(graph, block),
            )
        )
    return planned


def _planned_table(graph: BlockGraph, block: Block) -> PlannedTable | None:
    table = table_of(graph, block)
    if table is None:
        return None
    return PlannedTable(table.parameter, table.rows, table.width, table.use, table.is_large)
