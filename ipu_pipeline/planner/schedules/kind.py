"""What a schedule is, for everyone who plans, prices, simulates or runs one: one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ipu_pipeline.ir.limits import LIMITS, check_count, count_of
from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.objective import Objective, Path
from ipu_pipeline.planner.schedules.rows import (
    forward_passes,
    one_forward_ahead,
    one_row_per_device,
    with_vocabulary,
)


@dataclass(frozen=True)
class PipelineShape:
    """Stages, microbatches and devices that a schedule is asked about.

    Attributes:
        num_stages: Pipeline depth, at least 1.
        num_microbatches: Microbatches per optimizer step, at least 1.
        devices: Device of every stage.
        training: Whether there are backward passes.
        spread: Stages that hold rows of the vocabulary.
    """

    num_stages: int
    num_microbatches: int
    devices: tuple[int, ...]
    training: bool = True
    spread: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        num_stages: int,
        num_microbatches: int,
        devices: Sequence[int] | None = None,
        *,
        training: bool = True,
        spread: Sequence[int] = (),
    ) -> PipelineShape:
        """Check the numbers; ``devices=None``: a device each.

        Raises:
            ValueError: A count is below 1, or there is not one device per stage.
        """
        counts = {"num_stages": num_stages, "num_microbatches": num_microbatches}
        for name, value in counts.items():
            check_count(name, value)
        given = tuple(range(num_stages)) if devices is None else tuple(devices)
        if len(given) != num_stages:
            raise ValueError(
                f"stage_devices has {len(given)} entries for {count_of(num_stages, 'stage')}; give "
                "one each"
            )
        return cls(num_stages, num_microbatches, given, training, tuple(spread))

    @property
    def num_devices(self) -> int:
        """Devices with a stage."""
        return len(set(self.devices))

    @property
    def own_devices(self) -> bool:
        """Whether no two stages share a device."""
        return self.num_devices == self.num_stages

    @property
    def loops(self) -> int:
        """Stages per device, where all have equally many."""
        return self.num_stages // self.num_devices

    @property
    def positions(self) -> tuple[int, ...]:
        """:attr:`devices`, numbered from 0 in the order of their first stage."""
        numbers = {device: n for n, device in enumerate(dict.fromkeys(self.devices))}
        return tuple(numbers[device] for device in self.devices)


def one_each(num_stages: int, num_devices: int) -> tuple[int, ...] | None:
    """Give every device one stage, in order."""
    return tuple(range(num_stages)) if num_stages == num_devices else None


def in_loops(num_stages: int, num_devices: int) -> tuple[int, ...] | None:
    """Let the stages visit the devices in turn, equally often: 0, 1, 2, 0, 1, 2."""
    if num_stages % num_devices:
        return None
    return tuple(stage % num_devices for stage in range(num_stages))


def in_a_v(num_stages: int, num_devices: int) -> tuple[int, ...] | None:
    """Let the stages go to the last device and back: 0, 1, 2, 2, 1, 0."""
    if num_stages != 2 * num_devices:
        return None
    return (*range(num_devices), *reversed(range(num_devices)))


_PLACES: dict[Callable[[int, int], tuple[int, ...] | None], str] = {
    one_each: "one stage per device",
    in_loops: "equally many stages per device, which they visit in loops",
    in_a_v: "exactly 2 stages per device, which they visit in a V",
}


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule. The functions get a shape that :attr:`place` and :attr:`why_not` accept.

    Attributes:
        name: What users write: ``1f1b``.
        make_rows: Training's rows: one per device in the order of their first stage, or one per
            stage.
        make_objective: The step time as rows and a sum: exact for equal stages (with a split
            backward pass: whose two halves take as long as a forward pass each).
        make_in_flight: Microbatches that every stage keeps in training; ``None``: counted from
            the rows.
        make_paths: Dependency paths of training besides those of :func:`critical_paths`.
        why_not: What a shape lacks, with the remedy; empty: nothing. ``None``: anything goes.
        place: ``(stages, number of devices) -> device of every stage``, or ``None``.
        stages_per_device: Numbers of stages per device to try where none is asked for.
        any_devices: Stages may be on other devices than ``place`` says.
        splits_backward: Rows have I and W instead of B.
        lock_stepped: All devices start every cycle together; the objective is then the time.
        exact_apart: The objective is the exact time of any stages that have a device each.
        period: So many microbatches more repeat the rows' middle once more; ``None`` or 0: there
            is no such number.
        torch_class: Name of its class in ``torch.distributed.pipelining``, if any.
        torch_needs_depth: That class wants as many microbatches as stages.
        summary: One line for help texts.
    """

    name: str
    make_rows: Callable[[PipelineShape], Schedule]
    make_objective: Callable[[PipelineShape], Objective]
    make_in_flight: Callable[[PipelineShape], Sequence[int]] | None = None
    make_paths: Callable[[PipelineShape], Sequence[Path]] | None = None
    why_not: Callable[[PipelineShape], str] | None = None
    place: Callable[[int, int], tuple[int, ...] | None] = one_each
    stages_per_device: tuple[int, ...] = (1,)
    any_devices: bool = False
    splits_backward: bool = False
    lock_stepped: bool = False
    exact_apart: bool = False
    period: Callable[[PipelineShape], int] | None = None
    torch_class: str | None = None
    torch_needs_depth: bool = False
    summary: str = ""

    @property
    def placement(self) -> str:
        """Which stages a device has, as words."""
        return _PLACES.get(self.place, "its own number of stages per device")

    def problem(self, shape: PipelineShape) -> str:
        """Return why the schedule cannot run so, with the remedy; empty: it can."""
        if self.lock_stepped and shape.spread:
            return (
                f"schedule {self.name} runs all devices in lock step, which leaves no place for "
                "the passes of a vocabulary that is spread over stages; use another schedule, or "
                "plan without vocabulary"
            )
        if not self.any_devices:
            expected = self.place(shape.num_stages, shape.num_devices)
            if expected is None:
                return (
                    f"schedule {self.name} runs {self.placement}: "
                    f"{count_of(shape.num_stages, 'stage')} do not fit "
                    f"{count_of(shape.num_devices, 'device')}; change num_stages or the devices"
                )
            if shape.positions != expected:
                order = list(dict.fromkeys(shape.devices))
                return (
                    f"schedule {self.name} puts its stages on devices "
                    f"{[order[number] for number in expected]}, got {list(shape.devices)}; leave "
                    "stage_devices out, or give these"
                )
        return self.why_not(shape) if self.why_not is not None else ""

    def _accept(self, shape: PipelineShape) -> None:
        wrong = self.problem(shape)
        if wrong:
            raise ValueError(wrong)

    def rows(self, shape: PipelineShape) -> Schedule:
        """Return what every device does, one row each; only forward passes in inference.

        Raises:
            ValueError: The schedule cannot run so (:meth:`problem`), or has more passes than can
                be listed.
        """
        self._accept(shape)
        passes = (3 if self.splits_backward else 2) if shape.training else 1
        passes += 2 * bool(shape.spread)
        if passes * shape.num_stages * shape.num_microbatches > LIMITS["actions"]:
            raise ValueError(
                f"{count_of(shape.num_microbatches, 'microbatch')} x "
                f"{count_of(shape.num_stages, 'stage')} are too many for schedule {self.name}: "
                f"{LIMITS['actions']} passes are possible, a microbatch has {passes} in every "
                "stage; use fewer and larger microbatches"
            )
        return _rows(self, shape)

    def objective(self, shape: PipelineShape) -> Objective:
        """Return the step time as rows and a sum, for a search.

        Raises:
            ValueError: The schedule cannot run so (:meth:`problem`).
        """
        self._accept(shape)
        return self.make_objective(shape)

    def in_flight(self, shape: PipelineShape) -> tuple[int, ...]:
        """Return how many microbatches every stage keeps at one time; 1 in inference."""
        if not shape.training:
            return (1,) * shape.num_stages
        if self.make_in_flight is not None:
            count, more = shape.num_microbatches, min(1, len(shape.spread))
            return tuple(min(kept + more, count) for kept in self.make_in_flight(shape))
        self._accept(shape)
        return _counted(self, shape)

    def least_microbatches(self, shape: PipelineShape) -> int:
        """Return the fewest microbatches per step with which the schedule can run ``shape``."""
        shapes = (replace(shape, num_microbatches=n) for n in range(1, 2 * shape.num_stages + 1))
        return next((s.num_microbatches for s in shapes if not self.problem(s)), 1)

    def shortened(self, shape: PipelineShape, least: int) -> PipelineShape:
        """Return ``shape`` with whole periods less, but at least ``least`` microbatches."""
        period = self.period(shape) if self.period is not None else 0
        if period <= 0 or shape.num_microbatches <= least:
            return shape
        periods = (shape.num_microbatches - least) // period
        return replace(shape, num_microbatches=shape.num_microbatches - periods * period)


@lru_cache(maxsize=64)
def _rows(kind: ScheduleKind, shape: PipelineShape) -> Schedule:
    made = kind.make_rows(shape)
    made = one_forward_ahead(made) if shape.spread else made
    rows = one_row_per_device(made if shape.training else forward_passes(made), shape.devices)
    return with_vocabulary(rows, shape.spread)


@lru_cache(maxsize=1024)
def _counted(kind: ScheduleKind, shape: PipelineShape) -> tuple[int, ...]:
    """Count from the rows of as few microbatches as show all of it."""
    return kind.rows(kind.shortened(shape, 4 * shape.num_stages)).peaks_in_flight
