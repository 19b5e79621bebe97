"""Bubble and memory of every schedule, vocabulary whole or spread: a table in Markdown.

``python -m benchmarks.vocabulary_schedules``. Stages are equal: a forward pass of 1, a backward
pass of 2. The head takes what a stage takes (6 nhV FLOPs beside those of its layers), times the
factor of the column: whole in the last stage, or an even share in every device, two thirds of it
the softmax, one third the gradient of the rows. All by the exact replay; messages take no time.
"""

from __future__ import annotations

from collections.abc import Iterator

from ipu_pipeline.planner.schedules import PipelineShape, StagePrice, schedule_kind, step_seconds

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zbv", "interleaved_zero_bubble", "dualpipev")
FACTORS = (0.5, 1.0, 3.0)
DEVICES, MICROBATCHES = 8, 32


def table() -> str:
    """Return the table."""
    heads = [f"head {factor:g} x" for factor in FACTORS]
    columns = ["schedule", *(f"{head}: {how}" for head in heads for how in ("whole", "spread")),
               "in flight whole", "in flight spread"]  # fmt: skip
    rows = [columns, ["---"] * len(columns), *map(list, map(_row, SCHEDULES))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str) -> Iterator[str]:
    yield name
    for factor in FACTORS:
        yield f"{bubble(name, factor, spread=False):.1%}"
        yield f"{bubble(name, factor, spread=True):.1%}"
    for spread in (False, True):
        yield f"{most_in_flight(name, spread=spread):g}"


def shape_of(name: str, *, spread: bool) -> PipelineShape:
    """Return a pipeline over all devices; a device's last stage holds its rows."""
    kind = schedule_kind(name)
    depth = DEVICES * kind.stages_per_device[0]
    devices = kind.place(depth, DEVICES) or tuple(range(depth))
    holders = {device: stage for stage, device in enumerate(devices)}.values()
    return PipelineShape.of(depth, MICROBATCHES, devices, spread=sorted(holders) if spread else ())


def bubble(name: str, factor: float, *, spread: bool) -> float:
    """Return the share of all device time in which nothing is computed.

    Args:
        name: Of the schedule.
        factor: Time of the head in that of a device's passes.
        spread: Whether its rows are shared out over all devices.
    """
    kind, shape = schedule_kind(name), shape_of(name, spread=spread)
    head = 3 * factor
    prices = []
    for stage in range(shape.num_stages):
        part = 1 / shape.loops
        forward, backward = part, 2 * part
        if not spread and stage == shape.num_stages - 1:
            forward, backward = forward + head / 3, backward + 2 * head / 3
        own = head / DEVICES if stage in shape.spread else 0.0
        prices.append(
            StagePrice(forward, backward, 0.0, 0.0, weights_s=backward / 2,
                       softmax_s=2 * own / 3, rows_s=own / 3)
        )  # fmt: skip
    work = MICROBATCHES * (3 * DEVICES + head)
    return 1 - work / (DEVICES * step_seconds(kind, shape, prices))


def most_in_flight(name: str, *, spread: bool) -> float:
    """Return the microbatches of a whole device's layers that the fullest device keeps."""
    kind, shape = schedule_kind(name), shape_of(name, spread=spread)
    most = 0
    for row in kind.rows(shape).rows:
        now = 0
        for action in row:
            now += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
            most = max(most, now)
    return most / shape.loops


if __name__ == "__main__":
    print(table(), end="")
