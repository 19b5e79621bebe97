"""Which part of a long step a chart shows: its beginning and its end, without steady state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ipu_pipeline.planner.schedules.timeline import Event, Timeline

MAX_EVENTS_PER_DEVICE = 100  # on average: bars of a row that are still told apart on a screen
_SHARE_OF_START = 0.55


@dataclass(frozen=True)
class Window:
    """A part of the step, in seconds, with all events that happen in it, also in part."""

    title: str
    start_s: float
    end_s: float
    events: tuple[Event, ...]

    def clip(self, event: Event) -> Event:
        """Return the part of ``event`` inside the window."""
        return event._replace(
            start_s=max(event.start_s, self.start_s), end_s=min(event.end_s, self.end_s)
        )


def windows(timeline: Timeline) -> tuple[Window, ...]:
    """Return one window over the whole step, or its beginning and its end."""
    max_events = MAX_EVENTS_PER_DEVICE * len(timeline.devices)
    step_s, events = timeline.step_s, timeline.events
    if len(events) <= max_events:
        return (Window("whole step", 0.0, step_s, events),)
    starts = sorted(event.start_s for event in events)
    until = starts[round(max_events * _SHARE_OF_START)]
    since = starts[-round(max_events * (1 - _SHARE_OF_START))]
    return (
        _window("start of the step: fill", events, 0.0, until),
        _window("end of the step: flush", events, since, step_s),
    )


def left_out(timeline: Timeline, shown: Sequence[Window]) -> str:
    """Say what lies between two windows; empty for one."""
    if len(shown) < 2:
        return ""
    where = "the trace (ipu-pipeline simulate PLAN --trace FILE) holds all of it"
    if timeline.steady is not None:
        where = f"so are {timeline.steady.num_microbatches:,} microbatches of it in the trace"
    gap_s = shown[1].start_s - shown[0].end_s
    return (
        f"{gap_s / timeline.step_s:.0%} of the step, between {shown[0].end_s * 1e3:.4g} and "
        f"{shown[1].start_s * 1e3:.4g} ms, is steady state and left out here; {where}."
    )


def _window(title: str, events: Sequence[Event], start_s: float, end_s: float) -> Window:
    inside = tuple(e for e in events if e.start_s < end_s and e.end_s > start_s)
    return Window(title, start_s, end_s, inside)
