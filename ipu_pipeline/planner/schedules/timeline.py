"""What a simulation gives: events with times, and the figures derived from them. Plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from ipu_pipeline.planner.schedules.stage_loads import StageLoad

EventKind = Literal["forward", "backward", "vocabulary", "copy", "sync", "update"]
KINDS: tuple[EventKind, ...] = ("forward", "backward", "vocabulary", "copy", "sync", "update")

_COMPUTING: tuple[EventKind, ...] = ("forward", "backward", "vocabulary")


class Event(NamedTuple):
    """One device does one thing.

    Attributes:
        device: Position of the device in the machine.
        kind: ``forward``, ``backward`` and ``vocabulary`` (its passes) compute, ``copy`` sends or
            receives, ``sync`` waits for the other devices, ``update`` is everything once per
            optimizer step.
        stage: Stage it belongs to; ``None`` where it belongs to the whole device.
        microbatch: Its microbatch; ``None`` likewise.
        start_s: Seconds from the start of the optimizer step.
        end_s: Seconds from the start of the optimizer step.
    """

    device: int
    kind: EventKind
    stage: int | None
    microbatch: int | None
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class MemoryCurve:
    """Bytes that one device holds over the step.

    Attributes:
        device: Position of the device in the machine.
        weight_bytes: The part that never changes.
        times_s: Moments at which the total changes, ascending; the first is 0.
        held_bytes: Total from each moment on.
        in_flight: Most microbatches stashed at one time, added up over the device's stages.
        stash_bytes: Stash at the moment of the peak.
        limit_bytes: What the device can hold.
    """

    device: int
    weight_bytes: int
    times_s: tuple[float, ...]
    held_bytes: tuple[int, ...]
    in_flight: int
    stash_bytes: int
    limit_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at one time."""
        return max(self.held_bytes)

    @property
    def workspace_bytes(self) -> int:
        """Workspace at the moment of the peak."""
        return self.peak_bytes - self.weight_bytes - self.stash_bytes


@dataclass(frozen=True)
class SteadyState:
    """Microbatches in the middle of a long step that only repeat: counted, their events not listed.

    Attributes:
        num_microbatches: How many; later ones have numbers behind theirs.
        start_s: Where they are left out.
        duration_s: How long they take.
        seconds: What :attr:`Timeline.seconds` counts for them.
        num_events: Events that they have.
    """

    num_microbatches: int
    start_s: float
    duration_s: float
    seconds: Mapping[tuple[int, EventKind], float]
    num_events: int

    def behind(self, event: Event) -> Event:
        """Return ``event``, of the step without these microbatches, at its place in the whole."""
        if event.start_s < self.start_s:
            return event
        return self._moved(event, self.num_microbatches, self.duration_s)

    def number(self, event: Event) -> int | None:
        """Return the microbatch of a listed event in the step without these."""
        later = event.start_s >= self.start_s + self.duration_s
        return (
            self._moved(event, -self.num_microbatches, 0.0).microbatch
            if later
            else (event.microbatch)
        )

    @staticmethod
    def _moved(event: Event, microbatches: int, seconds: float) -> Event:
        number = None if event.microbatch is None else event.microbatch + microbatches
        return event._replace(
            microbatch=number, start_s=event.start_s + seconds, end_s=event.end_s + seconds
        )


@dataclass(frozen=True)
class Timeline:
    """One simulated optimizer step of one pipeline.

    Attributes:
        schedule: Name of the schedule.
        num_microbatches: Microbatches of the step.
        devices: Devices that take part, in pipeline order.
        events: By device, ascending in time; no two events of a device overlap.
        step_s: Seconds of the whole step.
        update_s: Seconds of it after the last pass (optimizer update, all-reduce).
        loads: What a microbatch asks of every stage.
        limit_bytes: What each of ``devices`` can hold.
        shared_memory: The devices share one memory, and each limit is all of it.
        steady: Microbatches whose events are not listed; ``None``: all are.
    """

    schedule: str
    num_microbatches: int
    devices: tuple[int, ...]
    events: tuple[Event, ...]
    step_s: float
    update_s: float
    loads: tuple[StageLoad, ...]
    limit_bytes: tuple[int, ...]
    shared_memory: bool = False
    steady: SteadyState | None = None

    @property
    def num_events(self) -> int:
        """Events of the whole step."""
        return len(self.events) + (self.steady.num_events if self.steady else 0)

    @cached_property
    def seconds(self) -> Mapping[tuple[int, EventKind], float]:
        """Seconds of every kind on every device; kinds that do not occur are 0."""
        total = {device: dict.fromkeys(KINDS, 0.0) for device in self.devices}
        for device, kind, _, _, start_s, end_s in self.events:
            total[device][kind] += end_s - start_s
        for (device, kind), seconds in (self.steady.seconds if self.steady else {}).items():
            total[device][kind] += seconds
        return {(device, kind): own[kind] for device, own in total.items() for kind in KINDS}

    def share(self, device: int, *kinds: EventKind) -> float:
        """Share of the step that ``device`` spends on ``kinds``."""
        busy_s = sum(self.seconds[device, kind] for kind in kinds)
        return busy_s / self.step_s if self.step_s > 0 else 0.0

    def busy_share(self, device: int) -> float:
        """Share of the step in which ``device`` computes."""
        return self.share(device, *_COMPUTING)

    def idle_share(self, device: int) -> float:
        """Share of the step in which ``device`` waits for others, in a sync or without one."""
        return max(0.0, 1.0 - self.share(device, *_COMPUTING, "copy", "update"))

    @property
    def bubble_fraction(self) -> float:
        """Share of all device time that is spent waiting."""
        return sum(map(self.idle_share, self.devices)) / len(self.devices)

    @cached_property
    def memory(self) -> tuple[MemoryCurve, ...]:
        """Memory over time, one curve per device."""
        events: dict[int, list[Event]] = {device: [] for device in self.devices}
        for event in self.events:
            if event.kind in ("forward", "backward"):
                number = self.steady.number(event) if self.steady else event.microbatch
                events[event.device].append(event._replace(microbatch=number))
        return tuple(
            _curve(device, events[device], self.loads, limit)
            for device, limit in zip(self.devices, self.limit_bytes, strict=True)
        )

    @property
    def peak_memory_bytes(self) -> int:
        """Peak of the fullest device."""
        return max(curve.peak_bytes for curve in self.memory)

    @property
    def peak_activation_bytes(self) -> int:
        """Most bytes of stash and workspace that all devices together hold at one time."""
        changes = [
            (time, index, held - curve.weight_bytes)
            for index, curve in enumerate(self.memory)
            for time, held in zip(curve.times_s, curve.held_bytes, strict=True)
        ]
        changes.sort(key=itemgetter(0))  # stable: each curve keeps its own order
        now, peak = [0] * len(self.memory), 0
        for _, at_once in groupby(changes, key=itemgetter(0)):
            for _, index, held in at_once:
                now[index] = held
            peak = max(peak, sum(now))
        return peak

    @property
    def overflow_bytes(self) -> Mapping[int, int]:
        """Bytes over the limit, by device; for a shared memory, of all its devices together.

        Peaks of devices that share a memory are added up as if they came at the same moment.
        """
        peaks = {curve.device: curve.peak_bytes for curve in self.memory}
        if self.shared_memory:
            peaks = {self.devices[0]: sum(peaks.values())}
        limits = dict(zip(self.devices, self.limit_bytes, strict=True))
        return {d: peak - limits[d] for d, peak in peaks.items() if peak > limits[d]}

    def to_json(self) -> dict[str, Any]:
        """Return the figures (not the events) as plain JSON data."""
        memory = {curve.device: curve for curve in self.memory}
        return {
            "schedule": self.schedule,
            "num_microbatches": self.num_microbatches,
            "step_s": self.step_s,
            "update_s": self.update_s,
            "bubble_fraction": self.bubble_fraction,
            "num_events": self.num_events,
            "devices": [
                {
                    "device": device,
                    "busy_share": self.busy_share(device),
                    "idle_share": self.idle_share(device),
                    **{f"{kind}_s": self.seconds[device, kind] for kind in KINDS},
                    "peak_memory_bytes": memory[device].peak_bytes,
                    "weight_bytes": memory[device].weight_bytes,
                    "stash_bytes": memory[device].stash_bytes,
                    "workspace_bytes": memory[device].workspace_bytes,
                    "limit_bytes": memory[device].limit_bytes,
                    "in_flight": memory[device].in_flight,
                }
                for device in self.devices
            ],
        }


def pace(timeline: Timeline) -> float:
    """Seconds per microbatch of the busiest device, which all others follow."""
    total = dict.fromkeys(timeline.devices, 0.0)
    for load in timeline.loads:
        total[load.device] += load.price.load_s + load.softmax_s + load.rows_s
    return max(total.values())


def _curve(
    device: int, events: list[Event], loads: tuple[StageLoad, ...], limit_bytes: int
) -> MemoryCurve:
    """Add up one device's passes: stash from forward to last backward, workspace inside a pass."""
    left = Counter((stage, microbatch) for _, _, stage, microbatch, _, _ in events)
    weights = sum(load.weight_bytes for load in loads if load.device == device)
    times, held = [0.0], [weights]
    stash = peak_stash = peak = flying = most = 0
    for _, kind, stage, microbatch, start_s, end_s in events:
        assert stage is not None
        load = loads[stage]
        if kind == "forward":
            stash, flying = stash + load.stash_bytes, flying + 1
            most = max(most, flying)
        total = weights + stash + load.workspace_bytes
        if total > peak:
            peak, peak_stash = total, stash
        left[stage, microbatch] -= 1
        if left[stage, microbatch] == 0:
            stash, flying = stash - load.stash_bytes, flying - 1
        times += (start_s, end_s)
        held += (total, weights + stash)
    return MemoryCurve(device, weights, tuple(times), tuple(held), most, peak_stash, limit_bytes)
