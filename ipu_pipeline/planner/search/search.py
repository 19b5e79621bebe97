"""The flow: which pipelines to try, what the search finds for each, the best with its bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from time import monotonic

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.model import GraphCosts
from ipu_pipeline.planner.search.build import Built, ample_memory, build_problem, build_slots
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.engine import Candidate, Engine
from ipu_pipeline.planner.search.labels import Found
from ipu_pipeline.planner.search.layers_per_ipu import layer_rule
from ipu_pipeline.planner.search.report import to_partition
from ipu_pipeline.planner.search.result import Partition
from ipu_pipeline.planner.search.shapes import Shape, shapes


def search(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, constraints: Constraints
) -> Partition | None:
    """Return the best split, or ``None`` when no split fits.

    Raises:
        PartitionError: A constraint is wrong, or the time limit ended before any split was found.
    """
    deadline = monotonic() + constraints.time_limit_s if constraints.time_limit_s else None
    best: Partition | None = None
    upper = lower = inf
    for replicas, group in _by_replicas(shapes(graph, machine, constraints)):
        built = build_problem(graph, costs, machine, constraints, replicas)
        engine = Engine(built, constraints, training=graph.training, deadline=deadline)
        candidates = [candidate(graph, costs, machine, constraints, s, built) for s in group]
        for members, together in _batches(engine, candidates, constraints):
            found = _search(engine, members, upper, together=together)
            lower = min(lower, found.lower_bound)
            if found.objective < upper:
                upper = found.objective
                winner = _slots_of(found, members)
                best = to_partition(found, built, winner.slots, machine, constraints, winner.shape)
    if best is None and lower < inf:
        raise PartitionError(
            f"no split was found, and none was ruled out, within time_limit_s="
            f"{constraints.time_limit_s} and max_ideals={constraints.max_ideals}; raise them"
        )
    return None if best is None else replace(best, lower_bound=min(lower, best.objective))


def candidate(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    shape: Shape,
    built: Built,
) -> Candidate:
    """Describe the positions of one pipeline."""
    slots = build_slots(
        costs, machine, constraints, shape.stage_devices, graph, shape.num_microbatches
    )
    if machine.shared_memory and ample_memory(built.problem, slots):
        slots = tuple(replace(slot, pool=i, capacity=inf) for i, slot in enumerate(slots))
    rule = None
    if constraints.layers_per_ipu is not None:
        rule = layer_rule(graph, constraints.layers_per_ipu, shape.stage_devices)
    return Candidate(shape, slots, rule)


def _batches(
    engine: Engine, candidates: Sequence[Candidate], constraints: Constraints
) -> Iterator[tuple[Sequence[Candidate], bool]]:
    """Yield what is searched together (True: candidates that differ in depth only)."""
    fast = [item for item in candidates if engine.is_fast(item)]
    if fast and _uniform(fast, constraints):
        yield fast, True
        fast = []
    for item in fast:
        yield [item], False
    slow = [(engine.at_once(item), item) for item in candidates if not engine.is_fast(item)]
    for _, item in sorted(slow, key=lambda pair: pair[0]):
        yield [item], False


def _search(engine: Engine, members: Sequence[Candidate], upper: float, *, together: bool) -> Found:
    if engine.is_fast(members[0]):
        return engine.run_fast(members, upper, uniform=together)
    bound = engine.relaxed_bound(members[0], upper) if upper < inf else 0.0
    if bound >= upper:
        return Found(inf, bound)
    return engine.run_labels(members[0], upper)


def _uniform(fast: Sequence[Candidate], constraints: Constraints) -> bool:
    """Whether a position's price depends only on how many stages are behind it."""
    slots = max(fast, key=lambda item: len(item.slots)).slots
    alike = len({(slot.capacity, slot.speed) for slot in slots}) == 1
    links = {slot.link_in for slot in slots[1:]}
    free = not (constraints.pinned_stages or constraints.pinned_devices)
    return alike and len(links) <= 1 and free and constraints.layers_per_ipu is None


def _slots_of(found: Found, members: Sequence[Candidate]) -> Candidate:
    return next(item for item in members if len(item.slots) == len(found.prices))


def _by_replicas(found: Sequence[Shape]) -> Iterator[tuple[int, list[Shape]]]:
    for replicas in dict.fromkeys(shape.replicas for shape in found):
        yield replicas, [shape for shape in found if shape.replicas == replicas]
