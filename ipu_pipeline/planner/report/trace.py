"""The simulated step as a trace for Perfetto (ui.perfetto.dev) or ``chrome://tracing``.

Source: "Trace Event Format", the Chromium project (complete events ``X``, counters ``C``,
metadata ``M``; times in microseconds).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipu_pipeline.ir.files import write_text
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.report.text import device_names
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import Event, Timeline

# Names of the reserved palette of chrome://tracing; Perfetto colours by event name.
_COLOURS = {
    "forward": "thread_state_running",
    "backward": "thread_state_iowait",
    "vocabulary": "rail_animation",
    "copy": "thread_state_runnable",
    "sync": "grey",
    "update": "cq_build_passed",
}
_US = 1e6


def write_trace(plan: Plan, path: str | Path, timeline: Timeline | None = None) -> None:
    """Write the optimizer step as a trace; without ``timeline`` the plan is simulated."""
    timeline = simulate(plan) if timeline is None else timeline
    write_text(path, json.dumps(trace(plan, timeline)))


def trace(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    """Return the trace: one thread per device, one memory counter per device."""
    return {
        "traceEvents": [
            *_names(plan, timeline),
            *map(_complete, timeline.events),
            *_counters(plan, timeline),
        ],
        "displayTimeUnit": "ms",
        "otherData": {
            "model": plan.model.model_class,
            "machine": plan.machine.name,
            "schedule": timeline.schedule,
            "step_s": timeline.step_s,
            "bubble_fraction": timeline.bubble_fraction,
            "microbatches_left_out": timeline.steady.num_microbatches if timeline.steady else 0,
        },
    }


def _names(plan: Plan, timeline: Timeline) -> Iterator[dict[str, Any]]:
    title = f"{plan.model.model_class} on {plan.machine.name} ({timeline.schedule})"
    yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}
    for device, name in device_names(plan, timeline).items():
        common = {"ph": "M", "pid": 0, "tid": device}
        yield {**common, "name": "thread_name", "args": {"name": name}}
        yield {**common, "name": "thread_sort_index", "args": {"sort_index": device}}


def _complete(event: Event) -> dict[str, Any]:
    arguments = {"stage": event.stage, "microbatch": event.microbatch}
    letter = {"forward": "F", "backward": "B", "vocabulary": "V"}.get(event.kind)
    return {
        "ph": "X",
        "pid": 0,
        "tid": event.device,
        "cat": event.kind,
        "name": f"{event.stage}{letter}{event.microbatch}" if letter else event.kind,
        "ts": event.start_s * _US,
        "dur": event.duration_s * _US,
        "cname": _COLOURS[event.kind],
        "args": {name: value for name, value in arguments.items() if value is not None},
    }


def _counters(plan: Plan, timeline: Timeline) -> Iterator[dict[str, Any]]:
    for curve in timeline.memory:
        name = f"memory of {plan.machine.devices[curve.device].name} (MB)"
        for time_s, held in zip(curve.times_s, curve.held_bytes, strict=True):
            arguments = {"MB": held / 1e6}
            yield {"ph": "C", "pid": 0, "name": name, "ts": time_s * _US, "args": arguments}
