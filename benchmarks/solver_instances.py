"""Solve public partitioning instances: ``python -m benchmarks.solver_instances FILE... --json``.

Two formats are read (``../shared/data/instances/README.md`` describes them with their sources):
max-load files (``maxFPGAs``, ``nodes``, ``edges``), and memory-and-recompute files (``TMPCs``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from benchmarks.instance_files import MemoryFile, read_instance_file
from benchmarks.max_load import HostedPositions, MaxLoadProblem, least_bottleneck
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.problem import Slot, Value
from ipu_pipeline.planner.search.stage_price import SearchResult

GIB = 2**30
MOST_IDEALS = 200_000
PIPER_BYTES_PER_S = 25 * GIB


@dataclass(frozen=True)
class Instance:
    """One problem file.

    Attributes:
        problem: Blocks and costs.
        layout: The positions for ``num_devices`` accelerators and the host cores.
        num_devices: Accelerators.
    """

    problem: MaxLoadProblem
    layout: HostedPositions
    num_devices: int


@dataclass(frozen=True)
class Answer:
    """Result of one file; ``objective`` is ``None`` when nothing fits."""

    file: str
    objective: float | None
    lower_bound: float | None
    gap: float | None
    seconds: float


def read_instance(
    path: Path,
    num_devices: int | None = None,
    memory_gib: float | None = None,
    *,
    training: bool = False,
) -> Instance:
    """Read either format; the options override the file's devices and memory.

    Args:
        path: The file.
        num_devices: Accelerators.
        memory_gib: GiB of each.
        training: Take the training form of a max-load file for inference.

    Raises:
        DatasetError: The file is of neither format, or a place in it is wrong.
    """
    kind, raw = read_instance_file(path)
    if kind is MemoryFile:
        memory = raw["maxMemoryPerDevice"] if memory_gib is None else memory_gib * GIB
        return _memory_instance(raw, num_devices or raw["maxDevices"], memory)
    memory = raw["maxSizePerFPGA"] if memory_gib is None else memory_gib * GIB
    raw = training_form(raw) if training else raw
    return _max_load_instance(raw, num_devices or raw["maxFPGAs"], memory)


def solve_instance(instance: Instance, time_limit_s: float | None = None) -> SearchResult:
    """Minimise the busiest device of ``instance``; exact unless the time limit ends it."""
    deadline = None if time_limit_s is None else monotonic() + time_limit_s
    depths = range(0 if instance.layout.hosts else 1, instance.num_devices + 1)
    return least_bottleneck(instance.problem, instance.layout, depths, MOST_IDEALS, deadline)


def _max_load_instance(raw: Mapping[str, Any], num_devices: int, memory: float) -> Instance:
    group_of, edges = _contract(raw)
    count = max(group_of.values()) + 1
    work, host, size, unsupported = [0.0] * count, [0.0] * count, [0.0] * count, 0
    for node in raw["nodes"]:
        group = group_of[node["id"]]
        work[group] += node["fpgaLatency"]
        host[group] += node["cpuLatency"]
        size[group] += node["size"]
        unsupported |= 0 if node["supportedOnFpga"] else 1 << group
    preds = [0] * count
    for source, target in edges:
        preds[target] |= 1 << source
    problem = MaxLoadProblem(
        names=tuple(str(group) for group in range(count)),
        preds=tuple(preds),
        options=tuple((BlockChoice(seconds),) for seconds in work),
        values=_max_load_values(raw, group_of),
        weight_bytes=tuple(size),
        host_s=tuple(host),
        host_only=unsupported,
    )
    slot = Slot(0, 0, capacity=memory, link_in=Link(1.0), link_out=Link(1.0))
    return Instance(
        problem, HostedPositions((slot,) * num_devices, hosts=raw["maxCPUs"]), num_devices
    )


def training_form(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a max-load file for training from one for inference: every node gets a backward one.

    It takes twice the time, shares its forward node's device, and its gradient goes the way back
    at the cost of the tensor whose gradient it is.
    """
    shift = 1 + max(node["id"] for node in raw["nodes"])
    nodes = [{**node, "colorClass": node["id"]} for node in raw["nodes"]]
    nodes += [
        {**node, "id": node["id"] + shift, "isBackwardNode": 1,
         "fpgaLatency": 2 * node["fpgaLatency"], "cpuLatency": 2 * node["cpuLatency"]}
        for node in nodes
    ]  # fmt: skip
    cost = {edge["sourceId"]: edge["cost"] for edge in raw["edges"]}
    back = [
        {"sourceId": edge["destId"] + shift, "destId": edge["sourceId"] + shift,
         "cost": cost.get(edge["destId"], edge["cost"])}
        for edge in raw["edges"]
    ]  # fmt: skip
    return {**raw, "nodes": nodes, "edges": [*raw["edges"], *back]}


def _max_load_values(raw: Mapping[str, Any], group_of: Mapping[int, int]) -> tuple[Value, ...]:
    """One value per node whose output another group reads; its "bytes" are milliseconds."""
    readers: dict[int, int] = {}
    cost: dict[int, float] = {}
    for edge in raw["edges"]:
        source, target = edge["sourceId"], group_of[edge["destId"]]
        if group_of[source] != target:
            readers[source] = readers.get(source, 0) | 1 << target
            cost[source] = edge["cost"]
    return tuple(Value(group_of[n], mask, cost[n]) for n, mask in readers.items() if cost[n])


def _contract(raw: Mapping[str, Any]) -> tuple[dict[int, int], set[tuple[int, int]]]:
    """Number the groups of nodes that share a device, in a topological order of forward edges.

    A backward node without a forward partner is ordered by its backward edges, mirrored (as the
    format's authors do); groups in a cycle become one group.

    Returns:
        Group of every node, and the edges between groups.
    """
    colour = {n["id"]: ("c", n["colorClass"]) if "colorClass" in n else ("n", n["id"])
              for n in raw["nodes"]}  # fmt: skip
    forward = {colour[n["id"]] for n in raw["nodes"] if not n["isBackwardNode"]}
    backward_ids = {n["id"] for n in raw["nodes"] if n["isBackwardNode"]}
    index = {name: i for i, name in enumerate(dict.fromkeys(colour.values()))}
    edges = set()
    for edge in raw["edges"]:
        source, target = colour[edge["sourceId"]], colour[edge["destId"]]
        ends = {edge["sourceId"] in backward_ids, edge["destId"] in backward_ids}
        if ends == {False}:
            edges.add((index[source], index[target]))
        elif ends == {True} and not {source, target} <= forward:
            edges.add((index[target], index[source]))
    component = _components(len(index), edges)
    group_of = {node: component[index[name]] for node, name in colour.items()}
    between = {(component[a], component[b]) for a, b in edges if component[a] != component[b]}
    return group_of, between


def _components(count: int, edges: set[tuple[int, int]]) -> list[int]:
    """Number of the strongly connected component of each node, in topological order."""
    succs: list[list[int]] = [[] for _ in range(count)]
    for source, target in sorted(edges):
        succs[source].append(target)
    order: list[int] = []
    _depth_first(range(count), succs, order)
    preds: list[list[int]] = [[] for _ in range(count)]
    for source, target in sorted(edges):
        preds[target].append(source)
    component = [-1] * count
    number = 0
    for root in reversed(order):
        if component[root] == -1:
            reached: list[int] = []
            _depth_first([root], preds, reached, component)
            for node in reached:
                component[node] = number
            number += 1
    return component


def _depth_first(
    roots: Sequence[int],
    neighbours: Sequence[Sequence[int]],
    finished: list[int],
    skip: Sequence[int] | None = None,
) -> None:
    """Append nodes to ``finished`` when all they lead to is done; skip numbered ones."""
    seen = {node for node, number in enumerate(skip or ()) if number != -1}
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(neighbours[root]))]
        while stack:
            node, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                finished.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(neighbours[following])))


def _memory_instance(raw: Mapping[str, Any], num_devices: int, memory: float) -> Instance:
    order = _topological([n["id"] for n in raw["nodes"]], raw["edges"])
    by_id = {node["id"]: node for node in raw["nodes"]}
    index = {node: i for i, node in enumerate(order)}
    options = []
    for node in order:
        ways = by_id[node]["TMPCs"]["1"]
        options.append(
            tuple(
                BlockChoice(
                    way["timePerSample"],
                    stash_bytes=way["memoryUsageA"],
                    fixed_bytes=way["memoryUsageB"],
                )
                for way in ways
            )
        )
    preds = [0] * len(order)
    for edge in raw["edges"]:
        preds[index[edge["destId"]]] |= 1 << index[edge["sourceId"]]
    problem = MaxLoadProblem(
        names=tuple(str(node) for node in order),
        preds=tuple(preds),
        options=tuple(options),
        values=tuple(
            Value(index[e["sourceId"]], 1 << index[e["destId"]],
                  e["communicationCost"], e["communicationCost"])
            for e in raw["edges"]
            if e["communicationCost"]
        ),
    )  # fmt: skip
    link = Link(PIPER_BYTES_PER_S)
    slots = [
        Slot(0, 0, capacity=memory, in_flight=to_end, link_in=link, link_out=link)
        for to_end in range(1, num_devices + 1)
    ]
    return Instance(problem, HostedPositions(slots), num_devices)


def _topological(nodes: list[int], edges: Sequence[Mapping[str, Any]]) -> list[int]:
    """Node ids so that every edge points forward; ties keep the file's order."""
    waiting = {node: {e["sourceId"] for e in edges if e["destId"] == node} for node in nodes}
    order: list[int] = []
    while waiting:
        node = next(n for n, sources in waiting.items() if not sources)
        del waiting[node]
        order.append(node)
        for sources in waiting.values():
            sources.discard(node)
    return order


def answer(path: Path, arguments: argparse.Namespace) -> Answer:
    """Read and solve one file."""
    start = perf_counter()
    search = solve_instance(
        read_instance(path, arguments.devices, arguments.memory_gib, training=arguments.training),
        arguments.time_limit,
    )
    seconds = perf_counter() - start
    if not search.pipelines:
        bound = None if search.lower_bound == inf else search.lower_bound
        return Answer(str(path), None, bound, None, seconds)
    objective = search.objective
    bound = min(search.lower_bound, objective)
    return Answer(str(path), objective, bound, 1 - bound / objective if objective else 0.0, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: print one line, or with ``--json`` one JSON object, per file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver_instances")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--devices", type=int, help="accelerators; default: the file's")
    parser.add_argument("--memory-gib", type=float, help="GiB per accelerator; default: the file's")
    parser.add_argument("--training", action="store_true", help="training form of max-load files")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds per file")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    arguments = parser.parse_args(argv)
    for path in arguments.files:
        try:
            result = answer(path, arguments)
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if arguments.json:
            print(json.dumps(result.__dict__), flush=True)
        else:
            found = "infeasible" if result.objective is None else f"{result.objective:.12g}"
            print(f"{path.name:34} {found:>18}  gap {result.gap}  {result.seconds:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
