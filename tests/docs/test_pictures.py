"""The report's figures as SVG: every bar is there, at its place, and names cannot act."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.price import workload_of
from ipu_pipeline.planner.report import figures
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.schedules.plans import make_plan
from tools.docs.svg import draw

pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")

PLAN = make_plan([0.001, 0.002], [0.002, 0.003], 6, "1f1b", copies=True, outer_s=0.004)
TIMELINE = simulate(PLAN)


def parsed(svg: str) -> ElementTree.Element:
    assert "\n" not in svg  # a blank line would end the block of HTML that it stands in
    return ElementTree.fromstring(svg)


def test_every_pass_is_a_bar_of_its_length() -> None:
    picture = parsed(draw(figures.timeline_figure(PLAN, TIMELINE), "a <step>"))
    bars = [r for r in picture.iter("rect") if float(r.get("y", 0)) > 30]
    assert len(bars) == len(TIMELINE.events)
    widths = sorted(float(bar.get("width", 0)) for bar in bars)
    longest = max(event.duration_s for event in TIMELINE.events)
    shortest = min(event.duration_s for event in TIMELINE.events)
    assert widths[-1] / widths[0] == pytest.approx(longest / shortest, rel=0.05)
    assert picture.get("aria-label") == "a <step>"


def test_the_other_figures_are_drawn() -> None:
    costs = backend_of(PLAN.machine).costs(workload_of(PLAN))
    for figure, words in (
        (figures.stage_figure(PLAN, TIMELINE), ("pace", "ms per microbatch")),
        (figures.memory_figure(PLAN, TIMELINE), ("limit", "MB at the peak")),
        (figures.memory_curve_figure(PLAN, TIMELINE), ("MB",)),
        (figures.share_figure(PLAN, TIMELINE), ("waiting (bubble)",)),
        (figures.block_figure(PLAN, costs), ("b0", "stage 1")),
    ):
        svg = draw(figure, "figure")
        shown = " ".join(re.findall(r">([^<]+)</text>", svg))
        assert len(parsed(svg)) > 4
        assert all(word in shown for word in words), words
