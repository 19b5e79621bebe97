"""Graphcore IPUs: searched and priced by the IPU model, run through poptorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ipu_pipeline.backends.ipu.check import (
    MOST_IPUS,
    NO_BATCH,
    SPREAD_VOCABULARY,
    config_problems,
    devices_problems,
    foreign_problems,
)
from ipu_pipeline.backends.ipu.config.ipu_config import default_accumulation
from ipu_pipeline.backends.ipu.prices.chip import is_ipu
from ipu_pipeline.backends.ipu.prices.planning import IPUPlanning, ProgramChoices
from ipu_pipeline.backends.ipu.prices.predict import (
    OF_THE_REQUEST,
    WHOLE_STAGES,
    configured_partition,
    prediction_of,
    program_from,
    stage_loads,
)
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import spread_graphs
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Backend, Workload
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.tables import LARGE_ROWS
from ipu_pipeline.planner.price import PlanPrice
from ipu_pipeline.planner.search import Constraints, Partition

# A spread table has more stages, and logits that are joined: a small gain is within the error.
WORTH_SPREADING = 0.02
# Not of the program but of the request: a configuration was given, and with numbers of layers.
_FIXED, _SPELLED_OUT = OF_THE_REQUEST
NO_LARGE_TABLE = (
    f"vocabulary='even', and the model has no table of {LARGE_ROWS} rows or more that 2 or 4 IPUs "
    "can share; plan without vocabulary"
)


@dataclass(frozen=True)
class IPUBackend(Backend):
    """Stages are IPUs of a pod."""

    name: str = "ipu"
    target: str = "poptorch"
    schedules: tuple[str, ...] = ("popart",)
    replays_glue: bool = False

    def own_machine(self, num_devices: int | None) -> Machine | None:
        """A pod is described by its name or file."""
        return None

    def prices_machine(self, machine: Machine) -> bool:
        """Whether the devices are IPUs."""
        return is_ipu(machine)

    def settings(self, graph: BlockGraph, config: Any, limits: Constraints) -> Mapping[str, Any]:
        """Return the program that the configuration describes, as the price reads it.

        Raises:
            PartitionError: No plan that is made so could be emitted.
        """
        problems = [*config_problems(graph, config)] if config is not None else []
        if graph.micro_batch_size < 1:
            problems.append(NO_BATCH)
        if problems:
            raise PartitionError("; ".join(problems))
        if config is None:
            return {}
        found = replace(
            IPUSettings.from_config(config, replicas=limits.replicas),
            accumulation=limits.num_microbatches if graph.training else 1,
            training=graph.training,
        )
        spelled_out = not config.leaves_layers_open
        if not spelled_out and len(found.proportions) == 1:  # every IPU's, however many there are
            found = replace(found, proportions=found.proportions * MOST_IPUS)
        return {**found.to_json(), _FIXED: True, _SPELLED_OUT: spelled_out}

    def rules(self, graph: BlockGraph, machine: Machine, limits: Constraints) -> Constraints:
        """IPUs cut the execution order, copy no weight, and recompute whole stages.

        Raises:
            PartitionError: Single blocks are to be recomputed, stages leave out an IPU, or the
                vocabulary is to be spread.
        """
        if limits.vocabulary not in (None, "auto", "even"):
            raise PartitionError(SPREAD_VOCABULARY)
        for problem in devices_problems(limits.stage_devices or (0,)):
            raise PartitionError(problem)
        if isinstance(limits.recompute, tuple):
            raise PartitionError(
                f"recompute names single blocks ({', '.join(limits.recompute)}), but "
                f"{WHOLE_STAGES}; use 'always', 'never' or 'auto'"
            )
        return replace(limits, execution_order=True, tied="same_device")

    def default_microbatches(self, machine: Machine, num_stages: int | None, replicas: int) -> int:
        """Eight, or as many as PopART needs for the stages that were asked for."""
        return default_accumulation(num_stages or 1)

    def check_costs(self, costs: str) -> None:
        """Refuse what this machine measures.

        Raises:
            PartitionError: ``costs`` is not ``analytic``.
        """
        if costs != "analytic":
            raise PartitionError(
                "IPUs are priced by their own model, not by what this machine measured; use "
                "costs='analytic'"
            )

    def costs(self, work: Workload) -> GraphCosts:
        """Price every block by itself."""
        return self._planning(work).costs(work.machine)

    def search(
        self, work: Workload, limits: Constraints, *, any_replicas: bool
    ) -> tuple[Partition, Workload]:
        """Search pipelines and programs: blocks do not add up to stages here.

        With ``vocabulary="auto"`` also those whose tables are spread over IPUs, which are taken
        where nothing else fits, or where they are quicker by :data:`WORTH_SPREADING`; with
        ``"even"`` only those.

        Raises:
            PartitionError: Nothing fits, or no table can be spread.
        """
        limits = self.rules(work.graph, work.machine, limits)
        works = [work] if limits.vocabulary != "even" else []
        if limits.vocabulary:
            works += [replace(work, graph=graph) for graph in spread_graphs(work.graph)]
        if not works:
            raise PartitionError(NO_LARGE_TABLE)
        found: list[tuple[float, Partition, Workload]] = []
        refused: list[PartitionError] = []
        for tried in works:
            try:
                split = self._planning(tried).search(work.machine, limits)
            except PartitionError as error:
                refused.append(error)
            else:
                kept = 1.0 if tried is work else 1.0 + WORTH_SPREADING
                found.append((kept * split.objective, split, tried))
        if not found:
            raise refused[0]
        _, split, tried = min(found, key=lambda item: item[0])
        bound_s = min(split.lower_bound for _, split, _ in found)
        return replace(split, lower_bound=bound_s), tried

    def _planning(self, work: Workload) -> IPUPlanning:
        self.check_costs("profiled" if work.measured_s else "analytic")
        settings, choices = program_from(work.settings), ProgramChoices()
        if work.settings.get(_FIXED):
            choices = ProgramChoices.fixed(settings)
        return IPUPlanning.of(work.graph, work.machine, settings, choices)

    def placement(self, work: Workload) -> tuple[Partition, Workload] | None:
        """Return the split that ``layers_per_ipu`` spells out.

        Raises:
            ConfigError: The configuration does not fit the model or the machine.
            PartitionError: It does not fit the memory, or leaves out an IPU.
        """
        if not work.settings.get(_SPELLED_OUT):
            return None
        settings = program_from(work.settings)
        split, graph = configured_partition(work.graph, settings, work.machine)
        for problem in devices_problems([stage.device for stage in split.stages]):
            raise PartitionError(problem)
        return split, replace(work, graph=graph)

    def step(self, plan: Plan) -> PlanPrice:
        """Price every IPU and the cycles of the step as a whole.

        Raises:
            PartitionError: Slices do not divide a table, single blocks are to be recomputed, the
                vocabulary is spread over stages, or activations are offloaded.
        """
        for problem in foreign_problems(plan):
            raise PartitionError(problem)
        found = prediction_of(plan)
        time, last = found.time, set(found.layout.stages[-1].blocks)
        return PlanPrice(
            stages=stage_loads(found, [stage.device for stage in plan.stages]),
            step_s=time.total_s,
            once_s={name: seconds for name, seconds in time.once_s.items() if seconds},
            recompute=tuple(
                stage.blocks if found.recomputes and last.isdisjoint(stage.blocks) else ()
                for stage in plan.stages
            ),
            exchange_s=time.copy_s,
            input_s=time.input_s,
            misfits=tuple(
                found.tile_text(ipu)
                for ipu, memory in enumerate(found.memory)
                if not memory.fits(found.chip)
            ),
            binding=found.binding,
            source="ipu",
        )

    def lower(self, model: Any, plan: Plan, optimizer: Any, options: Any) -> Any:
        """Return an executable whose worker runs poptorch."""
        from ipu_pipeline.backends.ipu.lower import lower

        return lower(model, plan, optimizer, options)

    def doctor(self) -> tuple[str, str]:
        """Say which Python of an SDK is named, and what is there."""
        from ipu_pipeline.backends.ipu.sdk_python import doctor

        return doctor()


BACKEND = IPUBackend()
