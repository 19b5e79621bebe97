"""The public door of the solver: the best split, or an error that says what would help."""

from __future__ import annotations

from collections.abc import Mapping

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.infeasible import explain
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.result import Partition


def solve(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    remedies: Mapping[str, GraphCosts] | None = None,
) -> Partition:
    """Find the quickest split of ``graph`` over ``machine`` that satisfies ``constraints``.

    Args:
        graph: The model.
        costs: Its prices on ``machine``.
        machine: Devices, memories and links.
        constraints: What is fixed, and the numbers of the run.
        remedies: Other prices to try when nothing fits, by what the user would do to get them
            ("keep the optimizer state off chip"). The text completes "it fits if you ...".

    Returns:
        The best split, its seconds per optimizer step, and a proven lower bound over every
        allowed split, depth and number of replicas.

    Raises:
        InfeasibleError: Nothing fits; the message names the smallest changes that do fit.
        PartitionError: A constraint is wrong, or the time limit was too short for any split.
    """
    best = search(graph, costs, machine, constraints)
    if best is None:
        raise explain(graph, costs, machine, constraints, remedies or {})
    return best
