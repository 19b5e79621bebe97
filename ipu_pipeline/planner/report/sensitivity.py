"""What if: the same model with other devices, micro batches and numbers of microbatches.

A plan holds the price of every block and the tensors between blocks, so every variant is split
again by the exact solver. What the plan does not hold is derived, and the variant says so:

- Another micro batch size scales times and activations of a block in proportion (fixed costs of
  an operation are not known, so a smaller micro batch looks too good, a larger one too bad).
- Devices that share cores (``local``) get slower or faster in proportion to their number.
- Serialized blocks stay serialized (``as_run.py``).
- A block's workspace is that of its stage; parameters tied between blocks count for each.
- The seconds once per optimizer step (update, all-reduce) are those of the plan.

Constraints that the plan was made with (pinned blocks, layers per IPU) are not stored in it:
variants are free of them. Compare them with the first one, the plan's own setting split again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan, PlannedBlock
from ipu_pipeline.planner.options.block_cost import BlockCost, GraphCosts
from ipu_pipeline.planner.options.block_options import block_choices
from ipu_pipeline.planner.options.cost_models import device_speeds
from ipu_pipeline.planner.report.as_run import as_run
from ipu_pipeline.planner.schedules.load import is_training
from ipu_pipeline.planner.schedules.timeline import Timeline
from ipu_pipeline.planner.search import Constraints, solve
from ipu_pipeline.planner.search.objective import SCHEDULES

TIME_LIMIT_S = 2.0  # per variant; the solver proves BERT-large on 16 devices in half a second


@dataclass(frozen=True)
class Variant:
    """One changed setting and what it leads to.

    Attributes:
        name: What was changed.
        num_devices: Devices of one replica.
        micro_batch_size: Samples of a microbatch.
        num_microbatches: Microbatches per optimizer step and replica.
        derivation: How the numbers were obtained.
        step_s: Predicted seconds per optimizer step; ``None`` when it cannot run.
        samples_per_s: Predicted throughput of all replicas; ``None`` likewise.
        peak_bytes: Memory of the fullest device; ``None`` likewise.
        problem: Why it cannot run; empty when it can.
    """

    name: str
    num_devices: int
    micro_batch_size: int
    num_microbatches: int
    derivation: str
    step_s: float | None = None
    samples_per_s: float | None = None
    peak_bytes: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Setting:
    """What a variant asks for.

    Attributes:
        name: What was changed.
        devices: Devices of one replica.
        batch_factor: New micro batch size over the plan's.
        num_microbatches: Microbatches per optimizer step and replica.
    """

    name: str
    devices: int
    batch_factor: float
    num_microbatches: int


def sensitivity(plan: Plan, timeline: Timeline) -> tuple[Variant, ...]:
    """Return the plan's own setting and its neighbours, each split again.

    Args:
        plan: The plan.
        timeline: Its simulation, for the workspace of the stages and the update.

    Returns:
        Nothing for a plan whose schedule the solver does not know.
    """
    if plan.schedule not in SCHEDULES:
        return ()
    plan = as_run(plan)
    return tuple(_solved(plan, timeline, setting) for setting in settings(plan))


def settings(plan: Plan) -> Iterator[Setting]:
    """Yield what is worth asking: one device more or fewer, other micro batches, other counts."""
    devices = len({stage.device for stage in plan.stages})
    count, size = plan.num_microbatches, plan.micro_batch_size
    yield Setting("as planned", devices, 1, count)
    if devices < len(plan.blocks):
        yield Setting("one more device", devices + 1, 1, count)
    if devices > 1:
        yield Setting("one device fewer", devices - 1, 1, count)
    if size and size % 2 == 0:
        yield Setting("half the micro batch, same batch", devices, 0.5, 2 * count)
    if size and count % 2 == 0:
        yield Setting("twice the micro batch, same batch", devices, 2, count // 2)
    yield Setting("twice as many microbatches", devices, 1, 2 * count)
    if count > 1:
        yield Setting("half as many microbatches", devices, 1, (count + 1) // 2)


def _solved(plan: Plan, timeline: Timeline, setting: Setting) -> Variant:
    machine, slower, grown = _machine(plan, setting.devices)
    factor = setting.batch_factor
    variant = Variant(
        setting.name,
        setting.devices,
        round(plan.micro_batch_size * factor),
        setting.num_microbatches,
        _derivation(factor, slower, grown=grown),
    )
    graph = _graph(plan, timeline, factor)
    costs = _costs(plan, graph, machine, factor * slower)
    limits = Constraints(
        num_stages=setting.devices,
        num_microbatches=setting.num_microbatches,
        schedule=next(name for name in SCHEDULES if name == plan.schedule),
        execution_order=plan.schedule == "popart",
        replicas=plan.replicas,
        time_limit_s=TIME_LIMIT_S,
    )
    try:
        found = solve(graph, costs, machine, limits)
    except PartitionError as error:
        return replace(variant, problem=str(error))
    step_s = found.objective + timeline.update_s
    samples = variant.micro_batch_size * setting.num_microbatches * plan.replicas
    return replace(
        variant,
        step_s=step_s,
        samples_per_s=samples / step_s if step_s > 0 else 0.0,
        peak_bytes=max(stage.memory_bytes for stage in found.stages),
    )


def _derivation(factor: float, slower: float, *, grown: bool) -> str:
    scaled = []
    if factor != 1:
        scaled.append(f"times and activations x {factor:g}")
    if slower != 1:
        scaled.append(f"times x {slower:.3g}: the same cores for another number of devices")
    if grown:
        scaled.append("with a device like the last one added to the machine")
    return "; ".join(["split again", *scaled])


def _machine(plan: Plan, devices: int) -> tuple[Machine, float, bool]:
    """Return a machine with enough devices, how much slower they are, and whether it grew."""
    machine, wanted = plan.machine, devices * plan.replicas
    have = machine.devices
    if machine.shared_memory:
        total = sum(device.memory_bytes for device in have)
        shared = tuple(
            replace(have[0], name=f"d{i}", memory_bytes=total // wanted) for i in range(wanted)
        )
        return replace(machine, devices=shared), wanted / len(have), False
    if wanted <= len(have):
        return machine, 1.0, False
    more = tuple(replace(have[-1], name=f"added{i}") for i in range(wanted - len(have)))
    return replace(machine, devices=(*have, *more)), 1.0, True


def _graph(plan: Plan, timeline: Timeline, factor: float) -> BlockGraph:
    """Rebuild the block graph for a micro batch of ``factor`` times the size."""
    recomputed = {name for stage in plan.stages for name in stage.recompute}
    space: dict[str, int] = {}
    for stage, load in zip(plan.stages, timeline.loads, strict=True):
        saved = max((b.stash_bytes for b in plan.blocks
                     if b.name in stage.blocks and b.name in recomputed), default=0)  # fmt: skip
        space |= dict.fromkeys(stage.blocks, max(0, load.workspace_bytes - saved))

    def block(planned: PlannedBlock) -> Block:
        return Block(
            name=planned.name,
            kind=planned.kind,  # type: ignore[arg-type] # a plan's kinds are a graph's kinds
            inputs=tuple(t.name for t in plan.tensors if planned.name in t.consumers),
            outputs=tuple(t.name for t in plan.tensors if t.producer == planned.name),
            saved_bytes=round(planned.stash_bytes * factor),
            workspace_bytes=round(space[planned.name] * factor),
        )

    return BlockGraph(
        model_class=plan.model.model_class,
        blocks=tuple(map(block, plan.blocks)),
        tensors=tuple(_scaled(spec, factor) for spec in plan.tensors),
        inputs=tuple(_scaled(spec, factor) for spec in plan.inputs),
        training=is_training(plan),
    )


def _scaled(spec: TensorSpec, factor: float) -> TensorSpec:
    """Scale axis 0; of a tensor without the micro batch on it, that scales the bytes as well."""
    if not spec.shape or factor == 1:
        return spec
    return replace(spec, shape=(max(1, round(spec.shape[0] * factor)), *spec.shape[1:]))


def _costs(plan: Plan, graph: BlockGraph, machine: Machine, factor: float) -> GraphCosts:
    blocks = {
        planned.name: BlockCost(
            block_choices(graph, block, planned.forward_s * factor, planned.backward_s * factor),
            {planned.name: planned.weight_bytes},
        )
        for planned, block in zip(plan.blocks, graph.blocks, strict=True)
    }
    return GraphCosts(
        blocks,
        plan.cost_source,
        device_speeds(machine),
        frees_in_order=plan.cost_source in ("analytic", "profiled"),
    )
