"""The exact price of one stage: its seconds, its bytes, and the options its blocks take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.planner.search.choices import Selection, least_time, pareto
from ipu_pipeline.planner.search.problem import Option, Problem, Slot, Value, bits


@dataclass(frozen=True)
class Price:
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
    """

    forward_s: float
    backward_s: float
    send_forward_s: float
    send_backward_s: float
    outer_s: float
    memory_bytes: float
    picks: tuple[int, ...]
    extra_s: tuple[float, ...] = ()

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
        return self.forward_load_s + self.backward_load_s


class Pricer:
    """Prices stages ``done .. done | stage`` of one problem and remembers the answers."""

    def __init__(self, problem: Problem, *, split_passes: bool = False) -> None:
        """Price ``problem``; ``split_passes`` keeps options that trade forward for backward."""
        self.problem = problem
        self._split_passes = split_passes
        self._stage_memo: dict[tuple[tuple[int, ...], int, float, bool], list[Selection]] = {}
        numbers: dict[tuple[Option, ...], int] = {}
        self._menu = [numbers.setdefault(ways, len(numbers)) for ways in problem.options]
        self._alive: dict[int, list[Value]] = {}
        self._by_producer: list[list[Value]] = [[] for _ in problem.names]
        for value in problem.values:
            self._by_producer[value.producer].append(value)

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[Price]:
        """Return every undominated way to run ``stage`` at ``slot`` after ``done``; may be empty.

        Args:
            done: Mask of the blocks of earlier stages.
            stage: Mask of the blocks of this stage.
            slot: Where it runs.
            shared_pool: Other stages use the same memory, so smaller but slower ways count too.
        """
        if slot.host:
            return self._host_price(stage)
        if stage & slot.forbidden or stage & self.problem.host_only:
            return []
        base = self.base_bytes(done, stage, slot.in_flight)
        shared = 0.0 if shared_pool else self.shared_bytes(stage)
        budget = slot.capacity - base - shared
        selections = self._selections(stage, slot, budget, shared_pool=shared_pool)
        if not selections:
            return []
        send_forward, send_backward = self.transfers(done, stage, slot)
        outer = self.outer_s(stage) / slot.speed
        return [
            Price(
                item.forward_s / slot.speed,
                item.backward_s / slot.speed,
                send_forward,
                send_backward,
                outer,
                base + shared + item.held_bytes,
                item.picks,
            )
            for item in selections
        ]

    def best(self, done: int, stage: int, slot: Slot) -> Price | None:
        """Return the quickest way that fits the slot's own memory, or ``None``."""
        found = self.prices(done, stage, slot)
        return min(found, key=lambda price: price.load_s) if found else None

    def base_bytes(self, done: int, stage: int, in_flight: int) -> float:
        """Bytes that no option changes: private weights, and what enters, per microbatch.

        Without relays (the public instance formats) what enters is not charged.
        """
        problem = self.problem
        entering = 0.0
        if problem.relay:
            entering += sum(value.forward_bytes for value in self.entering(done, stage))
        entering += sum(item.num_bytes for item in problem.inputs if item.users & stage)
        return sum(problem.held[block] for block in bits(stage)) + in_flight * entering

    def shared_bytes(self, stage: int) -> float:
        """Bytes of the parameters that this stage and other blocks use, each once."""
        return sum(s.num_bytes for s in self.problem.shared_weights if s.users & stage)

    def least_bytes(self, done: int, stage: int, slot: Slot) -> float:
        """Fewest bytes with which the stage runs at ``slot``, parameters of other stages apart."""
        ways = [self.problem.options[block] for block in bits(stage)]
        spaces = sorted({o.workspace_bytes for options in ways for o in options})
        least = inf
        for space in spaces:
            fitting = [
                [o.held_bytes(slot.in_flight) for o in options if o.workspace_bytes <= space]
                for options in ways
            ]
            if all(fitting):
                least = min(least, space + sum(min(sizes) for sizes in fitting))
        base = self.base_bytes(done, stage, slot.in_flight)
        return base + self.shared_bytes(stage) + least

    def outer_s(self, stage: int) -> float:
        """Seconds per optimizer step at speed 1: updates and gradient exchanges."""
        exchanged = sum(
            item.seconds
            for item in self.problem.exchanges
            if item.users & stage and item.users & ~stage
        )
        return exchanged + sum(self.problem.outer[block] for block in bits(stage))

    def entering(self, done: int, stage: int) -> list[Value]:
        """Values made outside that the stage receives (to relay them, too)."""
        if not self.problem.relay:
            return [v for v in self.problem.values if v.consumers & stage
                    and not stage >> v.producer & 1]  # fmt: skip
        return self._crossing(done)

    def leaving(self, done: int, stage: int) -> list[Value]:
        """Values that the stage sends on (relayed ones, too)."""
        if not self.problem.relay:
            return [v for block in bits(stage) for v in self._by_producer[block]
                    if v.consumers & ~stage]  # fmt: skip
        return self._crossing(done | stage)

    def _crossing(self, done: int) -> list[Value]:
        """Values alive at the boundary behind ``done``."""
        if done not in self._alive:
            self._alive[done] = [
                value
                for block in bits(done)
                for value in self._by_producer[block]
                if value.consumers & ~done
            ]
        return self._alive[done]

    def transfers(self, done: int, stage: int, slot: Slot) -> tuple[float, float]:
        """Seconds of forward and of backward transfers over both boundaries of the stage."""
        forward = backward = 0.0
        sides = ((slot.link_in, self.entering), (slot.link_out, self.leaving))
        for link, values_of in sides:
            if link is None:
                continue
            for value in values_of(done, stage):
                forward += message_s(link, value.forward_bytes)
                backward += message_s(link, value.backward_bytes)
        return forward, backward

    def _host_price(self, stage: int) -> list[Price]:
        times = self.problem.host_s or ()
        seconds = sum(times[block] for block in bits(stage))
        if seconds == inf:
            return []
        picks = tuple(0 for _ in bits(stage))
        return [Price(seconds, 0.0, 0.0, 0.0, 0.0, 0.0, picks)]

    def _selections(
        self, stage: int, slot: Slot, budget: float, *, shared_pool: bool
    ) -> list[Selection]:
        key = (tuple(self._menu[b] for b in bits(stage)), slot.in_flight, budget, shared_pool)
        if key not in self._stage_memo:
            ways = [self.problem.options[block] for block in bits(stage)]
            if shared_pool or (self._split_passes and _forward_varies(ways)):
                found = pareto(ways, slot.in_flight, budget, by_memory=shared_pool)
            else:
                one = least_time(ways, slot.in_flight, budget)
                found = [] if one is None else [one]
            self._stage_memo[key] = found
        return self._stage_memo[key]


def message_s(link: Link, num_bytes: float) -> float:
    """Seconds to send ``num_bytes`` in one message; 0 for nothing (as ``Link.transfer_s``)."""
    return link.latency_s + num_bytes / link.bytes_per_s if num_bytes else 0.0


def _forward_varies(ways: Sequence[Sequence[Option]]) -> bool:
    return any(len({option.forward_s for option in options}) > 1 for options in ways)
