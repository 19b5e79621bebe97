"""What a configuration does: memory by IPU, parts of a step, samples per second, notes.

Then as the planner's split, with the program's settings, and from a plan back to its program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices.chip import chip_of, is_ipu
from ipu_pipeline.backends.ipu.prices.layout import (
    PlacedProgram,
    StageLayout,
    layout_of,
    make_layout,
    placement_of,
)
from ipu_pipeline.backends.ipu.prices.memory import IPUMemory, ipu_memory, stash_depth
from ipu_pipeline.backends.ipu.prices.operations import serialization_factor, slices_problem
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import spread_tables
from ipu_pipeline.backends.ipu.prices.timing import StageTime, StepTime, step_time
from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.ir.text import milliseconds, render_table
from ipu_pipeline.planner.schedules.stage_loads import Copies, StageLoad
from ipu_pipeline.planner.search.result import Partition

WHOLE_STAGES = "PopART recomputes every stage but the last, or none"
# Fields of a plan's settings that say what was asked for, not what the program does.
OF_THE_REQUEST = ("fixed", "spelled_out")
# What a plan without a configuration assumes; all of it is written into the plan.
DEFAULT_SETTINGS = IPUSettings(num_ipus=1, proportions=(0.2,) * 64, sharded=True)


@dataclass(frozen=True)
class Prediction(PlacedProgram):
    """What a placed program is expected to do: THE price of an IPU pipeline, whoever chose it."""

    @cached_property
    def time(self) -> StepTime:
        """Seconds of one optimizer step (in inference: of one call of the device)."""
        return step_time(self)

    @cached_property
    def memory(self) -> tuple[IPUMemory, ...]:
        """Bytes on every IPU of a replica."""
        return ipu_memory(self)

    @property
    def micro_batch(self) -> int:
        """Samples of one microbatch."""
        return self.graph.micro_batch_size

    @property
    def fits(self) -> bool:
        """Whether the fullest tile of every IPU fits."""
        return all(memory.fits(self.chip) for memory in self.memory)

    @property
    def fullest(self) -> tuple[int, int]:
        """Bytes of the fullest tile of all IPUs, and its IPU."""
        sizes = [memory.fullest_tile_bytes(self.chip) for memory in self.memory]
        return max(sizes), sizes.index(max(sizes))

    @property
    def free(self) -> float:
        """Share of a tile's memory that is free on the fullest tile of all IPUs."""
        return 1 - self.fullest[0] / self.chip.tile_memory_bytes

    def tile_text(self, ipu: int) -> str:
        """Say how much the fullest tile of an IPU needs."""
        size = self.memory[ipu].fullest_tile_bytes(self.chip)
        return (
            f"the fullest tile of IPU {ipu} needs {size / 1024:.0f} of "
            f"{self.chip.tile_memory_bytes / 1024:.0f} KiB"
        )

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step (in inference: one call) over all replicas."""
        return self.micro_batch * self.settings.num_microbatches * self.settings.replicas

    @property
    def samples_per_s(self) -> float:
        """Samples per second over all replicas."""
        return self.samples_per_step / self.time.total_s

    @property
    def recomputes(self) -> bool:
        """Whether every stage but the last is recomputed."""
        return self.settings.training and self.settings.recompute and len(self.layout.stages) > 1

    @property
    def binding(self) -> str:
        """What limits the pipeline."""
        loads = [0.0] * self.layout.num_ipus
        for stage in self.time.stages:
            loads[stage.ipu] += stage.forward_s + stage.backward_s + stage.recompute_s
        busiest = max(range(len(loads)), key=loads.__getitem__)
        return (
            f"time: IPU {busiest} paces the pipeline; memory: the fullest tile has "
            f"{self.free:.1%} free ({self.fullest[0] / 1024:.0f} KiB used); "
            f"{self.settings.program_text()}"
        )

    @property
    def refusal(self) -> str:
        """Why PopART refuses it; empty where it does not."""
        settings, num_stages = self.settings, len(self.layout.stages)
        least = 2 * num_stages - 1 if settings.training else num_stages
        if not settings.pipelined or settings.num_microbatches >= least:
            return ""
        name = "gradient_accumulation_steps" if settings.training else "device_iterations"
        return (
            f"PopART refuses this: {num_stages} forward stages need {name} of at least {least}, it "
            f"is {settings.num_microbatches}"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know: refusals of PopART, IPUs that are too full."""
        found = [self.refusal] if self.refusal else []
        for ipu, memory in enumerate(self.memory):
            if not memory.fits(self.chip):
                kinds = vars(memory)
                largest = max(kinds, key=kinds.__getitem__)
                size = memory.fullest_tile_bytes(self.chip)
                found.append(
                    f"IPU {ipu} does not fit: its fullest tile needs {size / 1024:.0f} KiB of "
                    f"{self.chip.tile_memory_bytes / 1024:.0f} KiB; most of it is {largest} "
                    f"({kinds[largest] / 1e6:.0f} MB)"
                )
        return tuple(found)

    def text(self) -> str:
        """Return a report for a terminal."""
        parts = [
            f"{_headline(self)}\n{self.settings.program_text()}",
            _memory_table(self),
            _stage_table(self),
            _step_table(self),
        ]
        if self.notes:
            parts.append("\n".join(f"! {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"


def predict(
    graph: BlockGraph,
    config: IPUConfig | IPUSettings,
    machine: Machine,
) -> Prediction:
    """Predict a published configuration as it is.

    Args:
        graph: The model, captured for one microbatch; its inputs give the micro batch size.
        config: An ``ipu_config.json``, or the same in the model's own terms.
        machine: A pod; its first replica's IPUs are predicted, all replicas counted.

    Raises:
        ConfigError: The configuration does not fit the model or the machine.
        PlanError: The machine has no IPUs.
    """
    chip = chip_of(machine)
    if isinstance(config, IPUSettings):
        settings = replace(config, training=graph.training)
    else:
        settings = IPUSettings.from_config(config, training=graph.training)
    if settings.num_ipus * settings.replicas > len(machine.devices):
        raise ConfigError(
            f"{count_of(settings.replicas, 'replica')} of {count_of(settings.num_ipus, 'IPU')} "
            f"need {settings.num_ipus * settings.replicas}, {machine.name} has "
            f"{len(machine.devices)}; lower replication_factor or choose a larger pod"
        )
    graph = spread_tables(graph, settings)
    chip = chip.without(settings.num_io_tiles)
    return Prediction(graph, make_layout(graph, settings), settings, chip)


def _headline(prediction: Prediction) -> str:
    settings = prediction.settings
    mode = "training" if settings.training else "inference"
    return (
        f"{prediction.samples_per_s:.1f} samples/s in {mode} on {settings.replicas} x "
        f"{settings.num_ipus} {prediction.chip.name} "
        f"({count_of(prediction.samples_per_step, 'sample')} in "
        f"{prediction.time.total_s * 1e3:.1f} ms); {'fits' if prediction.fits else 'DOES NOT FIT'}"
    )


def _memory_table(prediction: Prediction) -> str:
    kinds = [item.name for item in fields(IPUMemory)]
    rows = []
    for ipu, memory in enumerate(prediction.memory):
        share = memory.fullest_tile_bytes(prediction.chip) / prediction.chip.tile_memory_bytes
        sizes = [f"{getattr(memory, kind) / 1e6:.0f}" for kind in kinds]
        rows.append([f"{ipu}", *sizes, f"{memory.total_bytes / 1e6:.0f}", f"{share:.0%}"])
    return render_table(["MB per IPU", *kinds, "total", "fullest tile"], rows)


def _stage_table(prediction: Prediction) -> str:
    rows = []
    stages = zip(prediction.layout.stages, prediction.time.stages, strict=True)
    for position, (stage, time) in enumerate(stages):
        blocks = " .. ".join(dict.fromkeys((stage.blocks[0], stage.blocks[-1])))
        seconds = (time.forward_s, time.backward_s, time.recompute_s)
        rows.append(
            [f"{position}: {blocks}", f"{stage.ipu}", *(f"{value * 1e3:.3f}" for value in seconds)]
        )
    return render_table(["stage", "IPU", "forward ms", "backward ms", "recompute ms"], rows)


def _step_table(prediction: Prediction) -> str:
    time = prediction.time
    fill, main, flush = time.num_cycles
    cycle = (
        f"{main} cycles of {time.cycle_s * 1e3:.3f} ms, of these {time.copy_s * 1e3:.3f} copies "
        f"and {time.input_s * 1e3:.3f} input"
    )
    parts = [
        ("fill", time.fill_s, f"{fill} cycles"),
        ("main", time.main_s, cycle),
        ("flush", time.flush_s, f"{flush} cycles"),
        *((name, seconds, "") for name, seconds in time.once_s.items()),
    ]
    rows = [(name, milliseconds(seconds), note) for name, seconds, note in parts]
    return render_table(["part of a step", "ms", "note"], rows)


def partition_of(prediction: Prediction, bound_s: float) -> Partition:
    """Return a prediction as a split.

    Args:
        prediction: Of the stages.
        bound_s: No allowed layout is quicker, in seconds per optimizer step.
    """
    graph, settings, layout = prediction.graph, prediction.settings, prediction.layout
    loads = stage_loads(prediction, [stage.ipu for stage in layout.stages])
    stages = []
    for index, (stage, load) in enumerate(zip(layout.stages, loads, strict=True)):
        again = prediction.recomputes and index < len(loads) - 1
        factors = {
            name: serialization_factor(graph, graph[name], settings) for name in stage.blocks
        }
        stages.append(
            PlannedStage(
                device=stage.ipu,
                blocks=stage.blocks,
                recompute=stage.blocks if again else (),
                serialize={name: factor for name, factor in factors.items() if factor > 1},
                forward_s=load.forward_s,
                backward_s=load.backward_s,
                transfer_s=load.copies.forward_s,
                memory_bytes=load.memory_bytes,
                in_flight=load.in_flight,
                weight_bytes=load.weight_bytes,
                stash_bytes=load.stash_bytes,
            )
        )
    total_s = prediction.time.total_s
    return Partition(
        stages=tuple(stages),
        objective=total_s,
        lower_bound=min(bound_s, total_s),
        binding=prediction.binding,
        schedule="popart",
        num_microbatches=settings.num_microbatches,
        replicas=settings.replicas,
        settings=placement_of(graph, layout, settings).to_json(),
    )


def stage_loads(prediction: Prediction, devices: Sequence[int]) -> tuple[StageLoad, ...]:
    """Return seconds and bytes of the stages of a plan.

    Neighbours on one IPU are one stage of it, whose seconds the first of them is charged with;
    what an IPU holds is shown in its first stage.

    Args:
        prediction: Of the stages.
        devices: IPU of every stage.
    """
    depth, training = len(prediction.layout.stages), prediction.settings.training
    copy_s = prediction.time.copy_s if depth > 1 else 0.0
    times, loads = iter(prediction.time.stages), list[StageLoad]()
    for index, device in enumerate(devices):
        merged = index > 0 and devices[index - 1] == device
        time = StageTime(device, 0.0, 0.0, 0.0) if merged else next(times)
        memory = IPUMemory() if device in devices[:index] else prediction.memory[device]
        in_flight = stash_depth(depth, min(index, depth - 1)) if training else 1
        stash = memory.stash // in_flight
        loads.append(
            StageLoad(
                device=device,
                forward_s=time.forward_s,
                backward_s=time.backward_s + time.recompute_s,
                copies=Copies(copy_s / 2, copy_s / 2),
                weight_bytes=memory.kept_bytes,
                stash_bytes=stash,
                workspace_bytes=memory.total_bytes - memory.kept_bytes - stash * in_flight,
                in_flight=in_flight,
            )
        )
    return tuple(loads)


def configured_partition(
    graph: BlockGraph, settings: IPUSettings, machine: Machine
) -> tuple[Partition, BlockGraph]:
    """Return the split that settings spell out, its own bound, and its graph: tables are spread.

    Raises:
        ConfigError: They do not fit the model or the machine.
        PartitionError: An IPU has not enough memory for what they put on it, poptorch cannot
            begin the stages so, or there are too few microbatches.
    """
    prediction = predict(graph, settings, machine)
    _check_begins(prediction)
    if prediction.refusal:
        raise PartitionError(f"{prediction.refusal}; raise it, or use fewer IPUs")
    if prediction.fits:
        return partition_of(prediction, prediction.time.total_s), prediction.graph
    ipu = prediction.fullest[1]
    raise PartitionError(
        f"the IPU configuration does not fit: {prediction.tile_text(ipu)}; move layers to other "
        "IPUs in layers_per_ipu, lower the micro batch or matmul_proportion, serialize the "
        "embedding, put the optimizer state off chip, or leave layers_per_ipu at [-1] and let the "
        "solver choose"
    )


def _check_begins(prediction: Prediction) -> None:
    """Refuse stages that poptorch cannot begin: ``BeginBlock`` takes the calls of modules."""
    homes: dict[tuple[str | None, str], int] = {}
    for index, stage in enumerate(prediction.layout.stages):
        blocks = [prediction.graph[name] for name in stage.blocks]
        if index and (blocks[0].module is None or blocks[0].kind == "loss"):
            raise PartitionError(
                f"the IPU configuration begins stage {index} with {blocks[0].name!r}, which is no "
                "module's call; move layers so that it is on the IPU of the block before it"
            )
        for block in blocks:
            for fqn in block.parameters if block.module else ():
                home = homes.setdefault((block.module, fqn), stage.ipu)
                if home != stage.ipu:
                    raise PartitionError(
                        f"the IPU configuration calls module {block.module!r} on IPUs {home} and "
                        f"{stage.ipu}, but its weights are on one; put all its calls onto one IPU"
                    )


def prediction_of(plan: Plan) -> Prediction:
    """Return what the IPU model says about a plan's own stages.

    Raises:
        PartitionError: A block is to run in slices that do not divide its table, or has none; its
            table is on several IPUs; or only some of the blocks that keep something are to be
            recomputed.
    """
    for problem in table_problems(plan):
        raise PartitionError(problem)
    settings = program_of(plan)
    layout = layout_of([(s.device, s.blocks) for s in plan.stages], settings.num_ipus)
    _check_recompute(plan, layout)
    chip = chip_of(plan.machine).without(settings.num_io_tiles)
    return Prediction(plan.graph, layout, settings, chip)


def table_problems(plan: Plan) -> Iterator[str]:
    """Yield why tables cannot be cut, or spread, as the stages of ``plan`` say."""
    for index, stage in enumerate(plan.stages):
        problems = (slices_problem(plan.graph, *item) for item in stage.serialize.items())
        yield from filter(None, problems)
        for name, (first, last) in stage.table_slices.items():
            yield (
                f"stage {index} holds the slices {first} to {last - 1} of the table of {name!r}, "
                "but a variable is on one IPU; leave splits out of serialize_embedding (factor "
                "alone cuts the table on its IPU)"
            )


def _check_recompute(plan: Plan, layout: StageLayout) -> None:
    """Refuse a plan that recomputes single blocks: PopART cannot, so it has no price."""
    chosen = {name for stage in plan.stages for name in stage.recompute}
    plain = [
        name
        for stage in layout.stages[:-1]
        for name in stage.blocks
        if name not in chosen and plan.graph[name].saved_bytes > 0
    ]
    if chosen and plain:
        raise PartitionError(
            f"the plan recomputes {sorted(chosen)[0]!r} and not {plain[0]!r}, but {WHOLE_STAGES}; "
            "use recompute{blocks=all} or recompute{blocks=none}"
        )


def program_of(plan: Plan) -> IPUSettings:
    """Return the program of a plan: what its price reads, and what is emitted.

    Its settings, with what its stages say: slices, recomputation, IPUs.
    """
    graph, raw = plan.graph, plan.settings if is_ipu(plan.machine) else {}
    settings = program_from(raw)
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
    if raw:
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


def program_from(raw: Mapping[str, Any]) -> IPUSettings:
    """Return the program that a plan's settings hold; without any, the default one."""
    said = {name: value for name, value in raw.items() if name not in OF_THE_REQUEST}
    return IPUSettings.from_json(said) if said else DEFAULT_SETTINGS
