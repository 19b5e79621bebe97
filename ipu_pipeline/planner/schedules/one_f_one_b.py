"""1F1B: a warm-up, then one forward and one backward in turn, then a cool-down."""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.arguments import check_counts


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Build the non-interleaved 1F1B schedule.

    Stage ``s`` keeps at most ``num_stages - s`` microbatches in flight, so its peak activation
    memory does not grow with ``num_microbatches``. Fewer microbatches than stages are fine.

    Args:
        num_stages: Pipeline depth, at least 1.
        num_microbatches: Microbatches per optimizer step, at least 1.

    Returns:
        One row per stage, each with ``2 * num_microbatches`` actions.

    Raises:
        ValueError: Either argument is below 1.

    Source:
        Narayanan et al., PipeDream, SOSP 2019, section 3.2.
    """
    check_counts(num_stages, num_microbatches)
    rows = tuple(_row(stage, num_stages, num_microbatches) for stage in range(num_stages))
    return Schedule("1f1b", num_stages, num_microbatches, rows)


def _row(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    warmup = min(num_stages - 1 - stage, num_microbatches)
    row = [Action(stage, "F", microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches - warmup):
        row.append(Action(stage, "F", warmup + microbatch))
        row.append(Action(stage, "B", microbatch))
    row.extend(
        Action(stage, "B", microbatch)
        for microbatch in range(num_microbatches - warmup, num_microbatches)
    )
    return tuple(row)
