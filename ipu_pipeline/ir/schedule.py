"""Schedules: rows of actions, one row per device. Plain data with a text form (``0F0 1B2``).

Actions: forward pass (F), whole backward pass (B), or its two halves: gradients of the inputs
(I), which the stage before waits for, and gradients of the weights (W), which nobody waits for.
Where the vocabulary is spread over stages, each that holds rows has two more: the softmax of its
part of the logits (S), which the last stage's backward pass waits for, and the gradient of its
rows (T), behind that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from ipu_pipeline.errors import VerifyError

ActionKind = Literal["F", "B", "I", "W", "S", "T"]


@dataclass(frozen=True, order=True)
class Action:
    """One stage's pass over one microbatch (module docstring)."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def result(self) -> Action:
        """What others wait for: gradients of the inputs are the same from I and from B."""
        return Action(self.stage, "B", self.microbatch) if self.kind == "I" else self


@dataclass(frozen=True)
class Schedule:
    """What every device does, in order.

    Attributes:
        name: ``gpipe``, ``1f1b``, ...
        num_stages: Pipeline depth.
        num_microbatches: Microbatches per optimizer step.
        rows: One row of actions per device.
        spread: Stages that hold rows of the vocabulary.
    """

    name: str
    num_stages: int
    num_microbatches: int
    rows: tuple[tuple[Action, ...], ...]
    spread: tuple[int, ...] = ()

    def requirements(self, action: Action) -> frozenset[Action]:
        """Return the results that ``action`` waits for."""
        return requirements(action, self.num_stages, self.spread)

    def to_csv(self) -> str:
        """Return one line per device, actions separated by commas."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)

    def peak_in_flight(self, stage: int) -> int:
        """Most microbatches whose activations ``stage`` holds at one time (until B or W)."""
        return self.peaks_in_flight[stage]

    @cached_property
    def peaks_in_flight(self) -> tuple[int, ...]:
        """:meth:`peak_in_flight` of every stage."""
        change = {"F": 1, "B": -1, "I": 0, "W": -1, "S": 0, "T": 0}
        peak, current = [0] * self.num_stages, [0] * self.num_stages
        for action in chain.from_iterable(self.rows):
            current[action.stage] += change[action.kind]
            peak[action.stage] = max(peak[action.stage], current[action.stage])
        return tuple(peak)

    def total_order(self) -> tuple[Action, ...]:
        """Return one sequential order that respects every row and every dependency.

        Raises:
            VerifyError: There is none: the schedule would deadlock, or an action is missing.
        """
        done: set[Action] = set()
        order: list[Action] = []
        left = [list(reversed(row)) for row in self.rows]
        while any(left):
            before = len(order)
            for row in left:
                while row and self.requirements(row[-1]) <= done:
                    order.append(row.pop())
                    done.add(order[-1].result)
            if len(order) == before:
                waiting = [f"device {index} at {row[-1]}" for index, row in enumerate(left) if row]
                raise VerifyError(f"the schedule deadlocks: {'; '.join(waiting)} cannot start")
        return tuple(order)


def requirements(action: Action, num_stages: int, spread: Sequence[int] = ()) -> frozenset[Action]:
    """Return the results (:attr:`Action.result`) that ``action`` waits for.

    ``F`` of a stage needs ``F`` of the stage before; ``B`` and ``I`` need their own ``F`` and
    the gradient from the stage behind; ``W`` needs its own ``I``. ``S`` needs ``F`` of the last
    stage, whose ``B`` needs ``S`` of all stages in ``spread``; ``T`` needs both.
    """
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "S":
        return frozenset({Action(num_stages - 1, "F", microbatch)})
    if action.kind == "T":
        return frozenset({Action(stage, "S", microbatch), Action(num_stages - 1, "B", microbatch)})
    if action.kind == "F":
        return frozenset({Action(stage - 1, "F", microbatch)} if stage > 0 else ())
    if action.kind == "W":
        return frozenset({Action(stage, "B", microbatch)})
    needed = {Action(stage, "F", microbatch)}
    if stage < num_stages - 1:
        needed.add(Action(stage + 1, "B", microbatch))
    else:
        needed.update(Action(other, "S", microbatch) for other in spread)
    return frozenset(needed)
