"""What a split costs per optimizer step, as a sum that a search can bound.

Every schedule here is a flushed pipeline whose step time has one form. A *row* q gives each
stage s two 0/1 numbers; a device's load in the row adds up over its stages, and the row costs
its weight times the load of the busiest device::

    step = sum_q weight_q * max_device sum_(s on device) (forward_q[s] f_s + backward_q[s] b_s)
           + sum_weight * sum_s (f_s + b_s)
           + max_device sum_(s on device) outer_s

f_s and b_s are the seconds for which one microbatch occupies the stage's device, transfers over
its boundaries included; outer_s is the optimizer update and gradient all-reduce per step. The
form of every schedule is exact for equal stages (each file of ``kinds/`` gives its own); for
others the exact time is the replay's (:mod:`ipu_pipeline.planner.schedules.replay`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StagePrice:
    """A stage at one slot, with one way to run it. Seconds are for one microbatch.

    Attributes:
        forward_s: Compute of the forward pass.
        backward_s: Compute of the backward pass, recomputation included.
        send_forward_s: Forward transfers over both boundaries.
        send_backward_s: Gradient transfers over both boundaries.
        outer_s: Seconds per optimizer step (update, all-reduce).
        memory_bytes: Everything the stage holds, parameters shared with other blocks of the
            stage once; parameters shared with other stages included.
        picks: Option of each block of the stage, ascending.
        extra_s: Seconds that rows of their own count (copies over a link, for one).
        weights_s: Part of ``backward_s`` that only the gradients of weights need.
        softmax_s: The softmax over its rows of the vocabulary, where they are spread.
        rows_s: The gradient of these rows.
    """

    forward_s: float
    backward_s: float
    send_forward_s: float
    send_backward_s: float
    outer_s: float = 0.0
    memory_bytes: float = 0.0
    picks: tuple[int, ...] = ()
    extra_s: tuple[float, ...] = ()
    weights_s: float = 0.0
    softmax_s: float = 0.0
    rows_s: float = 0.0

    @classmethod
    def split(cls, forward_s: float, backward_s: float, copies_s: float = 0.0) -> StagePrice:
        """Return the price of a stage whose backward pass can be split in two halves.

        Both gradients of a matrix product take as many operations as the product itself.
        """
        return cls(forward_s, backward_s, 0.0, copies_s, weights_s=backward_s / 2)

    @property
    def by_kind(self) -> tuple[float, ...]:
        """Seconds of F, B, I, W, S and T."""
        both_s, later_s = self.backward_load_s, self.weights_s
        return self.forward_load_s, both_s, both_s - later_s, later_s, self.softmax_s, self.rows_s

    @property
    def forward_load_s(self) -> float:
        """Seconds that the forward pass of one microbatch occupies the device."""
        return self.forward_s + self.send_forward_s

    @property
    def backward_load_s(self) -> float:
        """Seconds that the backward pass of one microbatch occupies the device."""
        return self.backward_s + self.send_backward_s

    @property
    def load_s(self) -> float:
        """Seconds that one microbatch occupies the device."""
        passes_s = self.forward_load_s + self.backward_load_s
        return passes_s + self.softmax_s + self.rows_s


@dataclass(frozen=True)
class PacedTerm:
    """One ``weight * busiest device`` term.

    Attributes:
        weight: How often it is paid.
        forward: 1 for every stage whose forward pass it counts.
        backward: 1 for every stage whose backward pass it counts.
        extra: Position in ``extra_s`` of the seconds that it counts instead; -1 for none.
        resources: What each stage loads in this row, such as a link or a board; stages with equal
            numbers add up. ``None``: the stage's device.
    """

    weight: float
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    extra: int = -1
    resources: tuple[int, ...] | None = None

    def load_s(self, stage: int, price: StagePrice) -> float:
        """Seconds that ``stage`` at ``price`` adds to its device in this row."""
        if self.extra >= 0:
            return price.extra_s[self.extra]
        return (
            self.forward[stage] * price.forward_load_s
            + self.backward[stage] * price.backward_load_s
        )


@dataclass(frozen=True)
class Path:
    """A dependency path: passes that run one after another, so no step is shorter.

    Attributes:
        forward: How many forward passes of every stage are on it.
        backward: How many backward passes.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]

    @classmethod
    def of(cls, passes: Sequence[float]) -> Path:
        """Return a path of equally many forward and backward passes."""
        return cls(tuple(passes), tuple(passes))

    def seconds(self, prices: Sequence[StagePrice]) -> float:
        """Return its length for stages with ``prices``."""
        stages = zip(self.forward, self.backward, prices, strict=True)
        return sum(f * p.forward_load_s + b * p.backward_load_s for f, b, p in stages)


@dataclass(frozen=True)
class Objective:
    """Seconds per optimizer step as rows and a sum (module docstring).

    Attributes:
        rows: Terms paced by the busiest device.
        sum_weight: Factor of the sum over all stages.
        num_stages: Stages it is made for.
        fixed_s: Seconds per step that no split changes.
    """

    rows: tuple[PacedTerm, ...]
    sum_weight: float
    num_stages: int
    fixed_s: float = 0.0

    @classmethod
    def paced(cls, weight: float, sum_weight: float, num_stages: int) -> Objective:
        """Return ``weight`` times the busiest device plus ``sum_weight`` times all stages."""
        ones = (1,) * num_stages
        return cls((PacedTerm(weight, ones, ones),), sum_weight, num_stages)

    @classmethod
    def paced_apart(cls, weight: float, sum_weight: float, num_stages: int) -> Objective:
        """As :meth:`paced`, with the forward and backward passes paced by their own devices."""
        ones, zeros = (1,) * num_stages, (0,) * num_stages
        rows = (PacedTerm(weight, ones, zeros), PacedTerm(weight, zeros, ones))
        return cls(rows, sum_weight, num_stages)

    @property
    def splits_passes(self) -> bool:
        """Whether forward and backward are weighted differently somewhere."""
        return any(row.forward != row.backward for row in self.rows)

    def seconds(self, devices: Sequence[int], prices: Sequence[StagePrice]) -> float:
        """Return the step time of stages with ``prices`` on ``devices``."""
        total = self.fixed_s + self.sum_weight * sum(price.load_s for price in prices)
        for row in self.rows:
            loads: defaultdict[int, float] = defaultdict(float)
            resources = row.resources or devices
            for stage, (resource, price) in enumerate(zip(resources, prices, strict=True)):
                loads[resource] += row.load_s(stage, price)
            total += row.weight * max(loads.values())
        outer: defaultdict[int, float] = defaultdict(float)
        for device, price in zip(devices, prices, strict=True):
            outer[device] += price.outer_s
        return total + max(outer.values(), default=0.0)
