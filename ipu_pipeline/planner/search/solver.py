"""The public door of the solver: the best split, or an error that says what would help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.infeasible import explain
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.result import Partition

StepPrice = Callable[[Partition], float]


def solve(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    *,
    step: StepPrice | None = None,
) -> Partition:
    """Find the quickest split of ``graph`` over ``machine`` that satisfies ``constraints``.

    Args:
        graph: The model.
        costs: Its prices on ``machine``.
        machine: Devices, memories and links.
        constraints: What is fixed, and the numbers of the run.
        step: Seconds of an optimizer step of a split by the backend's own price, ``inf`` where it
            does not fit; the quickest of the best splits found is returned with it. ``None``: the
            closed form that the search minimises.

    Returns:
        The best split, its seconds per optimizer step, and a proven lower bound over every
        allowed split, depth and number of replicas: with ``step``, of the schedule's exact replay.

    Raises:
        InfeasibleError: Nothing fits; the message names the smallest changes that do fit.
        PartitionError: A constraint is wrong, the time limit was too short for any split, or
            ``step`` says of every split found that it does not fit.
    """
    found = search(graph, costs, machine, constraints)
    if not found.partitions and costs.planning is not None:
        raise costs.planning.explain(machine, constraints)
    if not found.partitions:
        raise explain(graph, costs, machine, constraints)
    if step is None:
        return found.partitions[0]
    priced = [replace(item, objective=step(item)) for item in found.partitions]
    best = min(priced, key=lambda item: item.objective)
    if best.objective == inf:
        raise PartitionError(
            f"none of the {len(priced)} best splits fits by the machine's own price; use more "
            "devices, or allow recompute or serialization"
        )
    return best.with_bound(found.step_bound(best.objective))
