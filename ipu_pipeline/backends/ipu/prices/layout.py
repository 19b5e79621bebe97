"""Where the blocks of a graph run: IPU and pipeline stage of each, from a configuration.

``layers_per_ipu`` places blocks of kind ``layer``; blocks before the first layer go to the
embedding's IPU, heads and losses to the head's, and glue stays with what it follows. A block's
stage is the earliest one on its IPU that is not before what it reads, so that blocks on one IPU
which follow each other share a stage, and a head back on IPU 0 is one more stage there.

Source: POPART_PIPELINE.md (merging of stages), README of the shared data (F = 5 for heads back on
IPU 0); PopART refuses a parameter on two IPUs, so a tied head is with its embedding. The published
library computes a decoder's embedding together with the encoder's (``hoisted``); a model whose
own forward pass runs comes back to that IPU for it, which is one more stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.operations import OperationPricer
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import share_ipus
from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec
from ipu_pipeline.planner.layers_per_ipu import counted_layers, expand_layers
from ipu_pipeline.planner.options.tables import table_of


@dataclass(frozen=True)
class LayoutStage:
    """One forward pipeline stage.

    Attributes:
        ipu: Its IPU.
        blocks: Its blocks, in execution order.
    """

    ipu: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class StageLayout:
    """Stages of a graph.

    Attributes:
        stages: Forward stages in order.
        num_ipus: IPUs of one replica.
    """

    stages: tuple[LayoutStage, ...]
    num_ipus: int

    def blocks_on(self, ipu: int) -> tuple[str, ...]:
        """Names of the blocks on ``ipu``, in execution order of their stages."""
        return tuple(name for stage in self.stages if stage.ipu == ipu for name in stage.blocks)


def make_layout(
    graph: BlockGraph, settings: IPUSettings, ipus: Mapping[str, int] | None = None
) -> StageLayout:
    """Place every block.

    Args:
        graph: The model.
        settings: ``layers_per_ipu``, ``embedding_ipu`` and ``head_ipu`` are used.
        ipus: IPU of every layer block, instead of ``layers_per_ipu``.

    Raises:
        ConfigError: The layers do not add up, or an IPU is outside the replica.
    """
    if ipus is None and settings.stage_starts:
        return _by_starts(graph, settings)
    if ipus is None:
        ipus = _by_counts(graph, settings)
    outside = sorted({ipu for ipu in ipus.values() if not 0 <= ipu < settings.num_ipus})
    if outside:
        raise ConfigError(
            f"layers are placed on IPU {outside[0]}, but a replica has {settings.num_ipus}; "
            "correct the placement or ipus_per_replica"
        )
    placed = _place(graph, settings, ipus)
    if settings.hoisted:
        return StageLayout(_stages(graph, placed), settings.num_ipus)
    return layout_of([(placed[b.name], (b.name,)) for b in graph.blocks], settings.num_ipus)


def layout_of(stages: Sequence[tuple[int, Sequence[str]]], num_ipus: int) -> StageLayout:
    """Return the layout of given stages ``(ipu, blocks)``; PopART merges neighbours on one IPU."""
    merged: list[LayoutStage] = []
    for ipu, blocks in stages:
        if merged and merged[-1].ipu == ipu:
            merged[-1] = LayoutStage(ipu, (*merged[-1].blocks, *blocks))
        else:
            merged.append(LayoutStage(ipu, tuple(blocks)))
    return StageLayout(tuple(merged), num_ipus)


def _by_starts(graph: BlockGraph, settings: IPUSettings) -> StageLayout:
    names = list(graph.block_index)
    unknown = [name for name, _ in settings.stage_starts if name not in graph.block_index]
    if unknown:
        raise ConfigError(
            f"stage_starts names {', '.join(unknown)}, which the model does not have; its blocks: "
            f"{', '.join(names)}"
        )
    cuts = [graph.block_index[name] for name, _ in settings.stage_starts]
    if cuts[0] != 0 or cuts != sorted(set(cuts)):
        raise ConfigError(
            "stage_starts must name the first block of every stage in the order of execution, "
            f"{names[0]!r} first; got {', '.join(name for name, _ in settings.stage_starts)}"
        )
    outside = [ipu for _, ipu in settings.stage_starts if ipu not in range(settings.num_ipus)]
    if outside:
        raise ConfigError(
            f"stage_starts places a stage on IPU {outside[0]!r}, but a replica has "
            f"{settings.num_ipus}; correct it or ipus_per_replica"
        )
    ends = [*cuts[1:], len(names)]
    return layout_of(
        [(ipu, names[start:end])
         for (_, ipu), start, end in zip(settings.stage_starts, cuts, ends, strict=True)],
        settings.num_ipus,
    )  # fmt: skip


def placement_of(graph: BlockGraph, layout: StageLayout, settings: IPUSettings) -> IPUSettings:
    """Return ``settings`` that say where ``layout`` puts every block.

    ``layers_per_ipu`` counts the layers of every IPU; ``stage_starts`` is added only where these
    numbers mean another layout.
    """
    counted = replace(settings, layers_per_ipu=layers_of(graph, layout), stage_starts=())
    if make_layout(graph, counted) == layout:
        return counted
    starts = tuple((stage.blocks[0], stage.ipu) for stage in layout.stages)
    return replace(counted, stage_starts=starts)


def layers_of(graph: BlockGraph, layout: StageLayout) -> tuple[int, ...]:
    """Return the number of layers on every IPU."""
    return tuple(
        sum(graph[name].kind == "layer" for name in layout.blocks_on(ipu))
        for ipu in range(layout.num_ipus)
    )


def _by_counts(graph: BlockGraph, settings: IPUSettings) -> dict[str, int]:
    layers = counted_layers(convolutional_layers(graph), settings.layers_per_ipu, settings.num_ipus)
    counts = expand_layers(settings.layers_per_ipu, settings.num_ipus, len(layers))
    owners = [ipu for ipu, count in enumerate(counts) for _ in range(count)]
    return dict(zip(layers, owners, strict=True))


def one_ipu_groups(graph: BlockGraph) -> tuple[tuple[str, ...], ...]:
    """Return the blocks that share a variable, which PopART has on one IPU.

    A parameter that layers share, that is in no module of theirs and that none looks up in, is
    handed to them as a value, which is copied.
    """

    def holds(block: Block, parameter: ParameterSpec) -> bool:
        table, names = table_of(graph, block), (parameter.fqn, *parameter.aliases)
        return (
            block.kind != "layer"
            or any(name.startswith(f"{block.module}.") for name in names)
            or (table is not None and table.use == "lookup" and table.parameter == parameter.fqn)
        )

    held = {
        parameter.blocks
        for parameter in graph.parameters
        if len(parameter.blocks) > 1 and any(holds(graph[n], parameter) for n in parameter.blocks)
    }
    return tuple(group for group in graph.tied_groups if group in held)


def convolutional_layers(graph: BlockGraph) -> dict[str, bool]:
    """Return every layer, and whether it has no matrix: :func:`counted_layers` may leave it out."""
    return {
        block.name: all(len(graph.parameter_by_fqn[fqn].shape) != 2 for fqn in block.parameters)
        for block in graph.blocks
        if block.kind == "layer"
    }


def _place(graph: BlockGraph, settings: IPUSettings, ipus: Mapping[str, int]) -> dict[str, int]:
    first = next((i for i, b in enumerate(graph.blocks) if b.name in ipus), 0)
    last = max((i for i, b in enumerate(graph.blocks) if b.name in ipus), default=-1)
    spread = share_ipus(graph, settings)
    head = _head_ipu(graph, settings, ipus, spread)
    placed: dict[str, int] = {}
    current = front = settings.embedding_ipu
    for position, block in enumerate(graph.blocks):
        if block.name in ipus:
            current = ipus[block.name]
        elif block.name in spread:  # what follows goes on where the last share is
            current = spread[block.name]
            front, head = (current, head) if position < first else (front, current)
        elif position < first or _goes_back(graph, block, settings):
            placed[block.name] = front
            if not settings.hoisted:
                current = front
            continue
        elif position > last or block.kind in ("head", "loss"):
            placed[block.name] = head
            continue
        placed[block.name] = current
    return placed


def _goes_back(graph: BlockGraph, block: Block, settings: IPUSettings) -> bool:
    """Whether an embedding behind the first layer is on the IPU of the first one.

    In the published library every embedding is; PopART insists where it shares its table with the
    first one, or with the head, which is there then (:func:`_head_ipu`).
    """
    if block.kind != "embedding":
        return False
    before = {item.name for item in graph.blocks[: graph.block_index[block.name]]}
    sharing = {name for group in graph.tied_groups if block.name in group for name in group}
    return (
        settings.hoisted
        or any(graph[name].kind == "embedding" for name in sharing & before)
        or (settings.head_ipu is None and any(graph[n].kind in ("head", "other") for n in sharing))
    )


def _head_ipu(
    graph: BlockGraph, settings: IPUSettings, ipus: Mapping[str, int], spread: Mapping[str, int]
) -> int:
    projections = [name for name in spread if graph[name].kind != "embedding"]
    if projections:
        return spread[projections[0]]
    if settings.head_ipu is not None:
        return settings.head_ipu
    kinds = {block.name: block.kind for block in graph.blocks}
    for group in graph.tied_groups:
        found = {kinds[name] for name in group}
        if "embedding" in found and found & {"head", "other"}:
            return settings.embedding_ipu
    return settings.num_ipus - 1 if ipus else settings.embedding_ipu


def _stages(graph: BlockGraph, placed: Mapping[str, int]) -> tuple[LayoutStage, ...]:
    stage_of: dict[str, int] = {}
    owners: list[int] = []
    members: list[list[str]] = []
    for block in graph.blocks:
        producers = [graph.tensor_by_name[name].producer for name in block.inputs]
        earliest = max((stage_of[p] for p in producers if p is not None), default=0)
        ipu = placed[block.name]
        stage = next((s for s in range(earliest, len(owners)) if owners[s] == ipu), len(owners))
        if stage == len(owners):
            owners.append(ipu)
            members.append([])
        members[stage].append(block.name)
        stage_of[block.name] = stage
    return tuple(LayoutStage(ipu, tuple(names)) for ipu, names in zip(owners, members, strict=True))


@dataclass(frozen=True)
class PlacedProgram:
    """Stages of a model on their IPUs: all that a price reads.

    Attributes:
        graph: The model.
        layout: Stages and their IPUs.
        settings: The run.
        chip: The IPU.
    """

    graph: BlockGraph
    layout: StageLayout
    settings: IPUSettings
    chip: Chip

    def pricer(self, ipu: int) -> OperationPricer:
        """Return what prices operations on ``ipu``."""
        return OperationPricer(self.chip, self.settings.precision, self.settings.proportion(ipu))

    @cached_property
    def crossing(self) -> tuple[tuple[int, int, str], ...]:
        """``(producing stage, last consuming stage, tensor)`` of all that crosses stages."""
        stages = enumerate(self.layout.stages)
        stage_of = {name: i for i, stage in stages for name in stage.blocks}
        found = []
        for tensor in self.graph.tensors:
            if tensor.producer is None or not tensor.consumers:
                continue
            start = stage_of[tensor.producer]
            end = max(stage_of[name] for name in tensor.consumers)
            if end > start:
                found.append((start, end, tensor.name))
        return tuple(found)

    @cached_property
    def held(self) -> tuple[Mapping[str, int], ...]:
        """For every IPU, the parameters it holds and how many elements of each.

        A parameter used twice on an IPU is held once.
        """
        sizes = {fqn: item.numel for fqn, item in self.graph.parameter_by_fqn.items()}
        return tuple(
            {
                fqn: sizes[fqn]
                for name in self.layout.blocks_on(ipu)
                for fqn in self.graph[name].parameters
            }
            for ipu in range(self.layout.num_ipus)
        )
