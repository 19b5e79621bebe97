"""Rows of actions: written pass by pass, or limited to forward passes."""

from __future__ import annotations

from collections import Counter, deque

from ipu_pipeline.ir.schedule import Action, ActionKind, Schedule


class RowWriter:
    """Writes the row of one device; every pass of a stage takes its next microbatch."""

    def __init__(self) -> None:
        self.row: list[Action] = []
        self._next: Counter[tuple[int, str]] = Counter()
        self._pending: deque[Action] = deque()

    def add(self, stage: int, kind: ActionKind) -> Action:
        """Add a pass: I leaves a W pending, B is both."""
        counter = (stage, "B" if kind == "I" else kind)
        action = Action(stage, kind, self._next[counter])
        self._next[counter] += 1
        self.row.append(action)
        if kind == "I":
            self._pending.append(Action(stage, "W", action.microbatch))
        return action

    def weights(self, stage: int | None = None) -> bool:
        """Add the oldest pending W (of ``stage``); return whether there was one."""
        for action in self._pending:
            if stage in (None, action.stage):
                self._pending.remove(action)
                self.row.append(action)
                return True
        return False

    def count(self, stage: int, kind: ActionKind) -> int:
        """Return how many such passes the row has."""
        return self._next[stage, kind]


def forward_passes(schedule: Schedule) -> Schedule:
    """Return the rows of inference: the same order without backward passes."""
    rows = tuple(tuple(a for a in row if a.kind == "F") for row in schedule.rows)
    return Schedule(schedule.name, schedule.num_stages, schedule.num_microbatches, rows)


def forward_only(num_stages: int, num_microbatches: int) -> Schedule:
    """Return the rows of an evaluation step, one per stage: forward passes in order."""
    rows = tuple(
        tuple(Action(stage, "F", microbatch) for microbatch in range(num_microbatches))
        for stage in range(num_stages)
    )
    return Schedule("forward", num_stages, num_microbatches, rows)
