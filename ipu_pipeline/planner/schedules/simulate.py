"""Run a plan's schedule on paper: every device, pass, copy and wait with its time.

Two kinds of schedules. In 1F1B, GPipe and interleaved 1F1B a device goes on as soon as its next
pass has its input. PopART's cycles are lock-stepped: all devices start a cycle together.

The price lets a copy occupy the sender and then the receiver, so a microbatch that fills
the pipeline pays each copy twice. ``copies="exchanged"`` lets both take part at the same time,
as the hardware does: asynchronous steps get shorter by the copies on the critical path; in
PopART all devices wait for the slowest before one common exchange, so steps may get longer
(largest compute plus largest exchange instead of the largest sum).
"""

from __future__ import annotations

from itertools import chain
from typing import Literal

from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.price import price, usable_bytes
from ipu_pipeline.planner.schedules.engines import Passes, asynchronous, lock_stepped
from ipu_pipeline.planner.schedules.placement import plan_rows
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
    rows, found = plan_rows(plan, schedule), price(plan)
    loads = found.stages
    exchanged = copies == "exchanged"
    passes = Passes.of(loads, exchanged=exchanged)
    if rows.name == "popart":
        common = (found.exchange_s, found.input_s) if found.exchange_s or found.input_s else None
        events, passes_s = lock_stepped(rows, passes, exchanged=exchanged, common_s=common)
    else:
        events, passes_s = asynchronous(rows, passes)
    devices = tuple(dict.fromkeys(load.device for load in loads))
    update_s = sum(found.once_s.values())
    step_s = passes_s + update_s
    own = (rows.name, rows.num_microbatches) == (plan.schedule, plan.num_microbatches)
    if own and not exchanged and not isinstance(schedule, Schedule):
        step_s = found.step_s  # the same up to the order in which seconds are added
    by_device = {row[0].device: row for row in events if row}
    for device, row in by_device.items():
        if update_s > 0:
            row.append(Event(device, "update", None, None, passes_s, step_s))
    return Timeline(
        schedule=rows.name,
        num_microbatches=rows.num_microbatches,
        devices=devices,
        events=tuple(chain.from_iterable(by_device[device] for device in devices)),
        step_s=step_s,
        update_s=update_s,
        loads=loads,
        limit_bytes=tuple(usable_bytes(plan.machine, device) for device in devices),
        shared_memory=plan.machine.shared_memory,
    )
