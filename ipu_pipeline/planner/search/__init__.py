"""Split a model into pipeline stages: exact, memory-aware, with a bound on what is possible.

``solve`` finds the split; ``Constraints.with_stages`` fixes one that somebody else chose. Neither
needs torch.

Read the files in this order:

1. ``constraints.py``, ``result.py``: what goes in and what comes out.
2. ``problem.py``: the problem on integers (blocks are bits); ``from_graph.py`` makes it.
3. ``schedules/objective.py``: the closed forms of the schedules that the search minimises.
4. ``stage_price.py``: one stage: transfers and memory; ``knapsack.py``: the exact choice of
   recomputation and serialization per block.
5. ``ideals.py``: the boundaries that a pipeline may have (order ideals of the blocks).
6. ``bottleneck.py``: the fast exact search, by sweeps of ``ideal_program.py``, a dynamic program
   over ideals with the stages of ``stage_costs.py``.
7. ``label_setting.py``: the exact search for shared devices and memories and other schedules;
   ``priced.py`` drives it over pipelines whose stages a backend prices itself; ``looped.py``: a
   local search where the schedule itself puts several stages on every device.
8. ``parallel.py``, ``pipeline_search.py``: what to try, with which search.
9. ``step_bound.py``: the proven bound of the schedule's exact replay.
10. ``spread.py``: the same with the vocabulary spread over stages, as chunks of its rows.
11. ``infeasible.py`` with ``least_bytes.py``: what would help where nothing fits.
12. ``given_split.py``: the stages of a plan, priced as they are annotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.vocabulary import can_spread
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.infeasible import Change, InfeasibleError, explain
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.result import Partition
from ipu_pipeline.planner.search.spread import CostsOf, Measured, SpreadSearch

__all__ = [
    "WORTHWHILE",
    "Change",
    "Constraints",
    "InfeasibleError",
    "Partition",
    "solve",
    "solve_spread",
]

# Spreading the vocabulary keeps a microbatch more and rests on the prices of messages, which are
# the least certain ones: it must promise a step at most so long as with whole blocks.
WORTHWHILE = 0.98

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
    machine = costs.ranks or machine
    found = search(graph, costs, machine, constraints)
    if not found.partitions:
        raise explain(graph, costs, machine, constraints, ruled_out=found.lower_bound == inf)
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


def solve_spread(
    graph: BlockGraph,
    measured_s: Measured,
    costs_of: CostsOf,
    machine: Machine,
    constraints: Constraints,
    step: StepPrice,
) -> Partition:
    """As :func:`solve`, with the vocabulary whole or spread as the constraints say.

    Args:
        graph: The model.
        measured_s: Measured seconds of its blocks; empty: computed.
        costs_of: Prices the blocks of a graph of its blocks, or of shares of them.
        machine: As for :func:`solve`.
        constraints: The same.
        step: The same.

    Raises:
        PartitionError: As :func:`solve`.
        PlanError: The vocabulary is to be spread, and cannot be.
    """
    wanted, found = constraints.vocabulary, []
    problem: PartitionError | None = None
    if wanted in (None, "auto"):
        try:
            costs = costs_of(graph, measured_s)
            found.append(solve(graph, costs, machine, constraints, step=step))
        except PartitionError as error:
            problem = error
    if wanted is not None and (wanted != "auto" or _may_spread(graph, constraints)):
        spread = SpreadSearch(graph, machine, constraints.schedule, costs_of, step, measured_s)
        try:
            found.append(spread.split(constraints, len(found[0].stages) if found else None))
        except PartitionError as error:
            problem = problem or error
    if not found:
        assert problem is not None
        raise problem
    least = min(item.lower_bound for item in found)
    *whole, last = found
    if whole and last.vocabulary and last.objective > WORTHWHILE * whole[0].objective:
        last = whole[0]
    return last.with_bound(least)


def _may_spread(graph: BlockGraph, constraints: Constraints) -> bool:
    """Whether the vocabulary can be spread over the stages of the schedule."""
    several = constraints.num_stages != 1 and not schedule_kind(constraints.schedule).lock_stepped
    return several and can_spread(graph) and constraints.layers_per_ipu is None
