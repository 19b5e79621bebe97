"""The charts of the page, as plotly figures. ``plotly`` is imported when a chart is made.

Of a long step they show the beginning and the end, without steady state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import describe_blocks, unit_of
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.report.text import device_names
from ipu_pipeline.planner.schedules.timeline import (
    KINDS,
    Event,
    EventKind,
    MemoryCurve,
    Timeline,
    pace,
)

# Okabe and Ito's palette (2008), distinguishable with every common colour blindness.
COLOURS = {
    "forward": "#0072B2",
    "backward": "#E69F00",
    "vocabulary": "#F0E442",
    "copy": "#009E73",
    "sync": "#D5D8DC",
    "update": "#CC79A7",
    "weights": "#56B4E9",
    "stash": "#E69F00",
    "workspace": "#999999",
    "limit": "#B0261A",
    "quiet": "#B4BCC4",
}
LABELS: dict[EventKind, str] = {
    "forward": "forward",
    "backward": "backward",
    "vocabulary": "vocabulary",
    "copy": "copy",
    "sync": "waiting at a sync",
    "update": "update, all-reduce",
}
_FONT = {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12}
_UNIFORM = {"mode": "hide", "minsize": 9}  # a number that does not fit its bar is not drawn
_NUMBERED = 250  # bars up to which each carries its microbatch

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


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the layout that all charts share."""
    return {
        "height": height,
        "font": {**_FONT, "color": "#24292f"},
        "margin": {"l": 8, "r": 8, "t": 36, "b": 8},
        "plot_bgcolor": "#ffffff",
        "paper_bgcolor": "#ffffff",
        "bargap": 0.25,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "top",
                   "xref": "container", "yref": "container", "traceorder": "normal"},
        "hoverlabel": {"align": "left", "font": _FONT},
        "xaxis": {"automargin": True, "gridcolor": "#eceff2", "zerolinecolor": "#c9d1d9"},
        "yaxis": {"automargin": True, "gridcolor": "#eceff2", "zerolinecolor": "#c9d1d9"},
        **more,
    }  # fmt: skip


def timeline_figure(plan: Plan, timeline: Timeline) -> Any:
    """Draw what every device does when, one row per device."""
    from plotly.subplots import make_subplots

    shown, names = windows(timeline), device_names(plan, timeline)
    figure = make_subplots(
        rows=1,
        cols=len(shown),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[window.title for window in shown] if len(shown) > 1 else None,
    )
    kinds = [kind for kind in KINDS if any(event.kind == kind for event in timeline.events)]
    listed: set[EventKind] = set()  # plotly lists no kind whose first window has none of it
    for column, window in enumerate(shown, start=1):
        for kind in kinds:
            bars = _bars(window, kind, names, legend=len(listed | {kind}) > len(listed))
            if bars.y:
                listed.add(kind)
                figure.add_trace(bars, row=1, col=column)
        figure.update_xaxes(
            title_text="ms", range=[window.start_s * 1e3, window.end_s * 1e3], row=1, col=column
        )
    titles = 56 if len(shown) > 1 else 0  # below a legend that takes three rows on a narrow screen
    height = 100 + titles + max(26, min(60, 320 // len(names))) * len(names)
    figure.update_layout(layout(height, barmode="overlay", bargap=0.18, uniformtext=_UNIFORM))
    figure.update_layout(margin={"t": 36 + titles})
    figure.update_xaxes(gridcolor="#eceff2", automargin=True)
    rows = list(names.values())  # all of them, also those that do nothing in a window
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=rows,
        range=[len(rows) - 0.5, -0.5],
        tickmode="linear",
        showgrid=False,
        ticksuffix="  ",
    )
    return figure


def _bars(window: Window, kind: EventKind, names: dict[int, str], *, legend: bool) -> Any:
    from plotly import graph_objects as go

    events = [window.clip(event) for event in window.events if event.kind == kind]
    numbered = kind in ("forward", "backward") and len(window.events) <= _NUMBERED
    return go.Bar(
        name=LABELS[kind],
        legendgroup=kind,
        showlegend=legend,
        orientation="h",
        base=[round(event.start_s * 1e3, 6) for event in events],
        x=[round(event.duration_s * 1e3, 6) for event in events],
        y=[names[event.device] for event in events],
        text=[str(event.microbatch) for event in events] if numbered else None,
        textposition="inside" if numbered else None,
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": "white" if kind == "forward" else "#24292f", "size": 10},
        constraintext="inside",
        marker={
            "color": COLOURS[kind],
            "opacity": [0.72 if (event.microbatch or 0) % 2 else 1.0 for event in events],
            "line": {"width": 0},
        },
        customdata=[_what(event) for event in events],
        hovertemplate="%{customdata}<br>from %{base:.4f} ms, for %{x:.4f} ms<extra>%{y}</extra>",
    )


def _what(event: Event) -> str:
    if event.stage is None:
        return LABELS[event.kind]
    return f"{LABELS[event.kind]}, stage {event.stage}, microbatch {event.microbatch}"


def _stacked(
    rows: Sequence[str], parts: Iterable[tuple[str, str, Sequence[float]]], unit: str, **axis: Any
) -> Any:
    """Return a chart with one bar per row, stacked of ``parts``: name, colour and sizes."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, colour, sizes in parts:
        figure.add_bar(name=name, orientation="h", x=sizes, y=rows, marker_color=COLOURS[colour],
                       hovertemplate=f"%{{x:{unit}<extra>%{{y}}</extra>")  # fmt: skip
    height = 100 + max(24, min(40, 160 // len(rows))) * len(rows)
    figure.update_layout(layout(height, barmode="stack"))
    figure.update_xaxes(**axis)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ")
    return figure


def share_figure(plan: Plan, timeline: Timeline) -> Any:
    """Draw how every device spends the step."""
    names = device_names(plan, timeline)
    kinds: tuple[EventKind, ...] = ("forward", "backward", "vocabulary", "copy", "update")
    parts = [
        (LABELS[kind], kind, [100 * timeline.share(device, kind) for device in names])
        for kind in kinds
    ]
    idle = [100 * timeline.idle_share(device) for device in names]
    figure = _stacked(
        list(names.values()),
        [*(part for part in parts if any(part[2])), ("waiting (bubble)", "sync", idle)],
        ".2f} % of the step",
        title_text="% of the step",
        range=[0, 100],
    )
    figure.data[-1].update(text=[f"{share:.0f} %" for share in idle], textposition="inside",
                           insidetextanchor="end")  # fmt: skip
    return figure


def stage_figure(plan: Plan, timeline: Timeline) -> Any:
    """Draw the seconds of one microbatch on every stage, and the pace of the pipeline."""
    rows = [f"{i}: {describe_blocks(stage)}" for i, stage in enumerate(plan.stages)]
    loads = timeline.loads
    parts = {
        "forward": [1e3 * load.forward_s for load in loads],
        "backward": [1e3 * load.backward_s for load in loads],
        "vocabulary": [1e3 * (load.softmax_s + load.rows_s) for load in loads],
        "copy": [1e3 * (load.copies.forward_s + load.copies.backward_s) for load in loads],
    }
    figure = _stacked(
        rows,
        [(part, part, sizes) for part, sizes in parts.items() if any(sizes)],
        ".4f} ms",
        title_text="ms per microbatch",
        rangemode="tozero",
    )
    pace_ms = pace(timeline) * 1e3
    figure.add_vline(x=pace_ms, line={"dash": "dash", "width": 1.5, "color": COLOURS["limit"]})
    figure.add_annotation(x=pace_ms, y=1, yref="paper", yanchor="bottom", xanchor="right",
                          showarrow=False, text=f"pace {pace_ms:.3f} ms",
                          font={"color": COLOURS["limit"]})  # fmt: skip
    return figure


def memory_figure(plan: Plan, timeline: Timeline) -> Any:
    """Draw the peak of every device by kind of use, and what it can hold."""
    rows, curves = list(device_names(plan, timeline).values()), timeline.memory
    unit = unit_of(plan.machine)
    one, text = unit.num_bytes, f".{unit.digits}f}} {unit.name}"
    parts = (
        ("weights, gradients, optimizer", "weights", [c.weight_bytes / one for c in curves]),
        ("stash of microbatches in flight", "stash", [c.stash_bytes / one for c in curves]),
        ("workspace", "workspace", [c.workspace_bytes / one for c in curves]),
    )
    figure = _stacked(rows, parts, text, title_text=f"{unit.name} at the peak",
                       rangemode="tozero")  # fmt: skip
    limits = [limit / one for limit in timeline.limit_bytes]
    figure.add_scatter(name="limit", x=limits, y=rows, mode="markers+lines" if len(rows) > 1 else
                       "markers", line={"color": COLOURS["limit"], "dash": "dash", "width": 1.5},
                       marker={"symbol": "line-ns-open", "size": 14, "color": COLOURS["limit"]},
                       hovertemplate=f"limit %{{x:{text}<extra>%{{y}}</extra>")  # fmt: skip
    return figure


def memory_curve_figure(plan: Plan, timeline: Timeline) -> Any:
    """Draw memory over time; the fullest device stands out."""
    from plotly import graph_objects as go

    names, shown = device_names(plan, timeline), windows(timeline)[0]
    fullest = max(timeline.memory, key=lambda curve: curve.peak_bytes)
    unit, figure = unit_of(plan.machine), go.Figure()
    text = f"%{{y:.{unit.digits}f}} {unit.name}"
    for curve in sorted(timeline.memory, key=lambda curve: curve is fullest):
        times, held = _until(curve, shown.end_s, unit.num_bytes)
        first = curve is fullest
        figure.add_scatter(
            name=names[curve.device],
            x=times,
            y=held,
            mode="lines",
            line={"shape": "hv", "width": 2 if first else 1,
                  "color": COLOURS["forward"] if first else COLOURS["quiet"]},
            showlegend=first,
            hovertemplate=f"{text} at %{{x:.3f}} ms<extra>" + names[curve.device] + "</extra>",
        )  # fmt: skip
    figure.update_layout(layout(320))
    figure.update_xaxes(title_text=f"ms ({shown.title})", range=[0, shown.end_s * 1e3])
    figure.update_yaxes(title_text=unit.name, rangemode="tozero")
    return figure


def _until(curve: MemoryCurve, end_s: float, one: float) -> tuple[list[float], list[float]]:
    pairs = zip(curve.times_s, curve.held_bytes, strict=True)
    kept = [(time_s, held) for time_s, held in pairs if time_s <= end_s]
    last = max(0, bisect_right(curve.times_s, end_s) - 1)
    kept.append((end_s, curve.held_bytes[last]))
    return [round(t * 1e3, 6) for t, _ in kept], [held / one for _, held in kept]


def block_figure(plan: Plan, costs: GraphCosts) -> Any:
    """Draw the price of every block for one microbatch, without recomputation."""
    from plotly import graph_objects as go

    names = [block.name for block in plan.blocks]
    stages = [f"stage {plan.stage_of[name]}" for name in names]
    parts: dict[str, Sequence[float]] = {
        "forward": [costs.blocks[name].plain.forward_s for name in names],
        "backward": [costs.blocks[name].plain.backward_s for name in names],
    }
    figure = go.Figure()
    for part, seconds in parts.items():
        if any(seconds):
            figure.add_bar(name=part, x=[stages, names], y=[1e3 * value for value in seconds],
                           marker_color=COLOURS[part],
                           hovertemplate="%{y:.4f} ms<extra>%{x}</extra>")  # fmt: skip
    figure.update_layout(layout(420, barmode="stack", bargap=0.2))
    figure.update_yaxes(title_text="ms per microbatch")
    figure.update_xaxes(tickangle=-90, dividercolor="#c9d1d9")
    return figure
