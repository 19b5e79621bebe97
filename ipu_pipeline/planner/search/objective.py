"""What a split costs per optimizer step, under each schedule.

Every schedule here is a flushed pipeline whose step time has one form. A *row* q gives each
stage s two 0/1 numbers; a device's load in the row adds up over its stages, and the row costs
its weight times the load of the busiest device::

    step = sum_q weight_q * max_device sum_(s on device) (forward_q[s] f_s + backward_q[s] b_s)
           + sum_weight * sum_s (f_s + b_s)
           + max_device sum_(s on device) outer_s

f_s and b_s are the seconds for which one microbatch occupies the stage's device, transfers over
its boundaries included; outer_s is the optimizer update and gradient all-reduce per step.

``maxload``
    One row of weight 1: seconds per microbatch in steady state.
``1f1b``
    (G-1) * max_s (f_s+b_s) + sum_s (f_s+b_s): the busiest stage paces G-1 microbatches, one
    microbatch runs through all stages to fill and flush. Narayanan et al., PipeDream (SOSP
    2019), section 3.2, and Megatron-LM (SC 2021), section 2.2, which gives the balanced case
    (G+F-1)(f+b). The period max_s(f_s+b_s) is exact for 1F1B; fill and flush are modelled: on
    random stage times the simulated makespan was between 0.76 and 1.28 of this formula, for
    stages within 10 % of each other within 8 % (30,000 and 20,000 samples, 1-6 stages).
``gpipe``
    (G-1) (max f + max b) + sum (f+b): all forwards, then all backwards. Huang et al., GPipe
    (NeurIPS 2019), section 2.3.
``popart``
    T_fill + (G-S+1) T_main + T_flush with S = 2F-1 training stages (F in inference), cycle by
    cycle; PopART's implicit pipelining (popart ``transforms/pipeline.cpp``, PipelineInfo;
    ``popx/popprograms.cpp``, addPipelineCycle), as derived in ``shared/POPART_PIPELINE.md``.
    The one inter-IPU copy of a cycle is charged to the stages that send and receive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ipu_pipeline.planner.search.stage_price import StagePrice

ScheduleName = Literal["1f1b", "gpipe", "popart", "maxload"]
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "gpipe", "popart", "maxload")


@dataclass(frozen=True)
class PacedTerm:
    """One ``weight * busiest device`` term.

    Attributes:
        weight: How often it is paid.
        forward: 1 for every stage whose forward pass it counts.
        backward: 1 for every stage whose backward pass it counts.
    """

    weight: int
    forward: tuple[int, ...]
    backward: tuple[int, ...]

    def load_s(self, stage: int, price: StagePrice) -> float:
        """Seconds that ``stage`` at ``price`` adds to its device in this row."""
        return (
            self.forward[stage] * price.forward_load_s
            + self.backward[stage] * price.backward_load_s
        )


@dataclass(frozen=True)
class Objective:
    """Seconds per optimizer step as rows and a sum (module docstring).

    Attributes:
        rows: Terms paced by the busiest device.
        sum_weight: Factor of the sum over all stages.
        num_stages: Stages it is made for.
    """

    rows: tuple[PacedTerm, ...]
    sum_weight: int
    num_stages: int

    @property
    def splits_passes(self) -> bool:
        """Whether forward and backward are weighted differently somewhere."""
        return any(row.forward != row.backward for row in self.rows)

    def seconds(self, devices: Sequence[int], prices: Sequence[StagePrice]) -> float:
        """Return the step time of stages with ``prices`` on ``devices``."""
        total = self.sum_weight * sum(price.load_s for price in prices)
        for row in self.rows:
            loads: Counter[int] = Counter()
            for stage, (device, price) in enumerate(zip(devices, prices, strict=True)):
                loads[device] += row.load_s(stage, price)  # type: ignore[assignment]
            total += row.weight * max(loads.values())
        outer: Counter[int] = Counter()
        for device, price in zip(devices, prices, strict=True):
            outer[device] += price.outer_s  # type: ignore[assignment]
        return total + max(outer.values(), default=0.0)


def make_objective(
    schedule: ScheduleName, num_stages: int, num_microbatches: int, *, training: bool = True
) -> Objective:
    """Build the step time of ``schedule`` (formulas in the module docstring).

    Args:
        schedule: One of ``SCHEDULES``.
        num_stages: Stages of the forward pass, at least 1.
        num_microbatches: Microbatches per optimizer step and replica, at least 1.
        training: Whether there is a backward pass (PopART then has 2F-1 stages).

    Raises:
        ValueError: PopART cannot fill the pipeline with so few microbatches.
    """
    ones = (1,) * num_stages
    zeros = (0,) * num_stages
    if schedule == "maxload":
        return Objective((PacedTerm(1, ones, ones),), 0, num_stages)
    if schedule == "1f1b":
        return Objective((PacedTerm(num_microbatches - 1, ones, ones),), 1, num_stages)
    if schedule == "gpipe":
        repeats = num_microbatches - 1
        return Objective(
            (PacedTerm(repeats, ones, zeros), PacedTerm(repeats, zeros, ones)), 1, num_stages
        )
    return _popart(num_stages, num_microbatches, training=training)


def least_microbatches(schedule: ScheduleName, num_stages: int, *, training: bool = True) -> int:
    """Return the fewest microbatches per step that ``schedule`` accepts (PopART: its stages)."""
    if schedule != "popart":
        return 1
    return 2 * num_stages - 1 if training else num_stages


def in_flight(
    schedule: ScheduleName, stages_to_end: int, num_microbatches: int, *, training: bool = True
) -> int:
    """Return how many microbatches a stage keeps; ``stages_to_end`` counts the stage itself.

    1F1B keeps one per stage from here to the end, PopART 2(F-1-i)+1 (pipeline.cpp,
    getStashSize), GPipe all of them, inference one.
    """
    if not training or schedule == "maxload":
        return 1
    if schedule == "gpipe":
        return num_microbatches
    depth = stages_to_end if schedule == "1f1b" else 2 * stages_to_end - 1
    return min(depth, num_microbatches)


def _popart(num_stages: int, num_microbatches: int, *, training: bool) -> Objective:
    total = least_microbatches("popart", num_stages, training=training)
    if num_microbatches < total:
        raise ValueError(
            f"PopART runs {num_stages} stages as {total} pipeline stages and needs at least "
            f"{total} microbatches per step, got {num_microbatches}"
        )
    terms: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for cycle in range(total - 1):
        terms[_active(num_stages, total, 0, cycle, training=training)] += 1
        terms[_active(num_stages, total, cycle + 1, total - 1, training=training)] += 1
    terms[_active(num_stages, total, 0, total - 1, training=training)] += (
        num_microbatches - total + 1
    )
    rows = tuple(
        PacedTerm(weight, forward, backward) for (forward, backward), weight in terms.items()
    )
    return Objective(rows, 0, num_stages)


def _active(
    num_stages: int, total: int, first: int, last: int, *, training: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which passes are busy when pipeline stages ``first`` to ``last`` are.

    The last forward stage holds its own backward pass; that of stage i is stage 2(F-1)-i.
    """
    forward = tuple(int(first <= stage <= last) for stage in range(num_stages))
    backward = tuple(
        int(training and first <= total - 1 - stage <= last) for stage in range(num_stages)
    )
    return forward, backward if training else forward
