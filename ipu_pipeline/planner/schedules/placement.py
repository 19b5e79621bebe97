"""Rows of stages that share a device become one row per device."""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.schedule import Action, Schedule, requirements
from ipu_pipeline.planner.schedules.build import build_schedule
from ipu_pipeline.planner.schedules.grouped import grouped


def one_row_per_device(schedule: Schedule, stage_devices: Sequence[int]) -> Schedule:
    """Merge the rows whose stages are on one device; other rows stay as they are.

    The order inside a merged row is found by running all devices in equal steps: a device takes
    the backward pass of the oldest microbatch that is ready, else the oldest forward pass.

    Args:
        schedule: Rows of stages; all stages of one row must be on one device.
        stage_devices: Device of every stage.

    Returns:
        ``schedule`` itself when no two rows share a device.

    Raises:
        ValueError: The stages of one row are on several devices.
        VerifyError: The rows deadlock.
    """
    owners = [_owner(row, stage_devices) for row in schedule.rows if row]
    if len(set(owners)) == len(schedule.rows):
        return schedule
    waiting: dict[int, list[list[Action]]] = {device: [] for device in owners}
    for device, row in zip(owners, (row for row in schedule.rows if row), strict=True):
        waiting[device].append(list(reversed(row)))
    merged: dict[int, list[Action]] = {device: [] for device in waiting}
    done: set[Action] = set()
    left = sum(map(len, schedule.rows))
    while left:
        step: list[Action] = []
        for device, rows in waiting.items():
            chosen = _best(rows, done, schedule.num_stages)
            if chosen is not None:
                step.append(chosen.pop())
                merged[device].append(step[-1])
        if not step:
            raise VerifyError(f"the schedule deadlocks with {left} actions left")
        done.update(step)
        left -= len(step)
    rows_of_devices = tuple(tuple(row) for row in merged.values())
    return Schedule(schedule.name, schedule.num_stages, schedule.num_microbatches, rows_of_devices)


def plan_rows(plan: Plan, schedule: Schedule | str | None = None) -> Schedule:
    """Return the rows of a plan's schedule, one per device, without backward passes in inference.

    Args:
        plan: The plan.
        schedule: Another schedule, or its name; ``None``: the plan's.

    Raises:
        ValueError: Unknown, or for another number of stages.
    """
    devices = [stage.device for stage in plan.stages]
    training = plan.graph.training
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


def _owner(row: Sequence[Action], stage_devices: Sequence[int]) -> int:
    devices = sorted({stage_devices[action.stage] for action in row})
    if len(devices) > 1:
        raise ValueError(
            f"one row of the schedule holds stages of devices {devices}; build the schedule for "
            "the plan's stage_devices"
        )
    return devices[0]


def _best(rows: Sequence[list[Action]], done: set[Action], num_stages: int) -> list[Action] | None:
    """Return the row whose next action should run now, if any can."""
    ready = [row for row in rows if row and requirements(row[-1], num_stages) <= done]
    return min(ready, key=lambda row: (row[-1].kind, row[-1].microbatch), default=None)
