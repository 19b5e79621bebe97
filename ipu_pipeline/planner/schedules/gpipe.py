"""GPipe: all forward passes, then all backward passes."""

from __future__ import annotations

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.arguments import check_counts


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """Build the GPipe schedule.

    Every stage holds the activations of all microbatches at its peak.

    Args:
        num_stages: Pipeline depth, at least 1.
        num_microbatches: Microbatches per optimizer step, at least 1.

    Returns:
        One row per stage, each with ``2 * num_microbatches`` actions.

    Raises:
        ValueError: Either argument is below 1.

    Source:
        Huang et al., GPipe, NeurIPS 2019, figure 2.
    """
    check_counts(num_stages, num_microbatches)
    microbatches = range(num_microbatches)
    rows = tuple(
        (
            *(Action(stage, "F", microbatch) for microbatch in microbatches),
            *(Action(stage, "B", microbatch) for microbatch in microbatches),
        )
        for stage in range(num_stages)
    )
    return Schedule("gpipe", num_stages, num_microbatches, rows)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Build the schedule of an evaluation step: forward passes only.

    Raises:
        ValueError: Either argument is below 1.
    """
    check_counts(num_stages, num_microbatches)
    rows = tuple(
        tuple(Action(stage, "F", microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    )
    return Schedule("forward", num_stages, num_microbatches, rows)
