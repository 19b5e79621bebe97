"""A split that an IPU configuration spells out: every layer placed, nothing left to search.

``layers_per_ipu`` with numbers says where each block runs, the head of a tied model back on the
IPU of its embedding included (an extra last stage). The price is the predictor's, which knows
what the solver's sums do not: the shared cycle of IPUs with several stages, and the fullest tile.
"""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.backends.ipu.prices import Prediction
from ipu_pipeline.backends.ipu.prices.blocks import serialization_factor
from ipu_pipeline.backends.ipu.prices.memory import stash_depth
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search.result import Partition, StageAssignment


def configured_partition(
    graph: BlockGraph, prediction: Prediction, costs: GraphCosts, annotated: Plan | None = None
) -> Partition:
    """Return the split of a predicted configuration; it is its own bound.

    Args:
        graph: The model.
        prediction: Of the configuration.
        costs: Prices of the blocks.
        annotated: Says which blocks recompute and run in slices; ``None``: the configuration.

    Raises:
        PartitionError: An IPU has not enough memory for what the configuration puts on it.
    """
    if not prediction.fits:
        crowded = max(prediction.memory, key=lambda m: m.fullest_tile_bytes(prediction.chip))
        ipu = prediction.memory.index(crowded)
        room = prediction.chip.tile_memory_bytes
        raise PartitionError(
            f"the IPU configuration does not fit: the fullest tile of IPU {ipu} needs "
            f"{crowded.fullest_tile_bytes(prediction.chip) / 1024:.0f} of {room / 1024:.0f} KiB; "
            "move layers to other IPUs in layers_per_ipu, lower the micro batch or "
            "matmul_proportion, serialize the embedding, put the optimizer state off chip, or "
            "leave layers_per_ipu at [-1] and let the solver choose"
        )
    partition = partition_of_prediction(graph, prediction, costs, prediction.time.total_s)
    return partition if annotated is None else _as_annotated(partition, annotated)


def partition_of_prediction(
    graph: BlockGraph, prediction: Prediction, costs: GraphCosts, bound_s: float
) -> Partition:
    """Return a predicted layout as a split.

    Args:
        graph: The model.
        prediction: Seconds and bytes are taken from it.
        costs: Prices of the blocks.
        bound_s: No allowed layout is quicker, in seconds per optimizer step.
    """
    settings, layout = prediction.settings, prediction.layout
    shown: set[int] = set()
    stages = []
    for index, (stage, time) in enumerate(zip(layout.stages, prediction.time.stages, strict=True)):
        again = time.recompute_s > 0
        choices = tuple(
            replace(
                costs.blocks[name].plain,
                recompute=again,
                serialize_factor=serialization_factor(graph, graph[name], settings),
            )
            for name in stage.blocks
        )
        # What an IPU holds is shown once, in its first stage.
        held = 0 if stage.ipu in shown else prediction.memory[stage.ipu].total_bytes
        shown.add(stage.ipu)
        stages.append(
            StageAssignment(
                index=index,
                device=stage.ipu,
                blocks=stage.blocks,
                choices=choices,
                forward_s=time.forward_s,
                backward_s=time.backward_s + time.recompute_s,
                transfer_s=prediction.time.copy_s if len(layout.stages) > 1 else 0.0,
                memory_bytes=held,
                in_flight=stash_depth(len(layout.stages), index),
            )
        )
    return Partition(
        stages=tuple(stages),
        objective=prediction.time.total_s,
        lower_bound=min(bound_s, prediction.time.total_s),
        binding=_binding(prediction, stages),
        schedule="popart",
        num_microbatches=settings.accumulation,
        replicas=settings.replicas,
    )


def _as_annotated(partition: Partition, plan: Plan) -> Partition:
    stages = []
    for stage, wanted in zip(partition.stages, plan.stages, strict=True):
        choices = tuple(
            replace(
                choice,
                recompute=name in wanted.recompute,
                serialize_factor=wanted.serialize.get(name, 1),
            )
            for name, choice in zip(stage.blocks, stage.choices, strict=True)
        )
        stages.append(replace(stage, choices=choices))
    return replace(partition, stages=tuple(stages))


def _binding(prediction: Prediction, stages: list[StageAssignment]) -> str:
    num_ipus = prediction.layout.num_ipus
    loads = [sum(s.load_s for s in stages if s.device == ipu) for ipu in range(num_ipus)]
    busiest = max(range(num_ipus), key=loads.__getitem__)
    fullest = max(memory.fullest_tile_bytes(prediction.chip) for memory in prediction.memory)
    free = 1 - fullest / prediction.chip.tile_memory_bytes
    return (
        f"time: IPU {busiest} paces the pipeline; memory: the fullest tile has {free:.1%} free "
        f"({fullest / 1024:.0f} KiB used)"
    )
