"""Why nothing fits, and the smallest changes with which something does.

A split of the execution order that fits (``least_bytes.py``) proves a change; where there is no
other order, none there disproves it. Only the remaining cases are tried with a short search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from time import monotonic
from typing import Any

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.text import about_megabytes
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.from_graph import build_problem
from ipu_pipeline.planner.search.least_bytes import LeastBytes, LeastSplit
from ipu_pipeline.planner.search.parallel import (
    CandidatePipeline,
    candidate,
    pipeline_shapes,
)
from ipu_pipeline.planner.search.pipeline_search import search
from ipu_pipeline.planner.search.problem import bits

MOST_DEVICES = 256
TRIAL_S = 3.0
EXPLAIN_S = 8.0
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
    """

    text: str
    costs: GraphCosts
    machine: Machine
    constraints: Constraints


class InfeasibleError(PartitionError):
    """No split satisfies the constraints.

    Attributes:
        changes: Changes with which a split exists, the least intrusive first.
    """

    def __init__(self, message: str, changes: tuple[Change, ...] = ()) -> None:
        super().__init__(message)
        self.changes = changes


def explain(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    *,
    ruled_out: bool = True,
) -> InfeasibleError:
    """Return the error that says why nothing fits (was found, if not ``ruled_out``) and what would.

    After a search that its own time limit ended, no time is spent on what would.
    """
    if ruled_out:
        return _Explanation(graph, Change("", costs, machine, constraints)).error()
    text = (
        f"no split was found, and none was ruled out, within time_limit_s="
        f"{constraints.time_limit_s} and max_ideals={constraints.max_ideals}"
    )
    if constraints.time_limit_s is not None:
        return InfeasibleError(f"{text}; raise them")
    return _Explanation(graph, Change("", costs, machine, constraints), text).error()


@dataclass
class _Explanation:
    graph: BlockGraph
    start: Change
    outcome: str = "no split fits"
    deadline: float = field(default_factory=lambda: monotonic() + EXPLAIN_S)
    _known: list[tuple[GraphCosts, Constraints, LeastBytes]] = field(default_factory=list)

    def error(self) -> InfeasibleError:
        if not self._fits(self._with_memory(2**62)):
            return self._placement_error()
        reason, changes = self._worst_stage(), tuple(self._changes())
        if not changes:
            return InfeasibleError(f"{self.outcome}: {reason}; no single change tried makes it fit")
        options = "; or ".join(change.text for change in changes)
        return InfeasibleError(f"{self.outcome}: {reason}; it fits if you {options}", changes)

    def _changes(self) -> Iterator[Change]:
        """Yield the changes of options that fit (the least that works), then of the machine."""
        options = list(_option_changes(self.start))
        fitting = next(filter(self._fits, options), None)
        if fitting is not None:
            yield fitting
        more = self._more_devices(self.start)
        if more is None and fitting is None and options:
            more = self._more_devices(options[-1])
        if more is not None:
            yield more
        memory = self._more_memory()
        if memory is not None:
            yield memory

    def _fits(self, change: Change, *, deepest: bool = False) -> bool:
        """Whether a split exists after ``change``; ``deepest``: none with fewer stages does."""
        found, least = self._least(change, deepest=deepest), self._least_bytes(change)
        if any(item.apart and split is not None and split.fits(item.slots)
               for item, split in found):  # fmt: skip
            return True
        if found and least.is_least_of_all and all(item.apart for item, _ in found):
            return False
        limit = min(change.constraints.time_limit_s or TRIAL_S, TRIAL_S)
        trial = replace(change.constraints, time_limit_s=limit)
        try:
            return bool(search(self.graph, change.costs, change.machine, trial).partitions)
        except PartitionError:
            return False

    def _least(
        self, change: Change, *, deepest: bool = False
    ) -> list[tuple[CandidatePipeline, LeastSplit | None]]:
        """Return every pipeline that may be tried, with its least demanding split.

        Where the numbers leave no pipeline, nothing is returned.
        """
        least, found = self._least_bytes(change), []
        built, graph, limits = least.problem, self.graph, change.constraints
        try:
            shapes = pipeline_shapes(graph, change.machine, limits)
        except PartitionError:
            return []
        for shape in [max(shapes, key=lambda one: one.num_stages)] if deepest else shapes:
            item = candidate(graph, change.costs, change.machine, limits, shape, built)
            groups = built.together + (built.same_device if item.shape.own_devices else ())
            found.append((item, least.split(item.slots, item.rule, groups)))
        return found

    def _least_bytes(self, change: Change) -> LeastBytes:
        """Formulate the problem; more or larger devices of the same kind leave it as it is."""
        limits = replace(change.constraints, num_stages=None)
        for costs, known, answer in self._known:
            if costs is change.costs and known == limits:
                return answer
        built = build_problem(self.graph, change.costs, change.machine, change.constraints)
        self._known.append((change.costs, limits, LeastBytes(built)))
        return self._known[-1][-1]

    def _with_memory(self, memory_bytes: int) -> Change:
        machine = self.start.machine
        devices = tuple(
            replace(d, memory_bytes=max(d.memory_bytes, memory_bytes)) for d in machine.devices
        )
        return replace(self.start, machine=replace(machine, devices=devices))

    def _more_devices(self, start: Change) -> Change | None:
        """The least number of devices (copies of the last one) with which it fits."""
        base, machine = start.constraints, start.machine
        if base.stage_devices or base.layers_per_ipu or machine.shared_memory:
            return None
        have = len(machine.devices)
        most = min(base.max_stages or MOST_DEVICES, len(self.graph.blocks))
        for count in range(have + 1, min(most * base.replicas, MOST_DEVICES) + 1):
            if monotonic() > self.deadline:
                return None
            last = machine.devices[-1]
            more = tuple(replace(last, name=f"more{i}") for i in range(count - have))
            stages = None if base.num_stages is None else base.num_stages + count - have
            change = replace(
                start,
                text=f"{start.text + ' and ' if start.text else ''}use "
                f"{count_of(count, 'device')}, not {have}",
                machine=replace(machine, devices=(*machine.devices, *more)),
                constraints=replace(base, num_stages=stages),
            )
            if self._fits(change, deepest=True):
                return change
        return None

    def _more_memory(self) -> Change | None:
        """The memory per device with which a split of the execution order fits."""
        machine, needed = self.start.machine, inf
        for _, split in self._least(self.start):
            if split is not None:
                used = split.device_bytes.values()
                shared = sum(used) / len(machine.devices)
                needed = min(needed, shared if machine.shared_memory else max(used))
        if needed == inf:
            return None
        size = int(needed) + max(device.reserved_bytes for device in machine.devices) + 1
        change = replace(
            self._with_memory(size), text=f"give every device {about_megabytes(size)} MB"
        )
        return change if self._fits(change) else None

    def _placement_error(self) -> InfeasibleError:
        """Memory is not the reason: name the constraints without which a split exists."""
        start, neutral = self.start, Constraints()
        blamed: list[Change] = []
        for name in _PLACEMENT:
            default = getattr(neutral, name)
            relaxed = replace(start.constraints, **{name: default})
            change = replace(start, text=f"drop {name}", constraints=relaxed)
            if getattr(start.constraints, name) != default and self._fits(change):
                blamed.append(change)
        if blamed:
            words = " or ".join(change.text for change in blamed)
            return InfeasibleError(
                f"no split satisfies the constraints, whatever the memory; {words} and there is "
                "one",
                tuple(blamed),
            )
        free = replace(self, graph=replace(self.graph, state=()), _known=[])
        if self.graph.state and free._fits(start):
            shared = "; ".join(dict.fromkeys(map(str, self.graph.state)))
            return InfeasibleError(
                f"no split keeps in one stage what shares state: {shared}; use fewer stages, "
                "or change it outside the model, after the step"
            )
        apart = replace(start, costs=replace(start.costs, together=()))
        if start.costs.together and self._fits(apart):
            pairs = "; ".join(" and ".join(group) for group in start.costs.together)
            return InfeasibleError(
                f"no split keeps {pairs} in one stage, which run as one when they are "
                "serialized; use fewer stages, or do not pin them to different ones"
            )
        return InfeasibleError(
            "no split satisfies the constraints together, whatever the memory: pins, groups "
            "of blocks on one device, layers_per_ipu and forbidden_cuts contradict one another"
        )

    def _worst_stage(self) -> str:
        """Describe the stage that is too large in the least demanding split."""
        machine = self.start.machine
        ((item, split),) = self._least(self.start, deepest=True)
        if split is None:
            return "the constraints and the memory leave no split"
        if machine.shared_memory:
            total = sum(needed for _, needed in split.stages)
            return (
                f"the stages need at least {about_megabytes(total)} MB together, the machine has "
                f"{about_megabytes(item.slots[0].capacity)} MB"
            )
        room = {slot.device: slot.capacity for slot in item.slots}
        used = split.device_bytes
        worst = max(used, key=lambda device: used[device] - room[device])
        if used[worst] <= room[worst]:
            return "memory and the constraints on where blocks go leave no split together"
        names = self._least_bytes(self.start).problem.names
        held = [
            f"stage {slot.index} ({_span([names[block] for block in bits(mask)])})"
            for (mask, _), slot in zip(split.stages, item.slots, strict=True)
            if slot.device == worst
        ]
        one = len(held) == 1
        return (
            f"even split for memory alone, {' and '.join(held)} {'needs' if one else 'need'} "
            f"{about_megabytes(used[worst])} MB, {'its' if one else 'their'} device has "
            f"{about_megabytes(room[worst])} MB"
        )


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _option_changes(start: Change) -> Iterator[Change]:
    """Yield changes of how blocks run, single ones first, then all together."""
    base, free = start.constraints, dict[str, dict[str, Any]]()
    if base.recompute == "never" or isinstance(base.recompute, tuple):
        of_all = "" if base.recompute == "never" else " of every block"
        free[f"allow recompute{of_all}"] = {"recompute": "auto"}
    if base.serialize:
        free["drop serialize"] = {"serialize": {}}
    if not base.allow_serialize:
        free["allow serialization"] = {"allow_serialize": True}
    if len(free) > 1:
        together = {name: value for fields in free.values() for name, value in fields.items()}
        free[" and ".join(free)] = together
    for text, fields in free.items():
        yield replace(start, text=text, constraints=replace(base, **fields))
