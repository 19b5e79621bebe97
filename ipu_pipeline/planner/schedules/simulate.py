"""Run a plan's schedule on paper: every device, pass, copy and wait with its time.

Two kinds of schedules. In 1F1B, GPipe and interleaved 1F1B a device goes on as soon as its next
pass has its input. PopART's cycles are lock-stepped: all devices start a cycle together.

How it compares with the solver's closed forms (:mod:`ipu_pipeline.planner.search.objective`), with
copies ``charged`` as the solver does:

- PopART, and GPipe with one stage per device: equal, for any stage times. One exception: PopART
  merges consecutive stages on one device, the closed form counts them as two pipeline stages
  (longer fill and flush: up to 13 % too long on 3,000 random pipelines of 2-5 stages).
- 1F1B: equal for balanced stages. Otherwise only the period, the busiest device's load, is
  exact; the form's fill and flush are those of one microbatch that meets nobody, while here a
  microbatch may find a device occupied (longer) or fill gaps of another one (shorter).
- Several stages on one device: the form assumes that a device is never idle in steady state.
- Interleaved 1F1B has no closed form there.

The closed forms let a copy occupy the sender and then the receiver, so a microbatch that fills
the pipeline pays each copy twice. ``copies="exchanged"`` lets both take part at the same time,
as the hardware does: asynchronous steps get shorter by the copies on the critical path; in
PopART all devices wait for the slowest before one common exchange, so steps may get longer
(largest compute plus largest exchange instead of the largest sum).
"""

from __future__ import annotations

from itertools import chain
from typing import Literal

from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.build import build_schedule
from ipu_pipeline.planner.schedules.engines import Passes, asynchronous, lock_stepped
from ipu_pipeline.planner.schedules.grouped import grouped
from ipu_pipeline.planner.schedules.load import (
    closed_form_s,
    is_training,
    once_per_step_s,
    stage_loads,
)
from ipu_pipeline.planner.schedules.placement import one_row_per_device
from ipu_pipeline.planner.schedules.timeline import Event, Timeline

CopyModel = Literal["charged", "exchanged"]


def simulate(
    plan: Plan, schedule: Schedule | str | None = None, *, copies: CopyModel = "charged"
) -> Timeline:
    """Simulate one optimizer step of one replica.

    Args:
        plan: Stages with their predicted seconds and bytes (see ``load.py`` for what is derived).
        schedule: A schedule or its name; ``None``: the plan's. Its number of microbatches may
            differ from the plan's.
        copies: ``charged``: one after the other on the sender and on the receiver, as the solver
            prices them; ``exchanged``: on both at the same time.

    Raises:
        ValueError: The schedule is unknown, is for another number of stages, or cannot run.
        VerifyError: The schedule deadlocks.
    """
    if copies not in ("charged", "exchanged"):
        raise ValueError(f"copies must be 'charged' or 'exchanged', got {copies!r}")
    rows = _resolve(plan, schedule)
    loads = stage_loads(plan)
    exchanged = copies == "exchanged"
    passes = Passes.of(loads, exchanged=exchanged)
    if rows.name == "popart":
        events, passes_s = lock_stepped(rows, passes, exchanged=exchanged)
    else:
        events, passes_s = asynchronous(rows, passes)
    devices = tuple(dict.fromkeys(load.device for load in loads))
    closed = closed_form_s(plan, loads)
    update_s = once_per_step_s(plan, closed)
    by_device = {own[0].device: own for own in events if own}
    for device, own in by_device.items():
        if update_s > 0:
            own.append(Event(device, "update", None, None, passes_s, passes_s + update_s))
    if (rows.name, rows.num_microbatches) != (plan.schedule, plan.num_microbatches):
        closed = None
    return Timeline(
        schedule=rows.name,
        num_microbatches=rows.num_microbatches,
        devices=devices,
        events=tuple(chain.from_iterable(by_device[device] for device in devices)),
        step_s=passes_s + update_s,
        update_s=update_s,
        closed_form_s=None if closed is None else closed + update_s,
        loads=loads,
        limit_bytes=tuple(usable_bytes(plan.machine, device) for device in devices),
        shared_memory=plan.machine.shared_memory,
    )


def usable_bytes(machine: Machine, device: int) -> int:
    """Bytes that stages can use on a device; devices that share a memory can use all of it."""
    chosen = machine.devices if machine.shared_memory else (machine.devices[device],)
    return sum(item.memory_bytes - item.reserved_bytes for item in chosen)


def _resolve(plan: Plan, schedule: Schedule | str | None) -> Schedule:
    """Return the schedule with one row per device, without backward passes in inference.

    Raises:
        ValueError: Unknown, or for another number of stages.
    """
    devices = [stage.device for stage in plan.stages]
    training = is_training(plan)
    if not isinstance(schedule, Schedule):
        name = schedule or plan.schedule
        if name == "popart":
            schedule = grouped(plan.num_stages, plan.num_microbatches, devices, training=training)
        else:
            schedule = build_schedule(name, plan.num_stages, plan.num_microbatches, devices)
    if schedule.num_stages != plan.num_stages:
        raise ValueError(
            f"the schedule is for {schedule.num_stages} stages, the plan has {plan.num_stages}"
        )
    if not training:
        rows = tuple(tuple(a for a in row if a.kind == "F") for row in schedule.rows)
        schedule = Schedule(schedule.name, plan.num_stages, schedule.num_microbatches, rows)
    return one_row_per_device(schedule, devices)
