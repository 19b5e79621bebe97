"""Graphcore IPUs: searched and priced by the IPU model, run through poptorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from ipu_pipeline.backends.ipu.prices.chip import chip_of, is_ipu
from ipu_pipeline.backends.ipu.prices.layout import layout_of
from ipu_pipeline.backends.ipu.prices.planning import IPUCostModel, ProgramChoices
from ipu_pipeline.backends.ipu.prices.predict import (
    DEFAULT_SETTINGS,
    OF_THE_REQUEST,
    Prediction,
    binding_of,
    configured_partition,
    held_by_stage,
    predict_layout,
    settings_of,
)
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import StageTime
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.layers_per_ipu import WILDCARD
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.tables import table_of
from ipu_pipeline.planner.price import PlanPrice
from ipu_pipeline.planner.schedules.stage_loads import Copies, StageLoad
from ipu_pipeline.planner.search import Constraints, Partition

# Not of the program but of the request: a configuration was given, and with numbers of layers.
_FIXED, _SPELLED_OUT = OF_THE_REQUEST


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
        """Return the program that the configuration describes, as the price reads it."""
        if config is None:
            return {}
        found = replace(
            IPUSettings.from_config(config, replicas=limits.replicas),
            accumulation=limits.num_microbatches if graph.training else 1,
            training=graph.training,
        )
        spelled_out = config.layers_per_ipu != (WILDCARD,) or bool(config.stage_starts)
        return {**found.to_json(), _FIXED: True, _SPELLED_OUT: spelled_out}

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
        settings = _program(work.settings)
        choices = ProgramChoices()
        if work.settings.get(_FIXED):
            choices = ProgramChoices.fixed(settings)
        return IPUCostModel(settings, choices).estimate(work.graph, work.machine)

    def placement(self, work: Workload) -> Partition | None:
        """Return the split that ``layers_per_ipu`` spells out.

        Raises:
            ConfigError: The configuration does not fit the model or the machine.
            PartitionError: It does not fit the memory.
        """
        if not work.settings.get(_SPELLED_OUT):
            return None
        return configured_partition(work.graph, _program(work.settings), work.machine)

    def step(self, plan: Plan) -> PlanPrice:
        """Price every IPU and the cycles of the step as a whole."""
        found = prediction_of(plan)
        time = found.time
        parts = {
            "update": time.optimizer_s,
            "streaming memory": time.streaming_s,
            "all-reduce": time.all_reduce_s,
            "host": time.host_s,
        }
        return PlanPrice(
            stages=_loads(plan, found),
            step_s=time.total_s,
            once_s={name: seconds for name, seconds in parts.items() if seconds},
            recompute=tuple(
                stage.blocks if one.recompute_s > 0 else ()
                for stage, one in zip(plan.stages, _times(plan, found), strict=True)
            ),
            exchange_s=time.copy_s,
            input_s=time.input_s,
            misfits=_misfits(found),
            binding=binding_of(found),
            source="ipu",
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
        PartitionError: A block is to run in slices that do not divide its table, or has none.
    """
    for stage in plan.stages:
        for name, factor in stage.serialize.items():
            table = table_of(plan.graph, plan.graph[name])
            if factor > 1 and (table is None or table.rows % factor):
                rows = "it has no table" if table is None else f"its table has {table.rows} rows"
                raise PartitionError(
                    f"block {name!r} is to run in {factor} slices, but {rows}; choose a factor "
                    "that divides them"
                )
    settings = program_of(plan)
    layout = layout_of([(s.device, s.blocks) for s in plan.stages], settings.num_ipus)
    return predict_layout(plan.graph, layout, settings, chip_of(plan.machine))


def program_of(plan: Plan) -> IPUSettings:
    """Return the program of a plan: what its price reads, and what is emitted."""
    raw = plan.settings if is_ipu(plan.machine) else {}
    return settings_of(plan.graph, plan, _program(raw))


def _program(raw: Mapping[str, Any]) -> IPUSettings:
    fields = {name: value for name, value in raw.items() if name not in OF_THE_REQUEST}
    return IPUSettings.from_json(fields) if fields else DEFAULT_SETTINGS


def _times(plan: Plan, found: Prediction) -> list[StageTime]:
    """Return the seconds of every stage; neighbours on one IPU are one, charged to the first."""
    times, left = [], list(found.time.stages)
    for index, stage in enumerate(plan.stages):
        merged = index > 0 and plan.stages[index - 1].device == stage.device
        times.append(StageTime(stage.device, 0.0, 0.0, 0.0) if merged else left.pop(0))
    return times


def _loads(plan: Plan, found: Prediction) -> tuple[StageLoad, ...]:
    depth, copy_s = len(found.layout.stages), found.time.copy_s
    held = held_by_stage(found, [stage.device for stage in plan.stages])
    loads = []
    for one, (memory, in_flight) in zip(_times(plan, found), held, strict=True):
        stash = memory.stash // in_flight
        loads.append(
            StageLoad(
                device=one.ipu,
                forward_s=one.forward_s,
                backward_s=one.backward_s + one.recompute_s if plan.graph.training else 0.0,
                copies=Copies(copy_s / 2, copy_s / 2) if depth > 1 else Copies(),
                weight_bytes=memory.kept_bytes,
                stash_bytes=stash,
                workspace_bytes=memory.total_bytes - memory.kept_bytes - stash * in_flight,
                in_flight=in_flight,
            )
        )
    return tuple(loads)


def _misfits(found: Prediction) -> tuple[str, ...]:
    return tuple(
        found.tile_text(ipu)
        for ipu, memory in enumerate(found.memory)
        if not memory.fits(found.chip)
    )


BACKEND = IPUBackend()
