"""From a prediction to a split with the program's settings, and from a plan back to its program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ipu_pipeline.backends.ipu.prices.layout import placement_of
from ipu_pipeline.backends.ipu.prices.memory import IPUMemory, stash_depth
from ipu_pipeline.backends.ipu.prices.operations import serialization_factor
from ipu_pipeline.backends.ipu.prices.predict import Prediction, predict
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.search.result import Partition, StageAssignment

# Fields of a plan's settings that say what was asked for, not what the program does.
OF_THE_REQUEST = ("fixed", "spelled_out")
# What a plan without a configuration assumes; all of it is written into the plan.
DEFAULT_SETTINGS = IPUSettings(num_ipus=1, proportions=(0.2,) * 64, sharded=True)


def partition_of(graph: BlockGraph, prediction: Prediction, bound_s: float) -> Partition:
    """Return a prediction as a split.

    Args:
        graph: The model.
        prediction: Seconds and bytes are taken from it.
        bound_s: No allowed layout is quicker, in seconds per optimizer step.
    """
    settings, layout = prediction.settings, prediction.layout
    held = held_by_stage(prediction, [stage.ipu for stage in layout.stages])
    stages = []
    for index, (stage, time) in enumerate(zip(layout.stages, prediction.time.stages, strict=True)):
        again = time.recompute_s > 0
        choices = tuple(
            BlockChoice(
                0.0,
                0.0,
                recompute=again,
                serialize_factor=serialization_factor(graph, graph[name], settings),
            )
            for name in stage.blocks
        )
        memory, in_flight = next(held)
        stages.append(
            StageAssignment(
                index=index,
                device=stage.ipu,
                blocks=stage.blocks,
                choices=choices,
                forward_s=time.forward_s,
                backward_s=time.backward_s + time.recompute_s,
                transfer_s=prediction.time.copy_s if len(layout.stages) > 1 else 0.0,
                memory_bytes=memory.total_bytes,
                in_flight=in_flight,
                weight_bytes=memory.kept_bytes,
                stash_bytes=memory.stash // in_flight,
            )
        )
    total_s = prediction.time.total_s
    return Partition(
        stages=tuple(stages),
        objective=total_s,
        lower_bound=min(bound_s, total_s),
        binding=binding_of(prediction),
        schedule="popart",
        num_microbatches=prediction.num_microbatches,
        replicas=settings.replicas,
        settings=placement_of(graph, layout, settings).to_json(),
    )


def held_by_stage(
    prediction: Prediction, devices: Sequence[int]
) -> Iterator[tuple[IPUMemory, int]]:
    """Yield what every stage's IPU holds, shown in its first stage, and microbatches in flight.

    Args:
        prediction: Of the stages; neighbours on one IPU are one stage of it.
        devices: IPU of every stage.
    """
    seen: set[int] = set()
    depth = len(prediction.layout.stages)
    for index, device in enumerate(devices):
        in_flight = stash_depth(depth, min(index, depth - 1)) if prediction.settings.training else 1
        yield IPUMemory() if device in seen else prediction.memory[device], in_flight
        seen.add(device)


def configured_partition(graph: BlockGraph, settings: IPUSettings, machine: Machine) -> Partition:
    """Return the split that settings spell out; it is its own bound.

    Raises:
        ConfigError: They do not fit the model or the machine.
        PartitionError: An IPU has not enough memory for what they put on it.
    """
    prediction = predict(graph, settings, machine)
    if prediction.fits:
        return partition_of(graph, prediction, prediction.time.total_s)
    ipu = prediction.fullest[1]
    raise PartitionError(
        f"the IPU configuration does not fit: {prediction.tile_text(ipu)}; move layers to other "
        "IPUs in layers_per_ipu, lower the micro batch or matmul_proportion, serialize the "
        "embedding, put the optimizer state off chip, or leave layers_per_ipu at [-1] and let the "
        "solver choose"
    )


def settings_of(graph: BlockGraph, plan: Plan, settings: IPUSettings) -> IPUSettings:
    """Return ``settings`` with what the stages of ``plan`` say: slices, recomputation, IPUs."""
    slices = {
        name: factor
        for stage in plan.stages
        for name, factor in stage.serialize.items()
        if factor > 1
    }
    own = replace(settings, block_slices=None)
    said = {
        block.name: factor
        for block in graph.blocks
        if (factor := serialization_factor(graph, block, own)) > 1
    }
    num_ipus = 1 + max(stage.device for stage in plan.stages)
    if plan.settings:
        num_ipus = max(settings.num_ipus, num_ipus)
    return replace(
        settings,
        num_ipus=num_ipus,
        pipelined=num_ipus > 1,
        proportions=tuple(settings.proportion(ipu) for ipu in range(num_ipus)),
        replicas=plan.replicas,
        sharded=settings.sharded and plan.replicas > 1,
        training=graph.training,
        accumulation=plan.num_microbatches if graph.training else 1,
        device_iterations=settings.device_iterations if graph.training else plan.num_microbatches,
        block_slices=None if slices == said else tuple(sorted(slices.items())),
        recompute=any(stage.recompute for stage in plan.stages),
    )


def binding_of(prediction: Prediction) -> str:
    """Say what limits a pipeline."""
    loads = [0.0] * prediction.layout.num_ipus
    for stage in prediction.time.stages:
        loads[stage.ipu] += stage.forward_s + stage.backward_s + stage.recompute_s
    busiest = max(range(len(loads)), key=loads.__getitem__)
    return (
        f"time: IPU {busiest} paces the pipeline; memory: the fullest tile has "
        f"{prediction.free:.1%} free ({prediction.fullest[0] / 1024:.0f} KiB used); "
        f"{prediction.settings.program_text()}"
    )
