"""What if: the same model with other devices and numbers of microbatches, split and priced again.

The plan carries its model graph, so every variant is searched by the exact solver and priced as
any plan is. Devices that share cores (``local``) are asked for again at their new number only
through their memory; their speed stays that of the plan's machine.

Constraints that the plan was made with (pinned blocks, layers per IPU) are not stored in it:
variants are free of them. The first row is the plan itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ipu_pipeline.errors import ConfigError, PartitionError
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.price import best_split, make_plan, price, priced, workload_of
from ipu_pipeline.planner.search import Constraints

TIME_LIMIT_S = 2.0  # per variant; the solver proves BERT-large on 16 devices in half a second


@dataclass(frozen=True)
class Variant:
    """One changed setting and what it leads to; without figures where a ``problem`` prevents it.

    Devices and microbatches are those of one replica, ``samples_per_s`` is of all replicas, and
    ``peak_bytes`` are the memory of the fullest stage. ``derivation`` says where they come from.
    """

    name: str
    num_devices: int
    num_microbatches: int
    derivation: str = "split again"
    step_s: float | None = None
    samples_per_s: float | None = None
    peak_bytes: int | None = None
    problem: str = ""


def sensitivity(plan: Plan, num_variants: int | None = None) -> tuple[Variant, ...]:
    """Return the plan itself and its neighbours (at most ``num_variants``), split again."""
    devices = len({stage.device for stage in plan.stages})
    own = Variant("as planned", devices, plan.num_microbatches, "the plan")
    asked = list(variants(plan, devices))[:num_variants]
    return (_filled(own, priced(plan)), *(_solved(plan, variant) for variant in asked))


def variants(plan: Plan, devices: int) -> Iterator[Variant]:
    """Yield what is worth asking: one device more or fewer, more or fewer microbatches."""
    count = plan.num_microbatches
    if devices < len(plan.blocks):
        yield Variant("one more device", devices + 1, count)
    if devices > 1:
        yield Variant("one device fewer", devices - 1, count)
    yield Variant("twice as many microbatches", devices, 2 * count)
    if count > 1:
        yield Variant("half as many microbatches", devices, (count + 1) // 2)


def _solved(plan: Plan, variant: Variant) -> Variant:
    try:
        machine, grown = _machine(plan, variant.num_devices)
        if grown:
            variant = replace(variant, derivation="split again; with one more device like the last")
        made = _split_again(plan, machine, variant)
    except (ConfigError, PartitionError, ValueError) as error:  # also of a count above its limit
        return replace(variant, problem=str(error))
    if made.misfits:
        return replace(variant, problem="; ".join(made.misfits))
    return _filled(variant, made)


def _split_again(plan: Plan, machine: Machine, variant: Variant) -> Plan:
    changed = replace(plan, machine=machine, num_microbatches=variant.num_microbatches)
    limits = Constraints(
        num_stages=variant.num_devices,
        num_microbatches=variant.num_microbatches,
        schedule=plan.schedule,
        replicas=plan.replicas,
        time_limit_s=TIME_LIMIT_S,
        execution_order=plan.schedule == "popart",
        tied=plan.settings.get("tied", "free"),
        update_s=plan.settings.get("update_s", {}),
        vocabulary=None if plan.vocabulary is None else "auto",
    )
    work = replace(workload_of(replace(changed, vocabulary=None)), factors={}, apart=())
    return make_plan(plan.model, work, best_split(work, limits), plan.granularity)


def _filled(variant: Variant, plan: Plan) -> Variant:
    step_s = price(plan).step_s
    return replace(
        variant,
        step_s=step_s,
        samples_per_s=plan.total_batch_size / step_s if step_s > 0 else 0.0,
        peak_bytes=max(stage.memory_bytes for stage in plan.stages),
    )


def _machine(plan: Plan, devices: int) -> tuple[Machine, bool]:
    """Return a machine with enough devices, and whether it grew."""
    machine, wanted = plan.machine, devices * plan.replicas
    have = machine.devices
    if wanted <= len(have):
        return machine, False
    more = tuple(replace(have[-1], name=f"added{i}") for i in range(wanted - len(have)))
    return replace(machine, devices=(*have, *more)), True
