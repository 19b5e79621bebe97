"""Which pipelines to try: device and position of every stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.search.constraints import Constraints, LayerRule, layer_rule
from ipu_pipeline.planner.search.from_graph import ample_memory, build_slots
from ipu_pipeline.planner.search.problem import Problem, Slot


@dataclass(frozen=True)
class CandidatePipeline:
    """One pipeline to try, with its positions.

    Attributes:
        shape: Stages, microbatches, devices.
        slots: Stage positions.
        rule: Given layers per device, if any.
    """

    shape: PipelineShape
    slots: tuple[Slot, ...]
    rule: LayerRule | None = None

    @property
    def depth(self) -> int:
        """Its stages."""
        return len(self.slots)

    @property
    def apart(self) -> bool:
        """Whether every stage has its own device and memory, so that it can be looked at alone."""
        return self.shape.own_devices and len({slot.pool for slot in self.slots}) == self.depth

    def set_apart(self, **changes: Any) -> CandidatePipeline:
        """Look at every stage alone, in a memory of its own, its slot with other ``changes``."""
        slots = tuple(replace(s, device=i, pool=i, **changes) for i, s in enumerate(self.slots))
        return replace(self, slots=slots)


def candidate(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    shape: PipelineShape,
    problem: Problem,
) -> CandidatePipeline:
    """Describe the positions of one pipeline."""
    count, spread = shape.num_microbatches, shape.spread
    slots = build_slots(costs, machine, constraints, shape.devices, graph, count, spread)
    if machine.shared_memory and ample_memory(problem, slots):
        slots = tuple(replace(slot, pool=i, capacity=inf) for i, slot in enumerate(slots))
    rule = None
    if constraints.layers_per_ipu is not None:
        rule = layer_rule(graph, constraints.layers_per_ipu, shape.devices)
    return CandidatePipeline(shape, slots, rule)


def pipeline_shapes(
    graph: BlockGraph, machine: Machine, constraints: Constraints
) -> list[PipelineShape]:
    """Return the pipelines to try.

    Raises:
        PartitionError: The numbers of stages, devices, blocks and microbatches leave none.
    """
    available = len(machine.devices)
    _check_devices(graph, constraints, machine)
    found, problem, most = [], "", available // constraints.replicas
    if constraints.layers_per_ipu is None and constraints.stage_devices is None:
        most = min(most, len(graph.blocks))
    for devices in _pipelines(graph, constraints, most):
        shape = PipelineShape.of(
            len(devices), constraints.num_microbatches, devices, training=graph.training
        )
        wrong = schedule_kind(constraints.schedule).problem(shape)
        problem = wrong or problem
        if not wrong and len(devices) <= len(graph.blocks):
            found.append(shape)
    if not found and problem:
        raise PartitionError(problem)
    if not found:
        raise PartitionError(
            f"no pipeline to try: stages {constraints.num_stages or 'any'} (at most "
            f"{constraints.max_stages or 'any'}), replicas {constraints.replicas}, devices "
            f"{available}, blocks {len(graph.blocks)}"
        )
    return found


def check_depth(graph: BlockGraph, num_stages: int) -> None:
    """Refuse more stages than there are blocks.

    Raises:
        PartitionError: There are not blocks enough.
    """
    if not graph.blocks:
        raise PartitionError("the graph has no block to place")
    if num_stages > len(graph.blocks):
        raise PartitionError(
            f"{num_stages} stages need at least as many blocks, the graph has "
            f"{len(graph.blocks)}; ask for fewer, or for smaller blocks (granularity)"
        )


def _check_devices(graph: BlockGraph, constraints: Constraints, machine: Machine) -> None:
    available = len(machine.devices)
    devices, replicas = constraints.stage_devices, constraints.replicas
    if devices is not None and (not devices or min(devices) < 0 or max(devices) >= available):
        raise PartitionError(
            f"stage_devices {list(devices)} must name devices 0 to {available - 1}"
        )
    depth = constraints.num_stages or (len(devices) if devices else 1)
    check_depth(graph, depth)
    needed = len(set(devices)) if devices else _least_devices(constraints, depth)
    if constraints.num_stages is not None and _may_return(graph, constraints):
        needed -= 1
    if needed * replicas > available:
        raise PartitionError(
            f"{count_of(depth, 'stage')} x {count_of(replicas, 'replica')} need "
            f"{count_of(needed * replicas, 'device')}, the machine offers {available} "
            f"({machine.name})"
        )


def _least_devices(constraints: Constraints, depth: int) -> int:
    """Return the fewest devices that the schedule can put ``depth`` stages on."""
    kind = schedule_kind(constraints.schedule)
    if kind.any_devices or constraints.num_stages is None:
        return depth
    counts = [count for count in range(1, depth + 1) if kind.place(depth, count) is not None]
    if not counts:
        raise PartitionError(kind.problem(PipelineShape.of(depth, 1)))
    return counts[0]


def _pipelines(
    graph: BlockGraph, constraints: Constraints, per_pipeline: int
) -> Iterator[tuple[int, ...]]:
    """Yield the devices of the stages of every pipeline over up to ``per_pipeline`` devices."""
    if constraints.stage_devices is not None:
        if max(constraints.stage_devices) < per_pipeline:
            yield constraints.stage_devices
        return
    wanted = constraints.num_stages
    kind = schedule_kind(constraints.schedule)
    if not kind.any_devices:
        for count in range(1, per_pipeline + 1):
            for depth in [wanted] if wanted else [count * n for n in kind.stages_per_device]:
                devices = kind.place(depth, count)
                if devices is not None and depth <= (constraints.max_stages or depth):
                    yield devices
        return
    for depth in _device_counts(constraints, per_pipeline):
        if wanted is None or depth == wanted:
            yield tuple(range(depth))
        if _may_return(graph, constraints) and depth > 1 and wanted in (None, depth + 1):
            yield (*range(depth), 0)


def _device_counts(constraints: Constraints, per_pipeline: int) -> Iterator[int]:
    layers = constraints.layers_per_ipu
    if layers is None and constraints.max_stages is not None:
        per_pipeline = min(per_pipeline, constraints.max_stages)
    if layers is None:
        yield from range(1, per_pipeline + 1)
    elif layers == (-1,):
        depth = constraints.num_stages or per_pipeline
        yield from sorted({depth, depth - 1} - {0} if constraints.num_stages else {depth})
    elif len(layers) <= per_pipeline:
        yield len(layers)


def _may_return(graph: BlockGraph, constraints: Constraints) -> bool:
    """Whether a last stage back on device 0 may help: some blocks must share a device."""
    tied = constraints.tied == "same_device" and bool(graph.tied_groups)
    return constraints.stage_devices is None and (tied or bool(constraints.same_device))
