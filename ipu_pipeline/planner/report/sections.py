"""The sections of the HTML page: text and tables around the charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.rates import of_peak, rates_of
from ipu_pipeline.ir.text import describe_blocks, milliseconds, unit_of
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.report.excerpt import left_out, windows
from ipu_pipeline.planner.report.sensitivity import Variant
from ipu_pipeline.planner.report.text import overflows, problems, sensitivity_table
from ipu_pipeline.planner.schedules.timeline import Timeline, pace


def _figure(name: str, caption: str) -> str:
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f'<div class="chart" id="figure-{name}"></div></figure>'
    )


def _grid(columns: Sequence[str], rows: Iterable[Sequence[str]], name: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table{name and f" id={name}"}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{_grid(columns, rows)}</details>"


def head(plan: Plan, timeline: Timeline) -> str:
    """Title, key numbers and warnings."""
    samples = plan.micro_batch_size * timeline.num_microbatches * plan.replicas
    where, peak, limit = _fullest(plan, timeline)
    unit, rates = unit_of(plan.machine), rates_of(plan, timeline.step_s)
    bound = "no bound is known"
    if plan.lower_bound_s:
        bound = f"no split is predicted below {milliseconds(plan.lower_bound_s)} ms"
    tiles = [
        (f"{milliseconds(timeline.step_s)} ms", "optimizer step",
         count_of(plan.num_microbatches, "microbatch")),
        (f"{rates.samples_per_s if rates else 0.0:,.1f}", "samples per second",
         f"{count_of(samples, 'sample')} per step"),
        (f"{timeline.bubble_fraction:.1%}", "bubble", "share of device time spent waiting"),
        (f"{peak / limit:.1%}", "of the fullest memory",
         f"{where}: {unit(peak)} of {unit(limit)} {unit.name}"),
        (f"{plan.gap:.1%}" if plan.lower_bound_s else "-", "gap to the lower bound",
         bound),
    ]  # fmt: skip
    if rates is not None and rates.mfu is not None:
        tokens = f"{rates.tokens_per_s or rates.samples_per_s:,.0f}"
        what = "samples" if rates.tokens_per_s is None else "tokens"
        devices = of_peak(rates.num_devices)
        tiles += [(tokens, f"{what} per second", count_of(rates.num_devices, "GPU")),
                  (f"{rates.mfu:.1%}", "MFU", devices)]  # fmt: skip
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(detail)}</small></div>"
        for value, name, detail in tiles
    )
    replicas = f", {count_of(plan.replicas, 'replica')}" if plan.replicas > 1 else ""
    devices = count_of(len(timeline.devices), "device")
    stages = f"{count_of(plan.num_stages, 'stage')} on {devices}"
    return (
        f"<h1>{escape(plan.model.model_class)} on {escape(plan.machine.name)}</h1>"
        f'<p class="soft">{stages}, '
        f"{escape(plan.schedule)}, {count_of(plan.num_microbatches, 'microbatch')} of "
        f"{plan.micro_batch_size}{replicas}; costs: {escape(plan.cost_source)}</p>"
        f'<div class="tiles">{boxes}</div>{_warnings(plan, timeline)}'
    )


def _fullest(plan: Plan, timeline: Timeline) -> tuple[str, int, int]:
    """Name, peak and limit of the fullest memory; devices may share one."""
    curves = timeline.memory
    if timeline.shared_memory:
        return "all devices", sum(curve.peak_bytes for curve in curves), curves[0].limit_bytes
    fullest = max(curves, key=lambda curve: curve.peak_bytes / curve.limit_bytes)
    return plan.machine.devices[fullest.device].name, fullest.peak_bytes, fullest.limit_bytes


def _warnings(plan: Plan, timeline: Timeline) -> str:
    found = []
    if plan.edited:
        found.append("The plan was edited by hand; all numbers are those of the edited plan.")
    found += [f"Does not fit: {text}." for text in overflows(plan, timeline)]
    return "".join(f'<p class="warn">{escape(text)}</p>' for text in found)


def reasons(plan: Plan, timeline: Timeline) -> str:
    """What limits the plan, its bound, and how prediction and simulation differ."""
    lines = [f"Limited by {part.strip()}." for part in plan.binding.split("; ") if part.strip()]
    proven = "this split is proven optimal under the cost model" if plan.gap < 1e-9 else (
        f"a better split could save at most {plan.gap:.1%}"
    )  # fmt: skip
    if plan.lower_bound_s:
        lines.append(f"Lower bound {milliseconds(plan.lower_bound_s)} ms: {proven}.")
    if any(event.kind == "copy" for event in timeline.events):
        lines.append("Copies are charged to the sender and then to the receiver.")
    if timeline.update_s > 0:
        lines.append(f"{milliseconds(timeline.update_s)} ms per step are update and all-reduce.")
    lines += [f"Tied weights: {' = '.join(group)}." for group in plan.tied_groups]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>Why this plan</h2><ul class="reasons">{items}</ul>'


def timeline_section(timeline: Timeline) -> str:
    """Who does what when."""
    caption = (
        "One row per device, one bar per pass of a microbatch; every second microbatch is paler. "
        "Drag to zoom, double-click to go back."
    )
    missing = left_out(timeline, windows(timeline))
    return (
        "<h2>Timeline of one optimizer step</h2>"
        + _figure("timeline", f"{caption} {missing[:1].upper()}{missing[1:]}".strip())
        + _figure("shares", "How each device spends the whole step.")
    )


def memory_section(plan: Plan, timeline: Timeline) -> str:
    """What fills the devices, at the peak and over time."""
    unit = unit_of(plan.machine)
    rows = [
        (
            str(curve.device),
            *map(unit, (curve.weight_bytes, curve.stash_bytes, curve.workspace_bytes,
                             curve.peak_bytes, curve.limit_bytes)),
            f"{curve.peak_bytes / curve.limit_bytes:.1%}",
            str(curve.in_flight),
        )
        for curve in timeline.memory
    ]  # fmt: skip
    uses = [f"{use} {unit.name}" for use in ("weights", "stash", "workspace", "peak", "limit")]
    columns = ("device", *uses, "full", "in flight")  # fmt: skip
    limit = "what stages can use"
    if timeline.shared_memory:
        limit = "the memory that all of them share, so their peaks add up"
    return (
        "<h2>Memory</h2>"
        + _figure("memory", f"Peak of each device; the dashed line is {limit}.")
        + _figure("memory-curve", "Over time: the fullest device in blue, the others in grey.")
        + _table(columns, rows, "memory as a table")
    )


def stage_section(plan: Plan, timeline: Timeline) -> str:
    """What a microbatch costs every stage."""
    unit = unit_of(plan.machine)
    rows = [
        (
            f"{index}: {describe_blocks(stage)}",
            plan.machine.devices[stage.device].name,
            str(len(stage.blocks)),
            str(len(stage.recompute)),
            milliseconds(load.forward_s),
            milliseconds(load.backward_s),
            milliseconds(load.copies.forward_s + load.copies.backward_s),
            f"{load.price.load_s / pace(timeline):.1%}",
            unit(load.stash_bytes),
        )
        for index, (stage, load) in enumerate(zip(plan.stages, timeline.loads, strict=True))
    ]
    columns = ("stage", "device", "blocks", "recomputed", "forward ms", "backward ms", "copy ms",
               "of the pace", f"stash {unit.name} per microbatch")  # fmt: skip
    caption = (
        "Seconds of one microbatch, recomputation included in the backward pass. The dashed line "
        "is the pace: the busiest device."
    )
    return "<h2>Stages</h2>" + _figure("stages", caption) + _table(columns, rows, "as a table")


def block_section(plan: Plan, costs: GraphCosts) -> str:
    """What every block costs."""
    unit = unit_of(plan.machine)
    rows = [
        (
            block.name,
            block.kind,
            str(plan.stage_of[block.name]),
            f"{plan.graph.num_parameters(block):,}",
            f"{block.forward_flops / 1e9:.3f}",
            milliseconds(costs.blocks[block.name].plain.forward_s),
            milliseconds(costs.blocks[block.name].plain.backward_s),
            unit(sum(costs.blocks[block.name].weight_bytes.values())),
            unit(costs.blocks[block.name].plain.stash_bytes),
        )
        for block in plan.blocks
    ]
    columns = ("block", "kind", "stage", "parameters", "forward GFLOP", "forward ms",
               "backward ms", f"weights {unit.name}",
               f"saved {unit.name} per microbatch")  # fmt: skip
    caption = "Price of every block for one microbatch, without recomputation."
    return "<h2>Blocks</h2>" + _figure("blocks", caption) + _table(columns, rows, "as a table")


def sensitivity_section(plan: Plan, variants: Sequence[Variant]) -> str:
    """What other settings would give."""
    reasons = "".join(f"<li>{escape(text)}</li>" for text in problems(variants))
    return (
        "<h2>Sensitivity</h2><p class='soft'>The first row is the plan. Every other one is "
        "split again by the exact solver and priced the same way, without constraints that a plan "
        "does not store.</p>"
        + _grid(*sensitivity_table(plan, variants), name="sensitivity")
        + (f'<ul class="reasons">{reasons}</ul>' if reasons else "")
    )


def foot(plan: Plan, timeline: Timeline) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return (
        f"<footer>Model fingerprint {escape(plan.model.fingerprint)}; plan made with "
        f"{escape(versions)}. Times are predictions of the {escape(plan.cost_source)} cost model, "
        f"simulated with {timeline.num_events:,} events. MB are 10<sup>6</sup> bytes, "
        "GB 10<sup>9</sup>.</footer>"
    )
