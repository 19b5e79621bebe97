"""Schedules: rows of actions, one row per device. Plain data with a text form (``0F0 1B2``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ipu_pipeline.errors import VerifyError

ActionKind = Literal["F", "B"]
_ACTION = re.compile(r"^(\d+)([FB])(\d+)$")


@dataclass(frozen=True, order=True)
class Action:
    """One stage's forward (F) or backward (B) pass of one microbatch."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the text form ``<stage><F|B><microbatch>``.

        Raises:
            ValueError: ``text`` is not of that form.
        """
        match = _ACTION.match(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no action; write stage, F or B, microbatch: 0F0, 1B2")
        kind: ActionKind = "F" if match[2] == "F" else "B"
        return cls(int(match[1]), kind, int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """What every device does, in order.

    Attributes:
        name: ``gpipe``, ``1f1b``, ...
        num_stages: Pipeline depth.
        num_microbatches: Microbatches per optimizer step.
        rows: One row of actions per device.
    """

    name: str
    num_stages: int
    num_microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    def to_csv(self) -> str:
        """Return one line per device, actions separated by commas."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)

    @classmethod
    def from_csv(cls, name: str, text: str) -> Schedule:
        """Read :meth:`to_csv`'s form; stages and microbatches are counted from the actions."""
        rows = tuple(
            tuple(Action.parse(cell) for cell in line.split(",") if cell.strip())
            for line in text.splitlines()
            if line.strip()
        )
        actions = [action for row in rows for action in row]
        if not actions:
            raise ValueError("a schedule needs at least one action")
        return cls(
            name,
            max(action.stage for action in actions) + 1,
            max(action.microbatch for action in actions) + 1,
            rows,
        )

    def peak_in_flight(self, stage: int) -> int:
        """Most microbatches whose activations ``stage`` holds at one time."""
        peak = current = 0
        for row in self.rows:
            for action in row:
                if action.stage == stage:
                    current += 1 if action.kind == "F" else -1
                    peak = max(peak, current)
        return peak

    def total_order(self) -> tuple[Action, ...]:
        """Return one sequential order that respects every row and every dependency.

        Raises:
            VerifyError: There is none: the schedule would deadlock, or an action is missing.
        """
        return tuple(dry_run(self.rows, self.num_stages))


def dry_run(rows: Sequence[Sequence[Action]], num_stages: int) -> list[Action]:
    """Execute the rows without computing; return the actions in a possible global order.

    Raises:
        VerifyError: No row can go on although actions are left.
    """
    done: set[Action] = set()
    order: list[Action] = []
    positions = [0] * len(rows)
    while any(position < len(row) for position, row in zip(positions, rows, strict=True)):
        moved = False
        for index, row in enumerate(rows):
            while positions[index] < len(row) and (
                requirements(row[positions[index]], num_stages) <= done
            ):
                done.add(row[positions[index]])
                order.append(row[positions[index]])
                positions[index] += 1
                moved = True
        if not moved:
            waiting = [
                f"device {index} at {row[positions[index]]}"
                for index, row in enumerate(rows)
                if positions[index] < len(row)
            ]
            raise VerifyError(f"the schedule deadlocks: {'; '.join(waiting)} cannot start")
    return order


def requirements(action: Action, num_stages: int) -> frozenset[Action]:
    """Return the actions that must be done before ``action`` may start.

    ``F`` of a stage needs ``F`` of the stage before; ``B`` needs its own ``F`` and ``B`` of the
    stage behind.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return frozenset({Action(stage - 1, "F", microbatch)} if stage > 0 else ())
    needed = {Action(stage, "F", microbatch)}
    if stage < num_stages - 1:
        needed.add(Action(stage + 1, "B", microbatch))
    return frozenset(needed)
