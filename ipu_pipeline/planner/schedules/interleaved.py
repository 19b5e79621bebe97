"""Interleaved 1F1B: several stages per device, placed in loops, to shorten fill and flush."""

from __future__ import annotations

from collections import Counter

from ipu_pipeline.ir.schedule import Action, ActionKind, Schedule
from ipu_pipeline.planner.schedules.arguments import check_counts


def interleaved(num_stages: int, num_microbatches: int, num_devices: int) -> Schedule:
    """Build the interleaved 1F1B schedule of stages that visit the devices in loops.

    Device ``d`` holds the ``v = num_stages / num_devices`` stages ``d, d + num_devices, ...``.
    For balanced stages the bubble is that of ``num_devices`` stages divided by ``v``; each
    microbatch crosses ``v`` times as many boundaries.

    Microbatches go round in groups of ``num_devices``. Where their number is no multiple of it,
    the groups are larger: ``G // max(1, G // num_devices)`` microbatches, which must divide G.

    Args:
        num_stages: Pipeline depth, a multiple of ``num_devices``.
        num_microbatches: Microbatches per optimizer step, at least 1.
        num_devices: Devices, at least 1.

    Returns:
        One row per device, each with ``2 * v * num_microbatches`` actions.

    Raises:
        ValueError: A count is below 1, the stages do not divide among the devices, or the
            microbatches do not divide into groups.

    Source:
        Narayanan et al., Megatron-LM, SC 2021, section 2.2.2; the larger groups are those of
        ``torch.distributed.pipelining.ScheduleInterleaved1F1B``, whose order this is.
    """
    check_counts(num_stages, num_microbatches)
    if num_devices < 1 or num_stages % num_devices:
        raise ValueError(
            f"interleaved 1F1B puts equally many stages on every device: {num_stages} stages do "
            f"not divide among {num_devices} devices"
        )
    groups = max(1, num_microbatches // num_devices)
    if num_microbatches % groups:
        raise ValueError(
            f"interleaved 1F1B sends microbatches round in {groups} equal groups of at least "
            f"{num_devices}: {num_microbatches} microbatches do not divide; use a multiple of "
            f"{num_devices}"
        )
    group = num_microbatches // groups
    rows = tuple(
        _row(device, num_devices, num_stages // num_devices, num_microbatches, group)
        for device in range(num_devices)
    )
    return Schedule("interleaved", num_stages, num_microbatches, rows)


def _row(
    device: int, num_devices: int, num_loops: int, num_microbatches: int, group: int
) -> tuple[Action, ...]:
    """Order of one device: forwards ahead of the first backward, then in turn, then the rest.

    Forward number k belongs to loop ``k // group``, the backward passes visit the loops in
    the opposite direction; the microbatch is the next one of that stage.
    """
    total = num_loops * num_microbatches
    warmup = min((num_loops - 1) * group + 2 * (num_devices - 1 - device), total)
    seen: Counter[tuple[ActionKind, int]] = Counter()

    def following(kind: ActionKind, number: int) -> Action:
        loop = number // group % num_loops
        loop = loop if kind == "F" else num_loops - 1 - loop
        stage = loop * num_devices + device
        seen[kind, stage] += 1
        return Action(stage, kind, seen[kind, stage] - 1)

    row = [following("F", number) for number in range(warmup)]
    for number in range(total - warmup):
        row.append(following("F", warmup + number))
        row.append(following("B", number))
    row.extend(following("B", number) for number in range(total - warmup, total))
    return tuple(row)
