"""Why nothing fits, and the smallest changes with which something does. Each is tried out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import inf
from time import monotonic

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.from_graph import build_problem
from ipu_pipeline.planner.search.parallel import parallel_configurations
from ipu_pipeline.planner.search.pipeline_search import (
    CandidatePipeline,
    StagePricerMaker,
    candidate,
    search,
)
from ipu_pipeline.planner.search.problem import Problem
from ipu_pipeline.planner.search.stage_price import OptionPricer

MOST_DEVICES = 256
TRIAL_S = 5.0
EXPLAIN_S = 15.0
_PLACEMENT = (
    "pinned_stages",
    "pinned_devices",
    "layers_per_ipu",
    "forbidden_cuts",
    "same_device",
    "tied",
    "stage_devices",
    "execution_order",
)


@dataclass(frozen=True)
class Change:
    """One change that makes the problem fit, with the arguments that show it.

    Attributes:
        text: What to change, for the message.
        costs: Prices after the change.
        machine: Machine after the change.
        constraints: Constraints after the change.
        stage_pricer: As given to ``solve``.
    """

    text: str
    costs: GraphCosts
    machine: Machine
    constraints: Constraints
    stage_pricer: StagePricerMaker | None = None


class InfeasibleError(PartitionError):
    """No split satisfies the constraints.

    Attributes:
        changes: Changes that were tried and do fit, the least intrusive first.
    """

    def __init__(self, message: str, changes: tuple[Change, ...] = ()) -> None:
        super().__init__(message)
        self.changes = changes


def explain(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    stage_pricer: StagePricerMaker | None = None,
) -> InfeasibleError:
    """Return the error that says why nothing fits and what would."""
    start = Change("", costs, machine, constraints, stage_pricer)
    if not _fits(graph, replace(start, machine=_unlimited(machine))):
        return _placement_error(graph, start)
    changes = tuple(_changes(graph, start, monotonic() + EXPLAIN_S))
    reason = _worst_stage(graph, costs, machine, constraints)
    if not changes:
        return InfeasibleError(f"no split fits: {reason}; no single change tried makes it fit")
    options = "; or ".join(change.text for change in changes)
    return InfeasibleError(f"no split fits: {reason}; it fits if you {options}", changes)


def _changes(graph: BlockGraph, start: Change, deadline: float) -> Iterator[Change]:
    """Yield the changes of options that fit (the least that works), then of the machine."""
    found = False
    for change in _option_changes(start):
        if _fits(graph, change):
            found = True
            yield change
            break
    more = _more_devices(graph, start, deadline)
    if more is not None:
        yield more
    elif not found:
        everything = list(_option_changes(start))
        more = _more_devices(graph, everything[-1], deadline) if everything else None
        if more is not None:
            yield more
    memory = _more_memory(graph, start)
    if memory is not None:
        yield memory


def _option_changes(start: Change) -> Iterator[Change]:
    """Yield changes of how blocks run, single ones first, then all together."""
    base = start.constraints
    single: list[Change] = []
    fixed = base.recompute == "never" or isinstance(base.recompute, tuple)
    if fixed:
        single.append(
            replace(
                start,
                text="allow recompute" + (" of every block" if base.recompute != "never" else ""),
                constraints=replace(base, recompute="auto"),
            )
        )
    if base.serialize:
        single.append(
            replace(start, text="drop serialize", constraints=replace(base, serialize={}))
        )
    if not base.allow_serialize:
        single.append(
            replace(start, text="allow serialization",
                    constraints=replace(base, allow_serialize=True))
        )  # fmt: skip
    yield from single
    free = replace(base, recompute="auto" if fixed else base.recompute,
                   allow_serialize=True, serialize={})  # fmt: skip
    words = " and ".join(change.text for change in single)
    if len(single) > 1:
        yield replace(start, text=words, constraints=free)


def _more_devices(graph: BlockGraph, start: Change, deadline: float) -> Change | None:
    """The least number of devices (copies of the last one) with which it fits."""
    base = start.constraints
    fixed = base.stage_devices, base.layers_per_ipu
    if any(item is not None for item in fixed) or start.machine.shared_memory:
        return None
    have = len(start.machine.devices)
    most = min(len(graph.blocks) * (base.replicas or 1), MOST_DEVICES)

    def with_devices(count: int) -> Change:
        devices = start.machine.devices
        more = (*devices, *(replace(devices[-1], name=f"more{i}") for i in range(count - have)))
        stages = None if base.num_stages is None else base.num_stages + count - have
        return replace(
            start,
            text=f"{start.text + ' and ' if start.text else ''}use {count} devices, not {have}",
            machine=replace(start.machine, devices=more[: max(count, len(devices))]),
            constraints=replace(base, num_stages=stages),
        )

    for count in range(have + 1, most + 1):
        if monotonic() > deadline:
            return None
        change = with_devices(count)
        if _fits(graph, change):
            return change
    return None


def _more_memory(graph: BlockGraph, start: Change) -> Change | None:
    """The memory per device with which a split of the execution order fits."""
    needed = _least_worst_bytes(graph, start)
    reserved = max(device.reserved_bytes for device in start.machine.devices)
    size = int(needed) + reserved + 1 if needed < inf else 0
    devices = tuple(
        replace(d, memory_bytes=max(d.memory_bytes, size)) for d in start.machine.devices
    )
    change = replace(
        start,
        text=f"give every device {size / 1e6:.4g} MB",
        machine=replace(start.machine, devices=devices),
    )
    return change if size and _fits(graph, change) else None


def _fits(graph: BlockGraph, change: Change) -> bool:
    limit = min(change.constraints.time_limit_s or TRIAL_S, TRIAL_S)
    trial = replace(change.constraints, time_limit_s=limit)
    try:
        return bool(search(graph, change.costs, change.machine, trial, change.stage_pricer))
    except PartitionError:
        return False


def _unlimited(machine: Machine) -> Machine:
    devices = tuple(replace(device, memory_bytes=2**62) for device in machine.devices)
    return replace(machine, devices=devices)


def _placement_error(graph: BlockGraph, start: Change) -> InfeasibleError:
    """Memory is not the reason: name the constraints without which a split exists."""
    defaults = {item.name: item for item in fields(Constraints)}
    blamed: list[Change] = []
    for name in _PLACEMENT:
        neutral = getattr(Constraints(), defaults[name].name)
        if getattr(start.constraints, name) == neutral:
            continue
        relaxed = replace(start.constraints, **{name: neutral})
        change = replace(start, text=f"drop {name}", constraints=relaxed)
        if _fits(graph, change):
            blamed.append(change)
    if not blamed and start.costs.together:
        apart = replace(start, costs=replace(start.costs, together=()))
        if _fits(graph, apart):
            pairs = "; ".join(" and ".join(group) for group in start.costs.together)
            return InfeasibleError(
                f"no split keeps {pairs} in one stage, which run as one when they are serialized; "
                "use fewer stages, or do not pin them to different ones"
            )
    if not blamed:
        return InfeasibleError(
            "no split satisfies the constraints together, whatever the memory: pins, groups of "
            "blocks on one device, layers_per_ipu and forbidden_cuts contradict one another"
        )
    words = " or ".join(change.text for change in blamed)
    return InfeasibleError(
        f"no split satisfies the constraints, whatever the memory; {words} and there is one",
        tuple(blamed),
    )


def _worst_stage(
    graph: BlockGraph, costs: GraphCosts, machine: Machine, constraints: Constraints
) -> str:
    """Describe the stage that is too large in the least demanding split."""
    built = build_problem(graph, costs, machine, constraints, constraints.replicas or 1)
    deepest = max(
        parallel_configurations(graph, machine, constraints),
        key=lambda shape: len(shape.stage_devices),
    )
    item = candidate(graph, costs, machine, constraints, deepest, built)
    stages = _least_demanding(built.problem, item)
    if not stages:
        return "the constraints and the memory leave no split"
    if machine.shared_memory:
        total = sum(needed for _, needed in stages)
        return (
            f"the stages need at least {total / 1e6:.4g} MB together, the machine has "
            f"{item.slots[0].capacity / 1e6:.4g} MB"
        )
    used = _device_bytes(built.problem, item, stages)
    room = {slot.device: slot.capacity for slot in item.slots}
    worst = max(used, key=lambda device: used[device] - room[device])
    if used[worst] <= room[worst]:
        return "memory and the constraints on where blocks go leave no split together"
    held = [
        (index, built.problem.names_of(mask))
        for index, ((mask, _), slot) in enumerate(zip(stages, item.slots, strict=True))
        if slot.device == worst
    ]
    text = " and ".join(
        f"stage {index} ({names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'})"
        for index, names in held
    )
    return (
        f"even split for memory alone, {text} {'needs' if len(held) == 1 else 'need'} "
        f"{used[worst] / 1e6:.4g} MB, {'its' if len(held) == 1 else 'their'} device has "
        f"{room[worst] / 1e6:.4g} MB"
    )


def _least_worst_bytes(graph: BlockGraph, start: Change) -> float:
    """Bytes per device that the least demanding split of the execution order needs."""
    costs, machine, constraints = start.costs, start.machine, start.constraints
    built = build_problem(graph, costs, machine, constraints, constraints.replicas or 1)
    least = inf
    for shape in parallel_configurations(graph, machine, constraints):
        item = candidate(graph, costs, machine, constraints, shape, built)
        stages = _least_demanding(built.problem, item)
        if not stages:
            continue
        by_device = _device_bytes(built.problem, item, stages)
        need = sum(by_device.values()) if machine.shared_memory else max(by_device.values())
        least = min(least, need / (len(machine.devices) if machine.shared_memory else 1))
    return least


def _least_demanding(problem: Problem, item: CandidatePipeline) -> list[tuple[int, float]]:
    """Split the execution order so that the largest stage is smallest (or the sum, if pooled).

    Returns:
        Mask and bytes of every stage; nothing if pins forbid all.
    """
    pricer, count = OptionPricer(problem), problem.num_blocks
    pooled = len({slot.pool for slot in item.slots}) == 1 < len(item.slots)
    nothing: tuple[float, list[tuple[int, float]]] = (inf, [])
    best = [nothing] * count + [(0.0, [])]
    for number, slot in reversed(list(enumerate(item.slots))):
        current = [nothing] * (count + 1)
        for start in range(count):
            if not _may_cut(problem, item, (1 << start) - 1, number):
                continue
            for stop in range(start + 1, count + 1):
                mask = (1 << stop) - (1 << start)
                if mask & slot.forbidden or best[stop][0] == inf:
                    continue
                need = pricer.least_bytes((1 << start) - 1, mask, slot)
                value = need + best[stop][0] if pooled else max(need, best[stop][0])
                if value < current[start][0]:
                    current[start] = (value, [(mask, need), *best[stop][1]])
                if not pooled and need > current[start][0]:
                    break
        best = current
    return best[0][1]


def _may_cut(problem: Problem, item: CandidatePipeline, done: int, stages_done: int) -> bool:
    """Whether the boundary behind ``done`` respects groups and given layers."""
    groups = problem.together + (problem.same_device if item.shape.own_devices else ())
    if any(done & group not in (0, group) for group in groups):
        return False
    return item.rule is None or item.rule.allows(done, stages_done)


def _device_bytes(
    problem: Problem, item: CandidatePipeline, stages: list[tuple[int, float]]
) -> dict[int, float]:
    """Bytes of every device; a parameter of two of its stages counts once."""
    used: dict[int, float] = {}
    blocks: dict[int, int] = {}
    for (mask, needed), slot in zip(stages, item.slots, strict=True):
        before = blocks.get(slot.device, 0)
        twice = sum(w.num_bytes for w in problem.shared_weights if w.users & mask & ~before
                    and w.users & before)  # fmt: skip
        used[slot.device] = used.get(slot.device, 0.0) + needed - twice
        blocks[slot.device] = before | mask
    return used
