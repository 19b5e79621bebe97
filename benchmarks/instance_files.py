"""Files of partitioning instances, checked: ``../shared/data/instances/README.md`` has the formats.

The names are those of the formats. Fields that nobody here reads are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.ir.codec import read_json

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Number = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Devices = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Hosts = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class _Node(msgspec.Struct):
    id: Number
    supportedOnFpga: bool | int
    cpuLatency: Amount
    fpgaLatency: Amount
    isBackwardNode: bool | int
    size: Amount
    colorClass: int | msgspec.UnsetType = msgspec.UNSET


class _Edge(msgspec.Struct):
    sourceId: int
    destId: int
    cost: Amount


class MaxLoadFile(msgspec.Struct):
    """Operators on accelerators and host cores: the busiest one counts."""

    maxSizePerFPGA: Amount
    maxFPGAs: Devices
    maxCPUs: Hosts
    nodes: Annotated[list[_Node], msgspec.Meta(min_length=1)]
    edges: list[_Edge]


class _Way(msgspec.Struct):
    timePerSample: Amount
    memoryUsageA: Amount
    memoryUsageB: Amount
    syncTimeFw: dict[str, Amount]
    syncTimeBw: dict[str, Amount]


class _MemoryNode(msgspec.Struct):
    id: Number
    TMPCs: dict[str, Annotated[list[_Way], msgspec.Meta(min_length=1)]]


class _MemoryEdge(msgspec.Struct):
    sourceId: int
    destId: int
    communicationCost: Amount


class MemoryFile(msgspec.Struct):
    """Layers that may be recomputed, with tensor-parallel degrees."""

    maxMemoryPerDevice: Amount
    maxDevices: Devices
    nodes: Annotated[list[_MemoryNode], msgspec.Meta(min_length=1)]
    edges: list[_MemoryEdge]


def read_instance_file(path: Path) -> tuple[type, Mapping[str, Any]]:
    """Return which format a file has, and what it holds.

    Raises:
        DatasetError: It cannot be read, is of neither format, or a place in it is wrong.
    """
    raw = read_json(path, "the instance", DatasetError)
    nodes = raw.get("nodes") if isinstance(raw, dict) else None
    first = nodes[0] if isinstance(nodes, list) and nodes else None
    if isinstance(first, dict) and "TMPCs" in first:
        kind: type = MemoryFile
    elif isinstance(raw, dict) and "maxFPGAs" in raw:
        kind = MaxLoadFile
    else:
        raise DatasetError(f"{path} is neither a max-load file (maxFPGAs) nor one with TMPCs")
    try:
        msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise DatasetError(f"{path}: {error}") from error
    _check_graph(raw["nodes"], raw["edges"], path)
    if kind is MemoryFile:
        _check_layers(raw["nodes"], raw["edges"], path)
    return kind, raw


def _check_graph(
    nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]], path: Path
) -> None:
    known = {node["id"] for node in nodes}
    if len(known) < len(nodes):
        raise DatasetError(f"{path} has {len(nodes)} nodes of {len(known)} ids; make ids unique")
    for number, edge in enumerate(edges):
        for end in ("sourceId", "destId"):
            if edge[end] not in known:
                raise DatasetError(f"{path}, edges[{number}]: {end} {edge[end]} is no node's id")


def _check_layers(
    nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]], path: Path
) -> None:
    for node in nodes:
        ways = node["TMPCs"].get("1")
        if ways is None:
            raise DatasetError(f"{path}, node {node['id']} has no TMPCs of degree 1, which is read")
        if any(cost for way in ways for key in ("syncTimeFw", "syncTimeBw")
               for cost in way[key].values()):  # fmt: skip
            raise DatasetError(
                f"{path}, node {node['id']} has sync times at degree 1, which this reader refuses"
            )
    sources = {node["id"]: set[int]() for node in nodes}
    for edge in edges:
        sources[edge["destId"]].add(edge["sourceId"])
    try:
        list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        raise DatasetError(f"{path} has edges in a circle: nodes {error.args[1][:8]}") from error
