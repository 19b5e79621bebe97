"""The report as one HTML page that needs no network: figures, tables, reasons.

What it says is made here, how it looks is in ``page.html``, which escapes all of it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import write_text
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.rates import of_peak, rates_of
from ipu_pipeline.ir.text import describe_blocks, milliseconds, unit_of
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.price import workload_of
from ipu_pipeline.planner.report import figures
from ipu_pipeline.planner.report.sensitivity import sensitivity
from ipu_pipeline.planner.report.text import Table, overflows, problems, sensitivity_table
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import Timeline, pace

_PAGE = Path(__file__).parent / "page.html"


def write_report(plan: Plan, path: str | Path) -> None:
    """Write the report of a plan as one self-contained HTML page (about 2 MB, no network).

    Args:
        plan: The plan; it is simulated, and its neighbours are split again.
        path: Where to write, such as ``report.html``.

    Raises:
        PipelineError: plotly is not installed.
    """
    write_text(path, page(plan))


def page(plan: Plan) -> str:
    """Return the page's HTML."""
    library = _library()
    from jinja2 import Environment, StrictUndefined

    timeline, variants = simulate(plan), sensitivity(plan)
    costs = backend_of(plan.machine).costs(workload_of(plan))
    charts = {
        "timeline": figures.timeline_figure(plan, timeline),
        "shares": figures.share_figure(plan, timeline),
        "memory": figures.memory_figure(plan, timeline),
        "memory-curve": figures.memory_curve_figure(plan, timeline),
        "stages": figures.stage_figure(plan, timeline),
        "blocks": figures.block_figure(plan, costs),
    }
    packed = {name: json.loads(chart.to_json()) for name, chart in charts.items()}
    for chart in packed.values():  # every figure carries plotly's whole default theme otherwise
        chart["layout"].pop("template", None)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        _PAGE.read_text(encoding="utf-8")
    )
    return template.render(
        plan=plan,
        timeline=timeline,
        run=_run(plan, timeline),
        tiles=list(_tiles(plan, timeline)),
        warnings=list(_warnings(plan, timeline)),
        why=list(_reasons(plan, timeline)),
        left_out=figures.left_out(timeline, figures.windows(timeline)),
        memory=_memory(plan, timeline),
        stages=_stages(plan, timeline),
        blocks=_blocks(plan, costs),
        sensitivity=sensitivity_table(plan, variants),
        problems=problems(variants),
        # Without "<" nothing in the data can end the element that holds it, or hide what follows.
        figures=json.dumps(packed, separators=(",", ":")).replace("<", "\\u003c"),
        library=library,
    )


def _library() -> str:
    """Return plotly.js, compressed, as text."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise PipelineError(
            "the HTML report needs plotly, which is not installed; run pip install "
            "'ipu-pipeline[report]', or read the text report: ipu-pipeline report PLAN"
        ) from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _run(plan: Plan, timeline: Timeline) -> str:
    devices = count_of(len(timeline.devices), "device")
    replicas = f", {count_of(plan.replicas, 'replica')}" if plan.replicas > 1 else ""
    return (
        f"{count_of(plan.num_stages, 'stage')} on {devices}, {plan.schedule}, "
        f"{count_of(plan.num_microbatches, 'microbatch')} of {plan.micro_batch_size}{replicas}"
    )


def _tiles(plan: Plan, timeline: Timeline) -> Iterator[tuple[str, str, str]]:
    """Yield the key numbers: value, name, detail."""
    samples = plan.micro_batch_size * timeline.num_microbatches * plan.replicas
    where, peak, limit = _fullest(plan, timeline)
    unit, rates = unit_of(plan.machine), rates_of(plan, timeline.step_s)
    bound = "no bound is known"
    if plan.lower_bound_s:
        bound = f"no split is predicted below {milliseconds(plan.lower_bound_s)} ms"
    yield (f"{milliseconds(timeline.step_s)} ms", "optimizer step",
           count_of(plan.num_microbatches, "microbatch"))  # fmt: skip
    yield (f"{rates.samples_per_s if rates else 0.0:,.1f}", "samples per second",
           f"{count_of(samples, 'sample')} per step")  # fmt: skip
    yield f"{timeline.bubble_fraction:.1%}", "bubble", "share of device time spent waiting"
    yield (f"{peak / limit:.1%}", "of the fullest memory",
           f"{where}: {unit(peak)} of {unit(limit)} {unit.name}")  # fmt: skip
    yield f"{plan.gap:.1%}" if plan.lower_bound_s else "-", "gap to the lower bound", bound
    if rates is not None and rates.mfu is not None:
        what, rate = "tokens", rates.tokens_per_s
        if rate is None:
            what, rate = "samples", rates.samples_per_s
        yield f"{rate:,.0f}", f"{what} per second", count_of(rates.num_devices, "GPU")
        yield f"{rates.mfu:.1%}", "MFU", of_peak(rates.num_devices)


def _fullest(plan: Plan, timeline: Timeline) -> tuple[str, int, int]:
    """Name, peak and limit of the fullest memory; devices may share one."""
    curves = timeline.memory
    if timeline.shared_memory:
        return "all devices", sum(curve.peak_bytes for curve in curves), curves[0].limit_bytes
    fullest = max(curves, key=lambda curve: curve.peak_bytes / curve.limit_bytes)
    return plan.machine.devices[fullest.device].name, fullest.peak_bytes, fullest.limit_bytes


def _warnings(plan: Plan, timeline: Timeline) -> Iterator[str]:
    if plan.edited:
        yield "The plan was edited by hand; all numbers are those of the edited plan."
    yield from (f"Does not fit: {text}." for text in overflows(plan, timeline))


def _reasons(plan: Plan, timeline: Timeline) -> Iterator[str]:
    """Yield what limits the plan, its bound, and how prediction and simulation differ."""
    yield from (f"Limited by {part.strip()}." for part in plan.binding.split("; ") if part.strip())
    if plan.lower_bound_s:
        proven = "this split is proven optimal under the cost model"
        if plan.gap >= 1e-9:
            proven = f"a better split could save at most {plan.gap:.1%}"
        yield f"Lower bound {milliseconds(plan.lower_bound_s)} ms: {proven}."
    if any(event.kind == "copy" for event in timeline.events):
        yield "Copies are charged to the sender and then to the receiver."
    if timeline.update_s > 0:
        yield f"{milliseconds(timeline.update_s)} ms per step are update and all-reduce."
    yield from (f"Tied weights: {' = '.join(group)}." for group in plan.tied_groups)


def _memory(plan: Plan, timeline: Timeline) -> Table:
    """What fills the devices at the peak."""
    unit = unit_of(plan.machine)
    uses = ("weights", "stash", "workspace", "peak", "limit")
    columns = ("device", *(f"{use} {unit.name}" for use in uses), "full", "in flight")
    return columns, [
        (
            str(curve.device),
            *map(unit, (curve.weight_bytes, curve.stash_bytes, curve.workspace_bytes,
                        curve.peak_bytes, curve.limit_bytes)),
            f"{curve.peak_bytes / curve.limit_bytes:.1%}",
            str(curve.in_flight),
        )
        for curve in timeline.memory
    ]  # fmt: skip


def _stages(plan: Plan, timeline: Timeline) -> Table:
    """What a microbatch costs every stage."""
    unit = unit_of(plan.machine)
    columns = ("stage", "device", "blocks", "recomputed", "forward ms", "backward ms", "copy ms",
               "of the pace", f"stash {unit.name} per microbatch")  # fmt: skip
    return columns, [
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


def _blocks(plan: Plan, costs: GraphCosts) -> Table:
    """What every block costs, run plainly."""
    unit = unit_of(plan.machine)
    columns = ("block", "kind", "stage", "parameters", "forward GFLOP", "forward ms", "backward ms",
               f"weights {unit.name}", f"saved {unit.name} per microbatch")  # fmt: skip
    return columns, [
        (
            block.name,
            block.kind,
            str(plan.stage_of[block.name]),
            f"{plan.graph.num_parameters(block):,}",
            f"{block.forward_flops / 1e9:.3f}",
            milliseconds(cost.plain.forward_s),
            milliseconds(cost.plain.backward_s),
            unit(sum(cost.weight_bytes.values())),
            unit(cost.plain.stash_bytes),
        )
        for block, cost in ((block, costs.blocks[block.name]) for block in plan.blocks)
    ]
