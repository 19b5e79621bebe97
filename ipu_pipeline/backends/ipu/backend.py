"""Graphcore IPUs: priced by the IPU model, run through poptorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from ipu_pipeline.backends.ipu.config.layers import WILDCARD
from ipu_pipeline.backends.ipu.prices.blocks import block_table_rows, serialization_factor
from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION
from ipu_pipeline.backends.ipu.prices.chip import chip_of, is_ipu
from ipu_pipeline.backends.ipu.prices.layout import Layout, Stage, make_layout
from ipu_pipeline.backends.ipu.prices.memory import ipu_memory, stash_depth
from ipu_pipeline.backends.ipu.prices.model import IPUCostModel
from ipu_pipeline.backends.ipu.prices.predict import Prediction, with_notes
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import step_time
from ipu_pipeline.errors import ConfigError, PartitionError, PlanError
from ipu_pipeline.ir.codec import from_json, to_json
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.price import PlanPrice
from ipu_pipeline.planner.schedules.load import Copies, StageLoad
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.planner.search.pipeline_search import StagePricerMaker


@dataclass(frozen=True)
class IPUBackend:
    """Stages are IPUs of a pod (satisfies ``planner.backend.Backend``)."""

    name: str = "ipu"
    target: str = "poptorch"
    schedules: tuple[str, ...] = ("popart",)

    def own_machine(self, num_devices: int | None) -> Machine | None:
        """A pod is described by its name or file."""
        return None

    def prices_machine(self, machine: Machine) -> bool:
        """Whether the devices are IPUs."""
        return is_ipu(machine)

    def settings(self, graph: BlockGraph, config: Any, limits: Constraints) -> Mapping[str, Any]:
        """Return the run that the configuration describes, as the price reads it."""
        found = IPUCostModel().settings
        if config is not None:
            found = IPUSettings.from_config(config, replicas=limits.replicas)
        wanted = replace(
            found,
            replicas=limits.replicas or 1,
            accumulation=limits.num_microbatches if graph.training else 1,
            training=graph.training,
            hoisted=False,
        )
        raw: dict[str, Any] = to_json(wanted)
        return {**raw, "spelled_out": config is not None and config.layers_per_ipu != (WILDCARD,)}

    def rules(self, graph: BlockGraph, machine: Machine, limits: Constraints) -> Constraints:
        """IPUs cut the execution order and copy no weight."""
        return replace(limits, execution_order=True, tied="same_device")

    def default_microbatches(self, machine: Machine, num_stages: int | None, replicas: int) -> int:
        """Eight, or as many as PopART needs for the stages that were asked for."""
        return max(8, 2 * (num_stages or 1) - 1)

    def costs(self, work: Workload) -> GraphCosts:
        """Price every block by itself."""
        if work.measured_s:
            raise PartitionError(
                "IPUs are priced by their own model, not by what this machine measured; use "
                "costs='analytic'"
            )
        model = IPUCostModel(_settings(work.settings))
        factors = tuple(sorted({*model.factors, *work.factors.values()} - {0}))
        return replace(model, factors=factors).estimate(work.graph, work.machine)

    def stage_pricer(self, work: Workload) -> StagePricerMaker | None:
        """The price of a stage is the sum over its blocks."""
        return None

    def placement(self, work: Workload) -> tuple[PlannedStage, ...] | None:
        """Return the stages that ``layers_per_ipu`` spells out.

        Raises:
            ConfigError: The configuration does not fit the model or the machine.
        """
        if not work.settings.get("spelled_out"):
            return None
        settings, graph = _settings(work.settings), work.graph
        needed = settings.num_ipus * work.replicas
        if needed > len(work.machine.devices):
            raise ConfigError(
                f"{work.replicas} replicas of {settings.num_ipus} IPUs need {needed}, "
                f"{work.machine.name} has {len(work.machine.devices)}; lower replication_factor or "
                "choose a larger pod"
            )
        stages = make_layout(graph, settings).stages
        return tuple(
            PlannedStage(
                stage.ipu,
                stage.blocks,
                recompute=stage.blocks if _recomputes(settings, index, len(stages)) else (),
                serialize={
                    name: factor
                    for name in stage.blocks
                    if (factor := serialization_factor(graph, graph[name], settings)) > 1
                },
            )
            for index, stage in enumerate(stages)
        )

    def step(self, plan: Plan) -> PlanPrice:
        """Price every IPU and the cycles of the step as a whole."""
        found = prediction_of(plan)
        time, last = found.time, plan.num_stages - 1
        seen: set[int] = set()
        loads = []
        for index, (stage, one) in enumerate(zip(plan.stages, time.stages, strict=True)):
            # What an IPU holds is counted once, in its first stage.
            held = 0 if stage.device in seen else found.memory[stage.device].total_bytes
            seen.add(stage.device)
            share = time.copy_s / 2 if last else 0.0
            training = plan.graph.training
            loads.append(
                StageLoad(
                    device=stage.device,
                    forward_s=one.forward_s,
                    backward_s=one.backward_s + one.recompute_s if training else 0.0,
                    copies=Copies(share, share) if last else Copies(),
                    weight_bytes=held,
                    stash_bytes=0,
                    workspace_bytes=0,
                    in_flight=stash_depth(plan.num_stages, index),
                )
            )
        parts = {
            "update": time.optimizer_s,
            "streaming memory": time.streaming_s,
            "all-reduce": time.all_reduce_s,
            "host": time.host_s,
        }
        return PlanPrice(
            stages=tuple(loads),
            step_s=time.total_s,
            once_s={name: seconds for name, seconds in parts.items() if seconds},
            exchange_s=time.copy_s,
            input_s=time.input_s,
            misfits=_misfits(found),
            binding=_binding(found),
            source="ipu",
            details=found,
        )

    def lower(self, model: Any, plan: Plan, optimizer: Any, options: Any) -> Any:
        """Return an executable over poptorch."""
        from ipu_pipeline.backends.ipu.lower import lower

        return lower(model, plan, optimizer, options)

    def doctor(self) -> tuple[str, str]:
        """Say whether poptorch is here."""
        if find_spec("poptorch") is None:
            return "unavailable", "poptorch comes with Graphcore's SDK, which is not installed here"
        return "ready", "poptorch is installed"


def prediction_of(plan: Plan) -> Prediction:
    """Return what the IPU model says about a plan's own stages.

    Raises:
        PartitionError: A block is to run in slices and has no large table.
    """
    for stage in plan.stages:
        for name, factor in stage.serialize.items():
            if factor > 1 and not block_table_rows(plan.graph, plan.graph[name]):
                raise PartitionError(
                    f"block {name!r} is to run in {factor} slices, but it has no large table: "
                    "only lookups in and products with a vocabulary's table run in slices"
                )
    chip, graph = chip_of(plan.machine), plan.graph
    stages = tuple(Stage(stage.device, stage.blocks) for stage in plan.stages)
    given = _settings(plan.settings)
    settings = replace(
        given,
        num_ipus=max(given.num_ipus, 1 + max(stage.ipu for stage in stages)),
        replicas=plan.replicas,
        accumulation=plan.num_microbatches if graph.training else 1,
        device_iterations=given.device_iterations if graph.training else plan.num_microbatches,
        embedding_factor=_slices(plan, "embedding"),
        projection_factor=_slices(plan, "head"),
        training=graph.training,
    )
    layout = Layout(stages, settings.num_ipus)
    return with_notes(
        Prediction(
            settings=settings,
            chip=chip,
            layout=layout,
            memory=ipu_memory(graph, layout, settings, chip, DEFAULT_CALIBRATION),
            time=step_time(graph, layout, settings, chip, DEFAULT_CALIBRATION),
            micro_batch=graph.micro_batch_size,
        )
    )


def _settings(raw: Mapping[str, Any]) -> IPUSettings:
    fields = {name: value for name, value in raw.items() if name != "spelled_out"}
    if not fields:
        return replace(IPUCostModel().settings, hoisted=False)
    return from_json(IPUSettings, fields, "the plan's settings", PlanError)


def _recomputes(settings: IPUSettings, index: int, num_stages: int) -> bool:
    return settings.training and settings.recompute and index < num_stages - 1


def _slices(plan: Plan, kind: str) -> int:
    """Return the most slices of any block of ``kind``."""
    wanted = {block.name for block in plan.blocks if block.kind == kind}
    factors = [f for s in plan.stages for name, f in s.serialize.items() if name in wanted]
    return max(factors, default=1)


def _misfits(found: Prediction) -> tuple[str, ...]:
    room = found.chip.tile_memory_bytes
    return tuple(
        f"the fullest tile of IPU {ipu} needs {memory.fullest_tile_bytes(found.chip) / 1024:.0f} "
        f"of {room / 1024:.0f} KiB"
        for ipu, memory in enumerate(found.memory)
        if not memory.fits(found.chip)
    )


def _binding(found: Prediction) -> str:
    loads = [0.0] * found.layout.num_ipus
    for stage in found.time.stages:
        loads[stage.ipu] += stage.forward_s + stage.backward_s + stage.recompute_s
    busiest = max(range(len(loads)), key=loads.__getitem__)
    fullest = max(memory.fullest_tile_bytes(found.chip) for memory in found.memory)
    free = 1 - fullest / found.chip.tile_memory_bytes
    return (
        f"time: IPU {busiest} paces the pipeline; memory: the fullest tile has {free:.1%} free "
        f"({fullest / 1024:.0f} KiB used)"
    )


BACKEND = IPUBackend()
