"""The report as one HTML page that needs no network: figures, tables, reasons."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import write_text
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.price import workload_of
from ipu_pipeline.planner.report import figures, sections
from ipu_pipeline.planner.report.sensitivity import sensitivity
from ipu_pipeline.planner.schedules.simulate import simulate
from ipu_pipeline.planner.schedules.timeline import Timeline

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
    timeline = simulate(plan)
    costs = backend_of(plan.machine).costs(workload_of(plan))
    charts = {name: draw(plan, timeline) for name, draw in _CHARTS.items()}
    charts["blocks"] = figures.block_figure(plan, costs)
    packed = {name: json.loads(chart.to_json()) for name, chart in charts.items()}
    for chart in packed.values():  # every figure carries plotly's whole default theme otherwise
        chart["layout"].pop("template", None)
    body = "\n".join(
        [
            sections.head(plan, timeline),
            sections.reasons(plan, timeline),
            sections.timeline_section(timeline),
            sections.memory_section(plan, timeline),
            sections.stage_section(plan, timeline),
            sections.block_section(plan, costs),
            sections.sensitivity_section(plan, sensitivity(plan)),
            sections.foot(plan, timeline),
        ]
    )
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.model.model_class} on {plan.machine.name}"),
        body=body,
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


_CHARTS: dict[str, Callable[[Plan, Timeline], Any]] = {
    "timeline": figures.timeline_figure,
    "shares": figures.share_figure,
    "memory": figures.memory_figure,
    "memory-curve": figures.memory_curve_figure,
    "stages": figures.stage_figure,
}
