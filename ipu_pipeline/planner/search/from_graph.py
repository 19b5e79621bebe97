"""From a captured graph, its costs and a machine to the integer problem and its slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.select import select_all, unmatched
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.problem import (
    Problem,
    Shared,
    Slot,
    StageCharge,
    Value,
    joined_groups,
    mask_of,
)


def build_problem(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
) -> Problem:
    """Translate names into positions.

    Raises:
        PartitionError: A block has no cost, an edge runs against the execution order, or a
            constraint names an unknown block.
    """
    index = graph.block_index
    _check_names(graph, costs, constraints)
    private, shared = _weights(graph, costs)
    tied = graph.tied_groups if constraints.tied == "same_device" else ()
    return Problem(
        names=tuple(index),
        preds=_predecessors(graph, costs, constraints),
        options=_menus(graph, costs, constraints),
        values=tuple(_values(graph, machine, held=costs.ranks is None)),
        weight_bytes=private,
        shared_weights=shared,
        inputs=tuple(
            Shared(spec.num_bytes, _mask(graph, spec.consumers))
            for spec in graph.inputs
            if spec.consumers and costs.ranks is None
        ),
        outer_s=_outer_seconds(graph, costs, machine, constraints),
        exchanges=_exchanges(graph, machine, constraints),
        together=_together(graph, costs, constraints),
        same_device=device_groups(graph, (*constraints.same_device, *tied)),
        frees_in_order=costs.frees_in_order,
        **_chunks(graph, costs),
    )


def build_slots(
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
    stage_devices: Sequence[int],
    graph: BlockGraph,
    num_microbatches: int,
    spread: Sequence[int] = (),
) -> tuple[Slot, ...]:
    """Describe every stage position of a pipeline over ``stage_devices``."""
    pooled = machine.shared_memory
    shared = sum(map(_usable_bytes, machine.devices)) if pooled else 0
    last = len(stage_devices) - 1
    shape = PipelineShape.of(
        len(stage_devices), num_microbatches, stage_devices, training=graph.training, spread=spread
    )
    kept = schedule_kind(constraints.schedule).in_flight(shape)
    slots = []
    for stage, device in enumerate(stage_devices):
        slots.append(
            Slot(
                device=device,
                pool=-1 if pooled else device,
                capacity=float(shared if pooled else _usable_bytes(machine.devices[device])),
                speed=costs.speed(device),
                in_flight=kept[stage],
                link_in=link_of(machine, stage_devices, stage - 1, stage) if stage else None,
                link_out=link_of(machine, stage_devices, stage, stage + 1)
                if stage < last
                else None,
                forbidden=_forbidden(graph, constraints, stage, device),
                index=stage,
                num_stages=last + 1,
            )
        )
    return tuple(slots)


def _usable_bytes(device: Device) -> int:
    return device.memory_bytes - device.reserved_bytes


def link_of(machine: Machine, devices: Sequence[int], first: int, second: int) -> Link | None:
    """Link between two stages; ``None`` where a transfer hands over a pointer."""
    if machine.shared_memory or devices[first] == devices[second]:
        return None
    return machine.link_between(devices[first], devices[second])


def _forbidden(graph: BlockGraph, constraints: Constraints, stage: int, device: int) -> int:
    mask = 0
    for name, wanted in constraints.pinned_stages.items():
        mask |= (1 << graph.block_index[name]) if wanted != stage else 0
    for name, wanted in constraints.pinned_devices.items():
        mask |= (1 << graph.block_index[name]) if wanted != device else 0
    return mask


def _check_names(graph: BlockGraph, costs: GraphCosts, constraints: Constraints) -> None:
    unpriced = [block.name for block in graph.blocks if block.name not in costs.blocks]
    if unpriced:
        raise PartitionError(f"no cost for {', '.join(unpriced)}; price every block of the graph")
    named = {
        "pinned_stages": constraints.pinned_stages,
        "pinned_devices": constraints.pinned_devices,
        "forbidden_cuts": constraints.forbidden_cuts,
        "update_s": constraints.update_s,
        "same_device": [name for group in constraints.same_device for name in group],
        "together": [name for group in costs.together for name in group],
    }
    wrong = {
        what: [name for name in names if name not in graph.block_index]
        for what, names in named.items()
    }
    patterns = constraints.recompute if isinstance(constraints.recompute, tuple) else ()
    wrong["recompute"] = list(unmatched(patterns, graph.block_index))
    wrong["serialize"] = list(unmatched(constraints.serialize, graph.block_index))
    for what, unknown in wrong.items():
        if unknown:
            raise PartitionError(
                f"{what} names {', '.join(unknown)}, which the graph does not have; its blocks: "
                f"{', '.join(graph.block_index)}"
            )


def _menus(
    graph: BlockGraph, costs: GraphCosts, constraints: Constraints
) -> tuple[tuple[BlockChoice, ...], ...]:
    """Choices of every block that the constraints leave."""
    names = tuple(graph.block_index)
    recomputed: dict[str, bool] = {}
    if isinstance(constraints.recompute, tuple):
        chosen = select_all(constraints.recompute, names)
        recomputed = {name: name in chosen for name in names}
    elif constraints.recompute != "auto":
        recomputed = dict.fromkeys(names, constraints.recompute == "always")
    factors = constraints.factors(names)
    menus = []
    for name in names:
        menu = _in_slices(name, costs.blocks[name], factors.get(name), constraints)
        if name in recomputed:
            menu = tuple(way for way in menu if way.recompute == recomputed[name]) or menu
        menus.append(menu)
    return tuple(menus)


def _in_slices(
    name: str, cost: BlockCost, factor: int | None, constraints: Constraints
) -> tuple[BlockChoice, ...]:
    """Choices with ``factor`` slices; ``None``: those that ``allow_serialize`` leaves.

    Raises:
        PartitionError: There is no price for so many slices.
    """
    menu = cost.choices
    if factor is not None:
        exact = tuple(way for way in menu if way.serialize_factor == factor)
        if not exact:
            offered = sorted({way.serialize_factor for way in menu})
            raise PartitionError(
                f"serialize asks for block {name!r} in {factor} slices: "
                + (
                    f"it runs in {', '.join(map(str, offered))}; ask for one of these"
                    if len(offered) > 1
                    else "only a lookup table or an output projection runs in slices, and it has "
                    "none; take it out of serialize"
                )
            )
        return exact
    if not constraints.allow_serialize:
        return tuple(way for way in menu if way.serialize_factor == 1) or menu
    return menu


def _together(graph: BlockGraph, costs: GraphCosts, constraints: Constraints) -> tuple[int, ...]:
    """Blocks that stay in one stage: not to be cut, priced as one, or sharing state."""
    index = graph.block_index
    uncut = (
        (1 << index[name]) | (1 << (index[name] - 1))
        for name in constraints.forbidden_cuts
        if index[name] > 0
    )
    groups = (*costs.together, *(item.blocks for item in graph.state))
    return (*uncut, *(_mask(graph, group) for group in groups))


def _mask(graph: BlockGraph, names: Sequence[str]) -> int:
    return mask_of(graph.block_index[name] for name in names)


def _chunks(graph: BlockGraph, costs: GraphCosts) -> dict[str, Any]:
    """Fields of a problem with chunks of a spread vocabulary."""
    if costs.chunks is None:
        return {}
    mask = _mask(graph, costs.chunks.names)
    anchors = (1 << len(graph.blocks)) - 1 & ~mask
    return {"entries": (StageCharge(costs.chunks.entry_s, mask),), "anchors": anchors}


def _predecessors(
    graph: BlockGraph, costs: GraphCosts, constraints: Constraints
) -> tuple[int, ...]:
    index = graph.block_index
    preds = [0] * len(graph.blocks)
    for producer, consumer, tensor in graph.edges():
        if index[producer] >= index[consumer]:
            raise PartitionError(
                f"tensor {tensor.name!r} goes from {producer!r} to {consumer!r}, which runs "
                "earlier; blocks must be listed in execution order"
            )
        preds[index[consumer]] |= 1 << index[producer]
    if constraints.execution_order:
        free = set(costs.chunks.names) if costs.chunks else set()
        preds = [
            mask | (1 << (i - 1)) if i and graph.blocks[i].name not in free else mask
            for i, mask in enumerate(preds)
        ]
    return tuple(preds)


def _values(graph: BlockGraph, machine: Machine, *, held: bool) -> list[Value]:
    """Tensors between blocks. In a shared memory the one that is kept is the producer's own."""
    return [
        Value(
            graph.block_index[tensor.producer],
            _mask(graph, tensor.consumers),
            0 if machine.shared_memory and tensor.kept else tensor.num_bytes,
            tensor.num_bytes if tensor.requires_grad and graph.training else 0,
            held,
        )
        for tensor in graph.tensors
        if tensor.producer is not None and tensor.consumers and (held or tensor.requires_grad)
    ]


def _weights(graph: BlockGraph, costs: GraphCosts) -> tuple[tuple[float, ...], tuple[Shared, ...]]:
    """Bytes that one block alone needs, and parameters with all their users."""
    users: dict[str, int] = {}
    sizes: dict[str, float] = {}
    for position, block in enumerate(graph.blocks):
        for fqn, num_bytes in costs.blocks[block.name].weight_bytes.items():
            users[fqn] = users.get(fqn, 0) | 1 << position
            sizes[fqn] = max(sizes.get(fqn, 0), num_bytes)
    private = [0.0] * len(graph.blocks)
    for fqn, mask in users.items():
        if mask.bit_count() == 1:
            private[mask.bit_length() - 1] += sizes[fqn]
    shared = tuple(Shared(sizes[fqn], m) for fqn, m in users.items() if m.bit_count() > 1)
    return tuple(private), shared


def device_groups(graph: BlockGraph, groups: Iterable[Sequence[str]]) -> tuple[int, ...]:
    """Return masks of blocks that must share a device; groups with a common block are one."""
    return joined_groups(_mask(graph, names) for names in groups)


def _outer_seconds(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
) -> tuple[float, ...]:
    """Seconds per optimizer step: the update, and what adds up the gradients of the replicas.

    A ring moves ``2 (r-1) / r`` of the gradient bytes through every link (Patarasuk and Yuan,
    2009). In a shared memory all devices add: two reads and a write for each further replica. A
    parameter is charged to its first block.
    """
    link = machine.board_link or machine.link
    copies = constraints.replicas
    if costs.ranks is not None:
        share = 0.0
    elif machine.shared_memory:
        rate = sum(device.memory_bytes_per_s for device in machine.devices)
        share = 3 * (copies - 1) / rate
    else:
        share = 2 * (copies - 1) / copies / link.bytes_per_s
    updates = {**costs.update_s, **constraints.update_s}
    seconds = [updates.get(block.name, 0.0) for block in graph.blocks]
    for parameter in graph.parameters:
        if parameter.trainable and parameter.blocks and graph.training:
            seconds[graph.block_index[parameter.blocks[0]]] += share * parameter.num_bytes
    return tuple(seconds)


def _exchanges(
    graph: BlockGraph, machine: Machine, constraints: Constraints
) -> tuple[StageCharge, ...]:
    """Tied gradients sent to the other stage and back: once in, once out of every holder."""
    if constraints.tied != "exchange" or machine.shared_memory or not graph.training:
        return ()
    link = machine.board_link or machine.link
    return tuple(
        StageCharge(link.transfer_s(parameter.num_bytes), _mask(graph, parameter.blocks))
        for parameter in graph.parameters
        if parameter.trainable and len(parameter.blocks) > 1
    )


def ample_memory(problem: Problem, slots: Sequence[Slot]) -> bool:
    """Whether one pool surely holds any split with the quickest options everywhere."""
    most = max(slot.in_flight for slot in slots)
    weights = sum(problem.held) + sum(item.num_bytes for item in problem.shared_weights)
    stash = sum(option.held_bytes(most) for option in problem.fastest)
    crossing = sum(v.forward_bytes for v in problem.values)
    entering = crossing + sum(item.num_bytes for item in problem.inputs)
    space = max(o.workspace_bytes for ways in problem.options for o in ways)
    total = weights + stash + len(slots) * (space + most * entering)
    return total <= min(slot.capacity for slot in slots)
