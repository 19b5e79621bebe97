"""Which of torch's schedules there are, and what each asks of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ipu_pipeline.errors import LoweringError


@dataclass(frozen=True)
class TorchSchedule:
    """One schedule of ``torch.distributed.pipelining``.

    Attributes:
        torch_name: Name of its class.
        placement: ``one`` stage per rank, several in a ``loop`` over the ranks, or two in a ``v``.
        splits_backward: Gradients of inputs and of weights are computed at different times.
        needs_depth: There must be at least as many microbatches as stages.
        in_rounds: Microbatches must be a multiple of the rounds that they run in.
    """

    torch_name: str
    placement: str
    splits_backward: bool = False
    needs_depth: bool = False
    in_rounds: bool = False


SCHEDULES: Mapping[str, TorchSchedule] = {
    "gpipe": TorchSchedule("ScheduleGPipe", "one"),
    "1f1b": TorchSchedule("Schedule1F1B", "one", needs_depth=True),
    "interleaved": TorchSchedule("ScheduleInterleaved1F1B", "loop", in_rounds=True),
    "looped_bfs": TorchSchedule("ScheduleLoopedBFS", "loop"),
    "interleaved_zero_bubble": TorchSchedule(
        "ScheduleInterleavedZeroBubble", "loop", splits_backward=True, in_rounds=True
    ),
    "zbv": TorchSchedule("ScheduleZBVZeroBubble", "v", splits_backward=True),
    "dualpipev": TorchSchedule("ScheduleDualPipeV", "v", splits_backward=True, needs_depth=True),
}


def torch_schedule(name: str) -> TorchSchedule:
    """Return a schedule by our name or by that of torch's class.

    Raises:
        LoweringError: There is none of this name.
    """
    wanted = _plain(name)
    for key, schedule in SCHEDULES.items():
        if wanted in (_plain(key), _plain(schedule.torch_name)):
            return schedule
    raise LoweringError(
        f"the distributed target has no schedule {name!r}; use one of {', '.join(SCHEDULES)}"
    )


def check_schedule(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> None:
    """Refuse a schedule that cannot run this split.

    Args:
        name: Of the schedule.
        num_stages: Pipeline depth.
        num_ranks: Processes of one pipeline.
        num_microbatches: Microbatches of one pipeline per optimizer step.

    Raises:
        LoweringError: Says which requirement is not met, and what would meet it.
    """
    schedule = torch_schedule(name)
    if schedule.placement == "one" and num_stages != num_ranks:
        several = ", ".join(n for n, s in SCHEDULES.items() if s.placement == "loop")
        raise LoweringError(
            f"schedule {name} runs one stage per process: {num_stages} stages do not fit "
            f"{num_ranks} processes; start {num_stages} processes per replica, or use {several}"
        )
    if schedule.placement == "loop" and num_stages % num_ranks:
        raise LoweringError(
            f"schedule {name} gives every process equally many stages: {num_stages} stages cannot "
            f"be shared by {num_ranks} processes; plan with a multiple of {num_ranks} stages"
        )
    if schedule.placement == "v" and num_stages != 2 * num_ranks:
        raise LoweringError(
            f"schedule {name} runs exactly 2 stages per process: {num_stages} stages do not fit "
            f"{num_ranks} processes; plan with {2 * num_ranks} stages"
        )
    if schedule.needs_depth and num_microbatches < num_stages:
        raise LoweringError(
            f"schedule {name} needs at least as many microbatches as stages, got "
            f"{num_microbatches} microbatches and {num_stages} stages; use more microbatches, or "
            "gpipe"
        )
    rounds = max(1, num_microbatches // num_ranks)
    if schedule.in_rounds and num_microbatches % rounds:
        raise LoweringError(
            f"schedule {name} runs microbatches in {rounds} rounds of {num_ranks} processes, "
            f"{num_microbatches} microbatches do not divide into them; use a multiple of "
            f"{num_ranks}"
        )


# Of every placement, the schedule that runs any number of microbatches.
_ANY_NUMBER = {"one": "gpipe", "loop": "looped_bfs", "v": "zbv"}


def schedule_for(name: str, num_stages: int, num_ranks: int, num_microbatches: int) -> str:
    """Return ``name`` if it can run so many microbatches, else one of its placement that can.

    Args:
        name: Of a schedule that can run the plan's number of microbatches.
        num_stages: Pipeline depth.
        num_ranks: Processes of one pipeline.
        num_microbatches: Of this run, at least 1.
    """
    try:
        check_schedule(name, num_stages, num_ranks, num_microbatches)
    except LoweringError:
        return _ANY_NUMBER[torch_schedule(name).placement]
    return name


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").removeprefix("schedule")
