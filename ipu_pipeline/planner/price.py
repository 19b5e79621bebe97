"""The one price of a plan: every command prints what :func:`price` returns, to the last digit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.codec import to_json
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Granularity, ModelIdentity, Plan, PlannedStage
from ipu_pipeline.ir.text import megabytes
from ipu_pipeline.planner.backend import Workload, backend_of
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.options.cost_models import estimate
from ipu_pipeline.planner.options.tables import unfused_heads
from ipu_pipeline.planner.options.vocabulary import check_vocabulary
from ipu_pipeline.planner.options.vocabulary_shares import with_shares
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind, step_seconds
from ipu_pipeline.planner.schedules.stage_loads import StageLoad
from ipu_pipeline.planner.search import Constraints, Partition
from ipu_pipeline.planner.search.given_split import factors_of, price_stages


@dataclass(frozen=True)
class PlanPrice:
    """What one optimizer step of a plan costs.

    Attributes:
        stages: Seconds and bytes of every stage for one microbatch.
        step_s: Seconds of the whole optimizer step.
        once_s: Parts of it that come once per step, by name: update, all-reduce, host.
        exchange_s: In lock-stepped schedules, seconds of the one exchange of every cycle.
        input_s: The same, of the input of every cycle that starts a microbatch.
        misfits: One sentence for every memory that the plan does not fit in.
        binding: What limits the plan, readable.
        recompute: Blocks of every stage that do recompute, where that saves memory.
        source: Where the prices of the blocks come from.
    """

    stages: tuple[StageLoad, ...]
    step_s: float
    once_s: Mapping[str, float] = field(default_factory=dict)
    exchange_s: float = 0.0
    input_s: float = 0.0
    misfits: tuple[str, ...] = ()
    binding: str = ""
    recompute: tuple[tuple[str, ...], ...] = ()
    source: str = "analytic"


def price(plan: Plan) -> PlanPrice:
    """Return the price of ``plan``, from the plan alone; it need not fit.

    Raises:
        PlanError: Its vocabulary cannot be spread so.
    """
    check_vocabulary(plan)
    return backend_of(plan.machine).step(plan)


def priced(plan: Plan, lower_bound_s: float | None = None) -> Plan:
    """Return ``plan`` with the predictions of its own decisions.

    Args:
        plan: A new plan, or an edited one, which stays marked as edited.
        lower_bound_s: Proven bound of a new plan; ``None``: the plan's own, if it still is one.
    """
    found, new = price(plan), not plan.decision_digest
    bound_s = plan.lower_bound_s if new or plan.keeps_bound else 0.0
    if lower_bound_s is not None:
        bound_s = min(lower_bound_s, found.step_s)
    stages = tuple(
        replace(
            stage,
            recompute=found.recompute[index] if new and found.recompute else stage.recompute,
            forward_s=load.forward_s,
            backward_s=load.backward_s,
            transfer_s=load.copies.forward_s + load.copies.backward_s,
            vocabulary_s=load.softmax_s + load.rows_s,
            memory_bytes=load.memory_bytes,
            in_flight=load.in_flight,
            weight_bytes=load.weight_bytes,
            stash_bytes=load.stash_bytes,
        )
        for index, (stage, load) in enumerate(zip(plan.stages, found.stages, strict=True))
    )
    made = replace(
        plan,
        stages=stages,
        cost_source=found.source,
        objective_s=found.step_s,
        lower_bound_s=bound_s if bound_s <= found.step_s else 0.0,
        binding=found.binding,
        misfits=found.misfits,
    )
    return replace(made, decision_digest=made.digest()) if new else made


def check_runs(plan: Plan) -> None:
    """Refuse an edited plan that its machine cannot run.

    Raises:
        PlanError: The machine's backend does not run the schedule, the schedule does not run these
            stages, or there are not devices enough for the replicas.
    """
    wrong = schedule_problem(plan.machine, plan.schedule)
    if wrong:
        raise PlanError(wrong)
    shape, have = shape_of(plan), len(plan.machine.devices)
    wrong = schedule_kind(plan.schedule).problem(shape)
    needed = shape.num_devices * plan.replicas
    if not wrong and needed > have:
        wrong = (
            f"{count_of(plan.replicas, 'replica')} of {count_of(shape.num_devices, 'device')} need "
            f"{count_of(needed, 'device')}, {plan.machine.name} has {have}; lower replicas"
        )
    if wrong:
        raise PlanError(wrong)


def schedule_problem(machine: Machine, name: str) -> str:
    """Return why the machine's backend does not run a schedule; empty: it does."""
    known = backend_of(machine).schedules
    if name in known:
        return ""
    return f"{machine.name} runs no schedule {name!r}; use one of {', '.join(known)}"


def make_plan(
    model: ModelIdentity,
    work: Workload,
    stages: Sequence[PlannedStage] | Partition,
    granularity: Granularity = "layer",
) -> Plan:
    """Write down stages that were chosen, with their price; a searched split brings its bound."""
    if isinstance(stages, Partition):
        return priced(_unpriced(model, work, stages, granularity), stages.lower_bound)
    # Nothing was left to choose: no other plan is allowed.
    return priced(_unpriced(model, work, stages, granularity), inf)


def step_s(work: Workload, split: Partition) -> float:
    """Return the seconds of a step of a split by its price, infinite where it does not fit."""
    found = price(_unpriced(ModelIdentity(work.graph.model_class, {}), work, split, "layer"))
    return inf if found.misfits else found.step_s


def best_split(work: Workload, limits: Constraints) -> Partition:
    """Return the quickest split that the machine's backend can run.

    Raises:
        PartitionError: There is none.
    """
    return backend_of(work.machine).search(work, limits, any_replicas=False)[0]


def _unpriced(
    model: ModelIdentity,
    work: Workload,
    stages: Sequence[PlannedStage] | Partition,
    granularity: Granularity,
) -> Plan:
    run, settings = (work.num_microbatches, work.replicas), work.settings
    vocabulary = None
    if isinstance(stages, Partition):
        vocabulary = stages.vocabulary
        run = (stages.num_microbatches, stages.replicas)
        settings = stages.settings or settings
        stages = stages.stages
    return Plan(
        model=model,
        machine=work.machine,
        stages=tuple(stages),
        graph=work.graph,
        num_microbatches=run[0],
        replicas=run[1],
        schedule=work.schedule,
        granularity=granularity,
        measured_s=work.measured_s,
        settings=json.loads(json.dumps(to_json(settings))),
        vocabulary=vocabulary,
    )


def workload_of(plan: Plan) -> Workload:
    """Return what a plan runs, with prices asked for its numbers of slices.

    Its shares of the vocabulary are blocks of the graph.
    """
    plan, _ = with_shares(plan)
    factors = factors_of(plan)
    sliced = [name for name, factor in factors.items() if factor > 1]
    return Workload(
        plan.graph,
        plan.machine,
        plan.schedule,
        plan.num_microbatches,
        plan.replicas,
        plan.settings,
        plan.measured_s,
        factors,
        tuple(unfused_heads(plan.graph, plan.stage_of, sliced)),
    )


def counted_costs(work: Workload) -> GraphCosts:
    """Price blocks by a roofline over counted operations, or by what was measured."""
    return estimate(
        work.graph,
        work.machine,
        measured_s=work.measured_s,
        factors={name: (factor,) for name, factor in work.factors.items() if factor > 1},
        unfused=work.apart,
        loss_in_flight=kept_by_last_stage(work),
    )


def kept_by_last_stage(work: Workload) -> int:
    """Return how many microbatches the last stage keeps; of schedules with several: on one."""
    kind, training = schedule_kind(work.schedule), work.graph.training
    depth = 1 if kind.any_devices or not training else kind.stages_per_device[0]
    shape = PipelineShape.of(depth, work.num_microbatches, (0,) * depth, training=training)
    return kind.in_flight(shape)[-1]


def replayed_price(plan: Plan, costs: GraphCosts, *, splits_backward: bool = False) -> PlanPrice:
    """Price a plan by adding up its blocks and replaying its schedule row by row.

    Args:
        plan: The plan.
        costs: Ways to run every block; they must offer what the plan decided.
        splits_backward: Gradients of weights can be computed later than those of inputs, but not in
            stages that recompute or serialize.

    Raises:
        ValueError: The schedule cannot run the plan.
    """
    found = price_stages(plan, costs)
    if splits_backward:
        found = found.halved()
    loads, kind = found.loads, schedule_kind(plan.schedule)
    passes_s = step_seconds(kind, shape_of(plan), [load.price for load in loads])
    by_device: Counter[int] = Counter()
    for load, seconds in zip(loads, found.once_s, strict=True):
        by_device[load.device] += seconds  # type: ignore[assignment]
    once_s = max(by_device.values(), default=0.0)
    return PlanPrice(
        stages=loads,
        step_s=passes_s + once_s,
        once_s={"update, all-reduce": once_s} if once_s else {},
        misfits=memory_misfits(plan.machine, loads, beside_bytes(plan, loads)),
        binding=found.split.binding,
        recompute=tuple(stage.recompute for stage in found.split.stages),
        source=costs.source,
    )


def shape_of(plan: Plan) -> PipelineShape:
    """Return what a plan's schedule is asked to run."""
    devices = [stage.device for stage in plan.stages]
    training, spread = plan.graph.training, spread_stages(plan)
    return PipelineShape.of(
        plan.num_stages, plan.num_microbatches, devices, training=training, spread=spread
    )


def spread_stages(plan: Plan) -> tuple[int, ...]:
    """Return the stages that hold rows of the vocabulary, ascending; none where it is whole."""
    return () if plan.vocabulary is None else tuple(sorted(plan.vocabulary.by_stage))


def beside_bytes(plan: Plan, loads: tuple[StageLoad, ...]) -> int:
    """Bytes that further replicas hold in a memory that all share: all but weights and state."""
    if not plan.machine.shared_memory:
        return 0
    gradients = sum(p.num_bytes for p in plan.graph.parameters if p.trainable)
    one = sum(load.memory_bytes - load.weight_bytes for load in loads)
    return (plan.replicas - 1) * (one + gradients * plan.graph.training)


def memory_misfits(
    machine: Machine, loads: tuple[StageLoad, ...], beside_bytes: int = 0
) -> tuple[str, ...]:
    """Say which devices, or which shared memory, cannot hold their stages.

    ``beside_bytes`` are those of replicas in a shared memory.
    """
    held: dict[int, list[int]] = {}
    for index, load in enumerate(loads):
        held.setdefault(0 if machine.shared_memory else load.device, []).append(index)
    found = []
    for device, indices in held.items():
        needed = beside_bytes + sum(loads[index].memory_bytes for index in indices)
        room = usable_bytes(machine, device)
        if needed > room:
            fullest = max(indices, key=lambda index: loads[index].memory_bytes)
            where = "the shared memory" if machine.shared_memory else machine.devices[device].name
            found.append(
                f"{where} needs {megabytes(needed)} MB of {megabytes(room)} MB; the fullest stage "
                f"is {fullest} with {megabytes(loads[fullest].memory_bytes)} MB"
            )
    return tuple(found)


def usable_bytes(machine: Machine, device: int) -> int:
    """Bytes that stages can use on a device; devices that share a memory can use all of it."""
    chosen = machine.devices if machine.shared_memory else (machine.devices[device],)
    return sum(item.memory_bytes - item.reserved_bytes for item in chosen)
