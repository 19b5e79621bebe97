"""The flow: which pipelines to try, what the search finds for each, the best with its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from time import monotonic

from ipu_pipeline.cost.model import GraphCosts
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.partition.build import Built, build_problem, build_slots
from ipu_pipeline.partition.constraints import Constraints
from ipu_pipeline.partition.ideals import Lattice
from ipu_pipeline.partition.labels import Found, LabelSearch
from ipu_pipeline.partition.layers_per_ipu import layer_rule
from ipu_pipeline.partition.objective import make_objective
from ipu_pipeline.partition.positions import boundaries
from ipu_pipeline.partition.pricing import Pricer
from ipu_pipeline.partition.problem import Slot
from ipu_pipeline.partition.report import to_partition
from ipu_pipeline.partition.result import Partition
from ipu_pipeline.partition.shapes import Shape, shapes


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


def search(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, constraints: Constraints
) -> Partition | None:
    """Return the best split, or ``None`` when there is none."""
    deadline = monotonic() + constraints.time_limit_s if constraints.time_limit_s else None
    best: Partition | None = None
    upper = lower = inf
    for shape in shapes(graph, machine, constraints):
        built = build_problem(graph, costs, machine, constraints, shape.replicas)
        slots = build_slots(
            costs, machine, constraints, shape.stage_devices, graph, shape.num_microbatches
        )
        lattice = Lattice(built.problem, _uncut(built, shape), constraints.max_ideals)
        found = _search_slots(graph, constraints, shape, built, slots, lattice, upper, deadline)
        lower = min(lower, found.lower_bound)
        if found.objective < upper:
            upper = found.objective
            best = to_partition(found, built, slots, machine, constraints, shape)
    return None if best is None else replace(best, lower_bound=min(lower, best.objective))


def _uncut(built: Built, shape: Shape):
    groups = built.problem.together
    if shape.own_devices:
        groups += built.problem.same_device
    return lambda mask: all(mask & group in (0, group) for group in groups)


def _search_slots(graph, constraints, shape, built, slots, lattice, upper, deadline) -> Found:
    rule = None
    if constraints.layers_per_ipu is not None:
        rule = layer_rule(graph, constraints.layers_per_ipu, shape.stage_devices)
    objective = make_objective(
        constraints.schedule, len(slots), shape.num_microbatches, training=graph.training
    )
    pricer = Pricer(built.problem, split_passes=objective.splits_passes)
    label_search = LabelSearch(
        lattice, pricer, slots, objective, boundaries(lattice, slots, rule), deadline
    )
    return label_search.run(upper)


def evaluate(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    stages: Sequence[Sequence[str]],
) -> Partition:
    """Price a given split (an edited plan, a baseline); options are still chosen exactly.

    Args:
        graph: The model.
        costs: Its prices on ``machine``.
        machine: Where it runs.
        constraints: As for :func:`solve`; ``stage_devices`` says where stages share a device.
        stages: Blocks of every stage; their order inside a stage does not matter.

    Raises:
        PartitionError: A block is missing, unknown or placed twice; a stage is empty or reads
            from a later one; a constraint is violated; a stage does not fit.
    """
    devices = constraints.stage_devices or tuple(range(len(stages)))
    replicas = constraints.replicas or 1
    total = constraints.total_microbatches
    shape = Shape(
        replicas,
        constraints.num_microbatches if total is None else total // replicas,
        devices,
    )
    built = build_problem(graph, costs, machine, constraints, replicas)
    slots = build_slots(costs, machine, constraints, devices, graph, shape.num_microbatches)
    masks, done = [0], 0
    for stage in stages:
        for name in stage:
            done |= 1 << graph.block_index[name]
        masks.append(done)
    lattice = Lattice.of_masks(built.problem, masks)
    found = _search_slots(graph, constraints, shape, built, slots, lattice, inf, None)
    if not found.prices:
        raise PartitionError("the split does not fit")
    return to_partition(found, built, slots, machine, constraints, shape)
