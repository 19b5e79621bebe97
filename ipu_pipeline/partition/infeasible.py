"""The public ``solve``: the best split, or what would have to change for one to fit."""

from __future__ import annotations

from ipu_pipeline.cost.model import GraphCosts
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.partition.constraints import Constraints
from ipu_pipeline.partition.result import Partition
from ipu_pipeline.partition.solver import search


def solve(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, constraints: Constraints
) -> Partition:
    """Find the quickest split of ``graph`` over ``machine`` that satisfies ``constraints``.

    Returns:
        The best split, its seconds per optimizer step, and a proven lower bound over every
        allowed split, depth and number of replicas.

    Raises:
        PartitionError: Nothing fits (the message says what would), or a constraint is wrong.
    """
    best = search(graph, costs, machine, constraints)
    if best is None:
        raise PartitionError("no split fits")
    return best
