"""The HTML page, as text and as headless Chromium renders it."""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import replace

import pytest

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.graph import ParameterSpec
from ipu_pipeline.planner.report import figures, write_report
from ipu_pipeline.planner.report.figures import left_out, windows
from ipu_pipeline.planner.report.page import page
from ipu_pipeline.planner.schedules.simulate import simulate
from tests.planner.report.chromium import PROGRAM, render
from tests.planner.schedules.plans import make_plan

pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")
needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium here (Debian: apt-get install chromium)"
)


def small_plan():
    return make_plan([0.001, 0.002], [0.002, 0.003], 6, "1f1b", copies=True, outer_s=0.004)


def embedded(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def small_page() -> str:
    return page(small_plan())


def test_nothing_is_loaded_from_elsewhere(small_page: str) -> None:
    without_library = re.sub(r'id="library">[^<]*<', "><", small_page)
    assert not re.findall(r'(?:src|href)="(?!data:,")', without_library)
    assert "http" not in re.sub(r"<script type=.application/json.*?</script>", "", without_library)
    assert len(small_page) < 2_500_000
    assert len(without_library) < 80_000


def test_figures_hold_the_simulated_numbers(small_page: str) -> None:
    plan, figures = small_plan(), embedded(small_page)
    timeline = simulate(plan)
    bars = {trace["name"]: trace for trace in figures["timeline"]["data"]}
    assert list(bars) == ["forward", "backward", "copy", "update, all-reduce"]
    for name, kind in (("forward", "forward"), ("update, all-reduce", "update")):
        assert sum(bars[name]["x"]) == pytest.approx(
            sum(timeline.seconds[device, kind] for device in timeline.devices) * 1e3, rel=1e-4
        )
    assert len(bars["backward"]["x"]) == 2 * plan.num_microbatches
    memory = {trace["name"]: trace for trace in figures["memory"]["data"]}
    stacked = [
        sum(sizes) for sizes in zip(*(memory[n]["x"] for n in list(memory)[:3]), strict=True)
    ]
    assert stacked == pytest.approx([c.peak_bytes / 1e6 for c in timeline.memory])
    assert memory["limit"]["x"] == [1.0, 1.0]
    shares = figures["shares"]["data"]
    assert [sum(part) for part in zip(*(s["x"] for s in shares), strict=True)] == pytest.approx(
        [100.0, 100.0]
    )
    assert [trace["y"] for trace in figures["blocks"]["data"]] == [[1, 2], [2, 3]]


def test_text_and_tables_say_why(small_page: str) -> None:
    plan = small_plan()
    for text in (
        "Toy on toy",
        f"{plan.objective_s * 1e3:.2f} ms",
        "Limited by time: stage 0 paces.",
        "this split is proven optimal under the cost model",
        "4.00 ms per step are update and all-reduce",
        "one device fewer",
        "twice as many microbatches",
    ):
        assert text in small_page


def test_names_are_escaped() -> None:
    plan = small_plan()
    model = replace(plan.model, model_class="<script>alert(1)</script>")
    html = page(replace(plan, model=model))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; on toy" in html


def test_what_is_wrong_is_said() -> None:
    plan = small_plan()
    edited = replace(plan, stages=(replace(plan.stages[0], recompute=("b0",)), plan.stages[1]))
    assert "edited by hand" in page(edited)
    small = replace(plan.machine.devices[0], memory_bytes=1000)
    machine = replace(plan.machine, devices=(small, plan.machine.devices[1]))
    assert "Does not fit: d0 is " in page(replace(plan, machine=machine))
    pooled = replace(machine, shared_memory=True, devices=(small, small))
    tied = ParameterSpec("tied", (4,), "float32", blocks=("b0", "b1"))
    graph = replace(plan.graph, parameters=(*plan.graph.parameters, tied))
    text = page(replace(plan, machine=pooled, graph=graph))
    assert "Does not fit: the shared memory is " in text
    assert "their peaks add up" in text
    assert "Tied weights: b0 = b1." in text


def test_without_plotly_the_remedy_is_named(monkeypatch, tmp_path) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments, **options):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PipelineError, match=r"pip install 'ipu-pipeline\[report\]'"):
        write_report(small_plan(), tmp_path / "report.html")


def test_long_steps_show_their_beginning_and_end() -> None:
    timeline = simulate(make_plan([1.0] * 3, [2.0] * 3, 200, copies=True))
    start, end = windows(timeline)
    assert start.start_s == 0.0
    assert start.end_s < end.start_s
    assert end.end_s == timeline.step_s
    assert 250 <= len(start.events) + len(end.events) <= 320
    assert "is steady state and left out here" in left_out(timeline, (start, end))
    short = windows(simulate(make_plan([1.0], [2.0], 4)))
    assert [window.title for window in short] == ["whole step"]
    assert left_out(timeline, short) == ""


@needs_chromium
@pytest.mark.parametrize("count", [6, 300])
def test_chromium_draws_every_figure_without_a_complaint(tmp_path, count: int) -> None:
    path = tmp_path / "report.html"
    plan = make_plan([0.001, 0.002], [0.002, 0.003], count, "popart", copies=True)
    write_report(plan, path)
    rendered = render(path, tmp_path / "profile")
    assert rendered.console == []
    assert 'data-state="ready"' in rendered.dom
    assert rendered.count(r'class="chart js-plotly-plot"') == 6
    timeline, shown = simulate(plan), windows(simulate(plan))
    bars = sum(len(window.events) for window in shown)
    assert rendered.figure("timeline").count('<g class="point">') == bars
    assert len(shown) == (1 if count == 6 else 2)
    assert rendered.figure("memory").count('<g class="point">') == 3 * len(timeline.devices)
    for name, words in {
        "timeline": ("forward", "backward", "copy", "waiting at a sync", "d1 · stage 1"),
        "memory": ("stash of microbatches in flight", "limit", "MB at the peak"),
        "stages": ("ms per microbatch", "pace "),
        "blocks": ("b0", "stage 1"),
    }.items():
        assert all(word in rendered.figure(name) for word in words), name


@needs_chromium
def test_a_page_that_cannot_draw_says_so(tmp_path) -> None:
    path = tmp_path / "report.html"
    path.write_text(re.sub(r'id="library">[^<]*<', 'id="library">broken<', page(small_plan())))
    rendered = render(path, tmp_path / "profile")
    assert 'data-state="failed"' in rendered.dom
    assert "The charts could not be drawn" in rendered.dom
    assert rendered.console


def test_a_timeline_of_47_stages_keeps_all_rows_and_legend_entries() -> None:
    plan = make_plan([0.001] * 47, [0.002] * 47, 64, copies=True, outer_s=0.01)
    chart = figures.timeline_figure(plan, simulate(plan))
    assert len(chart.layout.yaxis.categoryarray) == 47
    assert list(chart.layout.yaxis.range) == [46.5, -0.5]
    listed = [trace.name for trace in chart.data if trace.showlegend]
    assert sorted(listed) == ["backward", "copy", "forward", "update, all-reduce"]
