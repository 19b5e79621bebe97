"""The flow on one screen: capture, price, split, plan; then lower the plan to a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ipu_pipeline.capture import CapturedModel, capture, model_identity
from ipu_pipeline.capture.leaves import Granularity
from ipu_pipeline.config import IPUConfig
from ipu_pipeline.cost.analytic import AnalyticCostModel
from ipu_pipeline.cost.heads import unfused_heads
from ipu_pipeline.cost.ipu import IPUCostModel, IPUSettings, is_ipu
from ipu_pipeline.cost.model import CostModel, GraphCosts
from ipu_pipeline.cost.profiled import ProfiledCostModel
from ipu_pipeline.cost.tables import table_of
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan, PlannedBlock, PlannedStage, PlannedTable
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.partition import Constraints, Partition, StageAssignment, solve
from ipu_pipeline.partition.annotated import evaluate_plan, factors_of
from ipu_pipeline.partition.objective import in_flight
from ipu_pipeline.passes.manager import PassManager
from ipu_pipeline.profiling import local_machine, profile_blocks
from ipu_pipeline.targets.base import Executable, ExecutionOptions
from ipu_pipeline.targets.registry import lower

DEFAULT_MICROBATCHES = 8


def plan(  # noqa: PLR0913 - the public door: keyword options of one decision
    model: nn.Module,
    example_batch: Mapping[str, Any],
    *,
    machine: str | Machine = "local",
    num_stages: int | None = None,
    microbatches: int | None = None,
    replicas: int = 1,
    schedule: str | None = None,
    costs: str = "analytic",
    granularity: Granularity = "layer",
    config: IPUConfig | None = None,
    constraints: Constraints | None = None,
    passes: str = "",
) -> Plan:
    """Find the fastest split of ``model`` over ``machine``, with a bound on how good it is.

    Args:
        model: In training mode, and returning a loss for ``example_batch``. It may live on the
            ``meta`` device when ``costs`` is ``analytic``.
        example_batch: Keyword arguments of one microbatch (axis 0: micro batch), labels included.
        machine: ``local`` (this machine, measured), a known name such as ``pod16``, a machine
            file, or a description.
        num_stages: Pipeline depth; ``None``: the config's, else the best for the machine.
        microbatches: Microbatches per optimizer step; ``None``: the config's, else 8.
        replicas: Copies of the pipeline.
        schedule: ``1f1b``, ``gpipe``, or ``popart`` (the one that IPUs run); ``None``: that of
            the machine.
        costs: ``analytic`` (counted operations) or ``profiled`` (measured on this machine).
        granularity: How fine the blocks are: ``layer``, ``sublayer`` or ``op``.
        config: An IPU configuration; its ``layers_per_ipu`` is respected to the letter.
        constraints: Further limits; the arguments above replace its fields of the same meaning.
        passes: Passes over the solved plan, such as ``serialize_projection{factor=16},
            recompute{blocks=all}``; the predictions are those of the annotated plan.

    Raises:
        CaptureError: The model cannot be captured.
        PartitionError: No split satisfies the constraints, or what the passes made of it does not
            fit.
        PlanError: A pass cannot be applied.
        ValueError: An argument is out of range.
    """
    manager = PassManager.parse(passes)
    captured = capture(model, example_batch, granularity=granularity)
    depth = _depth(num_stages, config)
    described = _machine(machine, depth)
    limits = replace(
        constraints or _machine_limits(described),
        num_stages=depth,
        num_microbatches=_microbatches(microbatches, config),
        replicas=replicas,
        schedule=schedule or ("popart" if is_ipu(described) else "1f1b"),  # type: ignore[arg-type]
        layers_per_ipu=_layers(captured.graph, config, depth),
    )
    model_of_costs = _cost_model(captured, example_batch, described, costs, config, limits)
    asked = limits.factors(captured.graph.block_index)
    prices = _offering(model_of_costs, asked).estimate(captured.graph, described)
    partition = solve(captured.graph, prices, described, limits)
    made = make_plan(captured, described, prices, partition)
    return _annotated(captured.graph, made, manager, model_of_costs, limits)


def compile(
    model: nn.Module,
    plan: Plan,
    *,
    target: str = "local",
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Executable:
    """Turn a plan into an executable for ``target``.

    Args:
        model: The model that the plan was made for, with its weights.
        plan: From :func:`plan` or ``Plan.load``.
        target: ``local``.
        optimizer: Any ``torch.optim`` optimizer over ``model.parameters()``.
        **options: Fields of :class:`~ipu_pipeline.targets.base.ExecutionOptions`: ``precision``,
            ``loss_scaling``, ``max_grad_norm``, ``seed``, ``schedule``, ``sequential``, ...

    Raises:
        PlanError: The plan was made for another model, or is invalid.
        LoweringError: The target cannot run the plan.
        ValueError: An option is unknown or out of range.
    """
    verify_plan(plan)
    plan.check_model(model_identity(model))
    unknown = sorted(set(options) - set(ExecutionOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(ExecutionOptions.__dataclass_fields__)
        raise ValueError(f"unknown option {', '.join(unknown)}; known options: {known}")
    return lower(target, model, plan, optimizer, ExecutionOptions(**options))


def make_plan(
    captured: CapturedModel, machine: Machine, costs: GraphCosts, partition: Partition
) -> Plan:
    """Write down a solved split as a plan."""
    graph = captured.graph
    made = Plan(
        model=model_identity(captured.model),
        machine=machine,
        stages=tuple(map(_planned_stage, partition.stages)),
        blocks=tuple(_planned_blocks(graph, costs)),
        tensors=tuple(spec for spec in graph.tensors if spec.consumers),
        inputs=graph.inputs,
        num_microbatches=partition.num_microbatches,
        replicas=partition.replicas,
        schedule=partition.schedule,
        granularity=captured.granularity,
        cost_source=costs.source,
        objective_s=partition.objective,
        lower_bound_s=partition.lower_bound,
        binding=partition.binding,
        tied_groups=graph.tied_groups,
    )
    return replace(made, decision_digest=made.digest())


def _annotated(
    graph: BlockGraph, made: Plan, manager: PassManager, costs: CostModel, limits: Constraints
) -> Plan:
    """Run the passes and predict again for what they wrote."""
    if not manager.passes:
        return made
    annotated = manager.run(made)
    factors = factors_of(annotated)
    apart = unfused_heads(graph, annotated.stage_of, [n for n, f in factors.items() if f > 1])
    prices = _offering(costs, factors, apart).estimate(graph, made.machine)
    try:
        partition = evaluate_plan(graph, prices, made.machine, limits, annotated)
    except PartitionError as error:
        raise PartitionError(f"the plan after the passes {manager}: {error}") from error
    stages = tuple(
        replace(_planned_stage(stage), table_slices=before.table_slices)
        for stage, before in zip(partition.stages, annotated.stages, strict=True)
    )
    priced = replace(
        annotated,
        stages=stages,
        objective_s=partition.objective,
        lower_bound_s=min(made.lower_bound_s, partition.objective),
        binding=partition.binding,
    )
    return replace(priced, decision_digest=priced.digest())


def _planned_stage(stage: StageAssignment) -> PlannedStage:
    return PlannedStage(
        device=stage.device,
        blocks=stage.blocks,
        recompute=stage.recomputed,
        serialize=stage.serialized,
        forward_s=stage.forward_s,
        backward_s=stage.backward_s,
        transfer_s=stage.transfer_s,
        memory_bytes=stage.memory_bytes,
        in_flight=stage.in_flight,
        weight_bytes=stage.weight_bytes,
        stash_bytes=stage.stash_bytes,
    )


def _planned_blocks(graph: BlockGraph, costs: GraphCosts) -> list[PlannedBlock]:
    planned = []
    for block in graph.blocks:
        price = costs.blocks[block.name]
        planned.append(
            PlannedBlock(
                name=block.name,
                kind=block.kind,
                num_parameters=sum(graph.parameter_by_fqn[f].numel for f in block.parameters),
                weight_bytes=sum(price.weight_bytes.values()),
                forward_flops=block.forward_flops,
                forward_s=price.plain.forward_s,
                backward_s=price.plain.backward_s,
                stash_bytes=price.plain.stash_bytes,
                table=_planned_table(graph, block),
            )
        )
    return planned


def _planned_table(graph: BlockGraph, block: Block) -> PlannedTable | None:
    table = table_of(graph, block)
    if table is None:
        return None
    return PlannedTable(table.parameter, table.rows, table.width, table.use, table.is_large)


def _depth(num_stages: int | None, config: IPUConfig | None) -> int | None:
    if config is None or (config.ipus_per_replica is None and len(config.layers_per_ipu) == 1):
        return num_stages
    depth = config.num_ipus()
    if num_stages not in (None, depth):
        raise ValueError(
            f"num_stages is {num_stages}, but the IPU configuration has {depth} IPUs in a replica; "
            "leave num_stages out, or change layers_per_ipu and ipus_per_replica"
        )
    return depth


def _machine(machine: str | Machine, depth: int | None) -> Machine:
    if isinstance(machine, Machine):
        return machine
    if machine == "local":
        return local_machine(depth or max(1, torch.get_num_threads()))
    return machine_by_name(machine)


def _machine_limits(machine: Machine) -> Constraints:
    """Return what the machine insists on: IPUs cut the execution order and copy no weight."""
    if is_ipu(machine):
        return Constraints(execution_order=True, tied="same_device")
    return Constraints()


def _cost_model(
    captured: CapturedModel,
    batch: Mapping[str, Any],
    machine: Machine,
    costs: str,
    config: IPUConfig | None,
    limits: Constraints,
) -> CostModel:
    replicas = limits.replicas or 1
    if costs == "analytic" and is_ipu(machine):
        return _ipu_model(config, replicas)
    microbatches = (limits.total_microbatches or limits.num_microbatches * replicas) // replicas
    last = in_flight(limits.schedule, 1, microbatches)
    if costs == "analytic":
        return AnalyticCostModel(loss_in_flight=last)
    if costs == "profiled":
        times = profile_blocks(captured, batch, num_devices=len(machine.devices))
        return ProfiledCostModel(times, loss_in_flight=last)
    raise ValueError(f"costs {costs!r} is unknown; use 'analytic' or 'profiled'")


def _offering(
    costs: CostModel, factors: Mapping[str, int], unfused: tuple[str, ...] = ()
) -> CostModel:
    """Let the menus of some blocks have so many slices, too."""
    if isinstance(costs, IPUCostModel):
        return replace(costs, factors=tuple(sorted({*costs.factors, *factors.values()})))
    if isinstance(costs, AnalyticCostModel | ProfiledCostModel):
        sliced = {name: (factor,) for name, factor in factors.items() if factor > 1}
        return replace(costs, factors=sliced, unfused=unfused)
    return costs


def _ipu_model(config: IPUConfig | None, replicas: int) -> IPUCostModel:
    """Price IPUs as the configuration says: memory proportion, optimizer's place, precision."""
    if config is None:
        return IPUCostModel()
    return IPUCostModel(IPUSettings.from_config(config, replicas=replicas))


def _microbatches(microbatches: int | None, config: IPUConfig | None) -> int:
    if microbatches is not None:
        return microbatches
    return config.gradient_accumulation_steps if config is not None else DEFAULT_MICROBATCHES


def _layers(
    graph: BlockGraph, config: IPUConfig | None, depth: int | None
) -> tuple[int, ...] | None:
    """Return the layers of each IPU that the configuration asks for; ``None``: no wish."""
    if config is None or depth is None or config.layers_per_ipu == (-1,):
        return None
    num_layers = sum(block.kind == "layer" for block in graph.blocks)
    return config.resolve_layers(num_layers)
