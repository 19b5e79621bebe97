"""Small problems for the tuner, and the same search by trying everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ipu_pipeline.backends.ipu.prices import Chip, Prediction, chip_named, predict_on_chip
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.planner.tuning.search import Candidate, candidates
from ipu_pipeline.planner.tuning.space import TuneRequest, settings_of, shapes
from tests.backends.ipu.prices.ipu_graphs import layered

NUM_IPUS = 4
NUM_LAYERS = 4


def request(**changes) -> TuneRequest:
    given = {"proportions": (0.05, 0.3), "factors": (1,), "max_micro_batch": 2}
    return TuneRequest(16, **{**given, **changes})


def graphs(*, tied: bool) -> dict[int, BlockGraph]:
    return {size: layered(NUM_LAYERS, batch=size, seq=256, tied=tied) for size in (1, 2)}


def shared(graph: BlockGraph) -> BlockGraph:
    """Let equal layers share their operation tuples, as captured graphs do."""
    first = next(block for block in graph.blocks if block.kind == "layer")
    blocks = tuple(
        replace(b, forward_ops=first.forward_ops, backward_ops=first.backward_ops)
        if b.kind == "layer"
        else b
        for b in graph.blocks
    )
    return replace(graph, blocks=blocks)


def small_chip(share: float) -> Chip:
    """A chip with a part of the memory, so that memory decides."""
    chip = chip_named("ipu-gc200")
    return replace(chip, tile_memory_bytes=int(chip.tile_memory_bytes * share))


def prepared(asked: TuneRequest, models: dict[int, BlockGraph], chip: Chip) -> list[Candidate]:
    return candidates(shapes(asked, NUM_IPUS), models, chip, asked)


def everything(
    asked: TuneRequest, models: dict[int, BlockGraph], chip: Chip
) -> Iterator[Prediction]:
    """Predict every setting, split and proportion that PopART accepts and that fits."""
    for shape in shapes(asked, NUM_IPUS):
        graph = models[shape.micro_batch]
        for settings in settings_of(shape, graph, asked):
            counts = [c for c in product(range(NUM_LAYERS + 1), repeat=shape.num_ipus)
                      if sum(c) == NUM_LAYERS]  # fmt: skip
            for count, chosen in product(counts, product(asked.proportions, repeat=shape.num_ipus)):
                given = replace(settings, layers_per_ipu=count, proportions=chosen)
                found = predict_on_chip(graph, given, chip)
                used = {stage.ipu for stage in found.layout.stages}
                if found.fits and not found.notes and len(used) == shape.num_ipus:
                    yield found
