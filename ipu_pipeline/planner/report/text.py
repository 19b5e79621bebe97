"""The report as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.rates import rates_of
from ipu_pipeline.ir.text import explain_plan, milliseconds, render_table, unit_of
from ipu_pipeline.planner.report.sensitivity import Variant, sensitivity
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import Timeline, pace

WIDTH = 96  # characters of the drawn timeline
_PACES = 24  # microbatches that it shows at least; 4 characters each
_LETTERS = {"forward": "F", "backward": "B", "vocabulary": "V", "copy": "-", "sync": ".",
            "update": "U"}  # fmt: skip
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows
_LEGEND = "F forward, B backward, {}- copy, . sync, U update, blank idle"


def text_report(plan: Plan) -> str:
    """Return the plan, its simulated step and its sensitivity as text."""
    timeline = simulate(plan)
    parts = [explain_plan(plan), simulation_text(plan, timeline), drawn(plan, timeline)]
    variants = sensitivity(plan)
    parts.append("\n".join([render_table(*sensitivity_table(plan, variants)), *problems(variants)]))
    return "\n\n".join(parts)


def simulation_text(plan: Plan, timeline: Timeline) -> str:
    """Return the figures of a simulated step: totals and one row per device."""
    rows, unit = [], unit_of(plan.machine)
    for device, curve in zip(timeline.devices, timeline.memory, strict=True):
        seconds = timeline.seconds
        rows.append(
            (
                plan.machine.devices[device].name,
                f"{timeline.busy_share(device):.1%}",
                f"{timeline.share(device, 'copy'):.1%}",
                f"{timeline.idle_share(device):.1%}",
                milliseconds(seconds[device, "forward"]),
                milliseconds(seconds[device, "backward"]),
                str(curve.in_flight),
                unit(curve.peak_bytes),
                unit(curve.limit_bytes - curve.peak_bytes),
            )
        )
    columns = ("device", "busy", "copy", "idle", "forward ms", "backward ms", "in flight",
               f"peak {unit.name}", f"free {unit.name}")  # fmt: skip
    return "\n".join([*totals(plan, timeline), render_table(columns, rows)])


def device_names(plan: Plan, timeline: Timeline) -> dict[int, str]:
    """Return a label per device: its name and its stages."""
    names = {}
    for device in timeline.devices:
        held = [str(i) for i, stage in enumerate(plan.stages) if stage.device == device]
        names[device] = f"{plan.machine.devices[device].name} · stage {', '.join(held)}"
    return names


def totals(plan: Plan, timeline: Timeline) -> list[str]:
    """Return the step's own figures, one line each."""
    unit, rates = unit_of(plan.machine), rates_of(plan, timeline.step_s)
    lines = [
        f"simulated step {milliseconds(timeline.step_s)} ms ({timeline.schedule}, "
        f"{count_of(timeline.num_microbatches, 'microbatch')}): "
        f"{rates.text() if rates else 'no rate'}, bubble {timeline.bubble_fraction:.1%}, "
        f"peak {unit(timeline.peak_memory_bytes)} {unit.name}",
    ]
    if timeline.update_s > 0:
        lines.append(f"{milliseconds(timeline.update_s)} ms of it: update and all-reduce")
    return lines + [f"DOES NOT FIT: {text}" for text in overflows(plan, timeline)]


def overflows(plan: Plan, timeline: Timeline) -> list[str]:
    """Say which memories are too small, and by how much."""
    found, unit = [], unit_of(plan.machine)
    for device, num_bytes in timeline.overflow_bytes.items():
        where = "the shared memory" if timeline.shared_memory else plan.machine.devices[device].name
        found.append(f"{where} is {unit(num_bytes)} {unit.name} over its limit")
    return found


def drawn(plan: Plan, timeline: Timeline, width: int = WIDTH) -> str:
    """Draw the start of the step, one line per device; a character shows what fills it most."""
    shown_s = min(timeline.step_s, pace(timeline) * max(_PACES, 2 * plan.num_stages))
    if shown_s <= 0:
        return ""
    names = [plan.machine.devices[device].name for device in timeline.devices]
    margin = max(map(len, names))
    cells = {device: [dict.fromkeys(_LETTERS, 0.0) for _ in range(width)]
             for device in timeline.devices}  # fmt: skip
    scale = width / shown_s
    for event in timeline.events:
        if event.start_s < shown_s:
            _fill(cells[event.device], event.kind, event.start_s * scale, event.end_s * scale)
    what = "the whole step" if shown_s == timeline.step_s else "the start of the step"
    spread = any(event.kind == "vocabulary" for event in timeline.events)
    legend = _LEGEND.format("V vocabulary, " if spread else "")
    lines = [f"{what}, {milliseconds(shown_s)} ms: {legend}"]
    for device, name in zip(timeline.devices, names, strict=True):
        lines.append(f"{name:{margin}} |{''.join(map(_letter, cells[device]))}|")
    return "\n".join(lines)


def _fill(cells: list[dict[str, float]], kind: str, start: float, end: float) -> None:
    """Add an event from ``start`` to ``end`` (in characters) to the cells that it touches."""
    for index in range(int(start), min(len(cells), int(end) + 1)):
        cells[index][kind] += max(0.0, min(end, index + 1) - max(start, index))


def _letter(cell: dict[str, float]) -> str:
    kind = max(cell, key=lambda kind: cell[kind])
    return _LETTERS[kind] if cell[kind] > 1 - sum(cell.values()) else " "


def sensitivity_table(plan: Plan, variants: Sequence[Variant]) -> Table:
    """Return the columns, and one row per variant, relative to the first."""
    unit = unit_of(plan.machine)
    base = variants[0].samples_per_s
    rows: list[Sequence[str]] = [
        (
            f"{variant.name} ({variant.derivation})",
            str(variant.num_devices),
            str(variant.num_microbatches),
            "-" if variant.step_s is None else milliseconds(variant.step_s),
            "-" if variant.samples_per_s is None else f"{variant.samples_per_s:,.1f}",
            _relative(variant, base),
            "-" if variant.peak_bytes is None else unit(variant.peak_bytes),
        )
        for variant in variants
    ]
    columns = ("what if", "devices", "microbatches", "step ms", "samples/s", "change",
               f"peak {unit.name}")  # fmt: skip
    return columns, rows


def problems(variants: Sequence[Variant]) -> list[str]:
    """Say why some variants cannot run."""
    return [f"{variant.name}: {variant.problem}" for variant in variants if variant.problem]


def _relative(variant: Variant, base: float | None) -> str:
    if variant.samples_per_s is None:
        return "cannot run"
    return f"{variant.samples_per_s / base - 1:+.1%}" if base else "-"
