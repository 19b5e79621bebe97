"""Small random instances, and the slowest correct solver there is: try everything.

The oracle shares no code with the package: it works on names, sets and the public dataclasses,
and steps through PopART's pipeline cycles one by one.
"""

from __future__ import annotations

import itertools
import random
from itertools import pairwise
from math import inf

from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts


def make_graph(num_blocks, edges, *, sizes=None, kinds=None, params=(), inputs=(), training=True):
    """Graph of blocks b0.. with one tensor per producer; ``edges`` are (producer, consumer)."""
    names = [f"b{i}" for i in range(num_blocks)]
    tensors = []
    for producer in range(num_blocks):
        consumers = tuple(names[c] for p, c in sorted(set(edges)) if p == producer)
        if consumers:
            size = sizes[producer] if sizes else 16
            tensors.append(
                TensorSpec(f"t{producer}", (size,), "float32", True, names[producer], consumers)
            )
    parameters = tuple(
        ParameterSpec(fqn, (25,), "float32", True, (), tuple(names[b] for b in users))
        for fqn, users in params
    )
    blocks = tuple(Block(name, kind=kinds[i] if kinds else "layer") for i, name in enumerate(names))
    specs = tuple(
        TensorSpec(f"in{i}", (size,), "float32", consumers=tuple(names[c] for c in users))
        for i, (size, users) in enumerate(inputs)
    )
    return BlockGraph("Random", blocks, tuple(tensors), specs, parameters, training=training)


def make_machine(num_devices, *, memory=10**9, bandwidth=100.0, latency=0.0, **more):
    """Equal devices unless ``memory`` is a list."""
    memories = memory if isinstance(memory, list) else [memory] * num_devices
    devices = tuple(Device(f"d{i}", memories[i], {"float32": 1e9}, 1e9) for i in range(num_devices))
    return Machine("random", devices, Link(bandwidth, latency), **more)


def unit_costs(graph, seconds=None, *, stash=0, weights=0):
    """Each block takes 1 s forward and 2 s backward, or ``seconds`` times that; one option."""
    factors = seconds or [1] * len(graph.blocks)
    return GraphCosts(
        {
            block.name: BlockCost(
                (BlockChoice(factor, 2 * factor, stash),), {f"w.{block.name}": weights}
            )
            for block, factor in zip(graph.blocks, factors, strict=True)
        },
        "unit",
    )


def random_case(seed, *, max_blocks=7, chain=False):
    """Graph, costs and machine with memory tight enough to matter in about half of the cases."""
    rng = random.Random(seed)
    n = rng.randint(2, max_blocks)
    edges = [(i, i + 1) for i in range(n - 1)] if chain else []
    if not chain:
        edges = [(p, c) for c in range(n) for p in range(c) if rng.random() < 0.35]
    params = [("tied", tuple(sorted(rng.sample(range(n), 2))))] if rng.random() < 0.4 else []
    graph = make_graph(
        n,
        edges,
        sizes=[rng.randint(1, 30) for _ in range(n)],
        params=params,
        inputs=[(rng.randint(1, 40), rng.sample(range(n), min(n, 2)))]
        if rng.random() < 0.3
        else [],
        training=rng.random() < 0.85,
    )
    costs = {}
    for i in range(n):
        forward, backward = rng.randint(0, 6), rng.randint(0, 9)
        stash, space = rng.randint(0, 200), rng.randint(0, 150)
        menu = [BlockChoice(forward, backward, stash, space)]
        if rng.random() < 0.6:
            menu.append(
                BlockChoice(forward, backward + forward, stash // 4, space + 20, recompute=True)
            )
        if rng.random() < 0.25:
            menu.append(
                BlockChoice(forward + 1, backward + 1, stash, space // 3, serialize_factor=2)
            )
        weights = {f"w{i}": rng.randint(0, 120)}
        for fqn, users in params:
            if i in users:
                weights[fqn] = 90
        costs[f"b{i}"] = BlockCost(tuple(menu), weights)
    num_devices = rng.randint(1, 4)
    machine = make_machine(
        num_devices,
        memory=rng.choice([300, 600, 900, 1500, 4000]),
        bandwidth=rng.choice([30.0, 200.0, 1e9]),
        latency=rng.choice([0.0, 0.25]),
        board_link=Link(20.0) if rng.random() < 0.2 else None,
        devices_per_board=2,
        shared_memory=rng.random() < 0.2,
    )
    speeds = tuple(rng.choice([1.0, 0.5, 2.0]) for _ in range(num_devices))
    heterogeneous = rng.random() < 0.2
    return graph, GraphCosts(costs, "random", speeds if heterogeneous else ()), machine, rng


def all_splits(graph, num_stages, *, execution_order=False):
    """Yield every sequence of ``num_stages`` non-empty stages that respects the edges."""
    names = [block.name for block in graph.blocks]
    position = {name: i for i, name in enumerate(names)}
    pairs = [(p, c) for p, c, _ in graph.edges()]
    if execution_order:
        pairs += list(itertools.pairwise(names))
    for stage_of in itertools.product(range(num_stages), repeat=len(names)):
        if len(set(stage_of)) != num_stages:
            continue
        if all(stage_of[position[p]] <= stage_of[position[c]] for p, c in pairs):
            yield [
                [name for name, stage in zip(names, stage_of, strict=True) if stage == s]
                for s in range(num_stages)
            ]


def merged(devices, forward, backward):
    """PopART makes one stage of consecutive ones on one device."""
    groups = [
        list(group)
        for _, group in itertools.groupby(
            zip(devices, forward, backward, strict=True), key=lambda stage: stage[0]
        )
    ]
    return (
        [group[0][0] for group in groups],
        [sum(stage[1] for stage in group) for group in groups],
        [sum(stage[2] for stage in group) for group in groups],
    )


def step_seconds(schedule, num_microbatches, devices, forward, backward, *, training):
    """Step time from per-stage seconds; PopART cycle by cycle."""
    total = [f + b for f, b in zip(forward, backward, strict=True)]

    def busiest(seconds):
        return max(
            sum(s for s, d in zip(seconds, devices, strict=True) if d == device)
            for device in set(devices)
        )

    if schedule == "1f1b":
        return (num_microbatches - 1) * busiest(total) + sum(total)
    if schedule == "gpipe":
        return (num_microbatches - 1) * (busiest(forward) + busiest(backward)) + sum(total)
    devices, forward, backward = merged(devices, forward, backward)
    depth, total = len(devices), [f + b for f, b in zip(forward, backward, strict=True)]
    work = [(devices[s], forward[s]) for s in range(depth)]
    if training:
        work[-1] = (devices[-1], total[-1])
        work += [(devices[s], backward[s]) for s in range(depth - 2, -1, -1)]
    else:
        work = [(devices[s], total[s]) for s in range(depth)]
    seconds = 0.0
    for cycle in range(num_microbatches + len(work) - 1):
        loads = {}
        for stage, (device, cost) in enumerate(work):
            if 0 <= cycle - stage < num_microbatches:
                loads[device] = loads.get(device, 0.0) + cost
        seconds += max(loads.values())
    return seconds


def kept_microbatches(schedule, stage, depth, num_microbatches, *, training, devices=None):
    """Microbatches in flight of one stage."""
    if schedule == "popart" and devices is not None:
        number = sum(a != b for a, b in pairwise(devices[: stage + 1]))
        depth, stage = 1 + sum(a != b for a, b in pairwise(devices)), number
    if not training:
        return 1
    count = {
        "1f1b": depth - stage,
        "gpipe": num_microbatches,
        "popart": 2 * (depth - 1 - stage) + 1,
    }
    return min(num_microbatches, count[schedule])


def transfers(graph, machine, stages, devices):
    """Forward and backward transfer seconds and held bytes of every stage, hop by hop."""
    depth = len(stages)
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage}
    send_f, send_b, held = [0.0] * depth, [0.0] * depth, [0.0] * depth
    for tensor in graph.tensors:
        last = max(stage_of[name] for name in tensor.consumers)
        for s in range(stage_of[tensor.producer], last):
            held[s + 1] += tensor.num_bytes
            if machine.shared_memory or devices[s] == devices[s + 1]:
                continue
            cost = machine.link_between(devices[s], devices[s + 1]).transfer_s(tensor.num_bytes)
            for side in (s, s + 1):
                send_f[side] += cost
                send_b[side] += cost if graph.training and tensor.requires_grad else 0
    for spec in graph.inputs:
        for s in {stage_of[name] for name in spec.consumers}:
            held[s] += spec.num_bytes
    return send_f, send_b, held


def outer_seconds(graph, costs, machine, constraints, stages, devices):
    """Longest update and tied exchange of a device, once per step."""
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage}
    outer = [sum(constraints.update_s.get(name, 0.0) for name in stage) for stage in stages]
    if constraints.tied == "exchange" and graph.training and not machine.shared_memory:
        link = machine.board_link or machine.link
        for parameter in graph.parameters:
            holders = {stage_of[name] for name in parameter.blocks}
            for s in holders if len(holders) > 1 else ():
                outer[s] += link.transfer_s(parameter.num_bytes)
    return max(
        sum(o / costs.speed(d) for o, e in zip(outer, devices, strict=True) if e == d)
        for d in devices
    )


def stage_menu(costs, stage, speed, flight, held):
    """Undominated (forward, backward, bytes without weights) over every choice of options."""
    ways = set()
    for picks in itertools.product(*(costs.blocks[name].choices for name in stage)):
        memory = flight * (sum(p.stash_bytes for p in picks) + held)
        ways.add((
            sum(p.forward_s for p in picks) / speed,
            sum(p.backward_s for p in picks) / speed,
            memory + max(p.workspace_bytes for p in picks),
        ))  # fmt: skip
    return [
        w for w in ways
        if not any(v != w and all(x <= y for x, y in zip(v, w, strict=True)) for v in ways)
    ]  # fmt: skip


def memory_pools(costs, machine, stages, devices):
    """Pool of every stage, room of every pool, and the weights each pool holds once."""
    pools = [0 if machine.shared_memory else d for d in devices]
    usable = [d.memory_bytes - d.reserved_bytes for d in machine.devices]
    room = {pool: sum(usable) if machine.shared_memory else usable[pool] for pool in pools}
    params = {pool: {} for pool in pools}
    for s, stage in enumerate(stages):
        for name in stage:
            params[pools[s]].update(costs.blocks[name].weight_bytes)
    return pools, room, {pool: sum(held.values()) for pool, held in params.items()}


def price_split(graph, costs, machine, constraints, stages, devices):
    """Least step time of one split over every combination of options; ``inf`` if none fits."""
    depth, training = len(stages), graph.training
    schedule, microbatches = constraints.schedule, constraints.num_microbatches
    send_f, send_b, held = transfers(graph, machine, stages, devices)
    pools, room, weights = memory_pools(costs, machine, stages, devices)
    menus = [
        stage_menu(
            costs, stage, costs.speed(devices[s]),
            kept_microbatches(
                schedule, s, depth, microbatches, training=training, devices=devices
            ),
            held[s],
        )
        for s, stage in enumerate(stages)
    ]  # fmt: skip
    best = inf
    for ways in itertools.product(*menus):
        used = dict(weights)
        for pool, way in zip(pools, ways, strict=True):
            used[pool] += way[2]
        if any(used[pool] > room[pool] for pool in used):
            continue
        forward = [way[0] + send_f[s] for s, way in enumerate(ways)]
        backward = [way[1] + send_b[s] for s, way in enumerate(ways)]
        seconds = step_seconds(
            schedule, microbatches, devices, forward, backward, training=training
        )
        best = min(best, seconds)
    return best + outer_seconds(graph, costs, machine, constraints, stages, devices)


def brute_force(graph, costs, machine, constraints, devices, allowed=lambda _: True):
    """Least step time over every split on ``devices`` that ``allowed`` accepts."""
    best = inf
    for stages in all_splits(graph, len(devices), execution_order=constraints.execution_order):
        if allowed(stages):
            best = min(best, price_split(graph, costs, machine, constraints, stages, devices))
    return best
