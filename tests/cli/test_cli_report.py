from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ipu_pipeline.cli import app
from tests.planner.schedules.plans import make_plan

RUNNER = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    make_plan([0.001, 0.002], [0.002, 0.003], 6, copies=True).save(path)
    return str(path)


def invoke(*arguments: str):
    return RUNNER.invoke(app, list(arguments))


def test_simulate_prints_the_figures(plan_file: str) -> None:
    result = invoke("simulate", plan_file)
    assert result.exit_code == 0, result.output
    assert "simulated step" in result.output
    assert "1f1b, 6 microbatches" in result.output
    other = invoke("simulate", plan_file, "--schedule", "gpipe")
    assert "gpipe, 6 microbatches" in other.output


def test_simulate_refuses_a_schedule_that_the_machine_does_not_run(plan_file: str) -> None:
    refused = invoke("simulate", plan_file, "--schedule", "popart")
    assert refused.exit_code == 1
    assert "toy runs no schedule 'popart'; use one of 1f1b, gpipe" in refused.output


def test_simulate_json_is_json_alone(plan_file: str, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    result = invoke("simulate", plan_file, "--json", "--trace", str(trace))
    assert result.exit_code == 0, result.output
    raw = json.loads(result.stdout)
    assert raw["schedule"] == "1f1b"
    assert len(raw["devices"]) == 2
    assert f"trace written to {trace}" in result.stderr
    assert json.loads(trace.read_text())["otherData"]["step_s"] == raw["step_s"]


def test_report_as_text_and_as_a_page(plan_file: str, tmp_path) -> None:
    text = invoke("report", plan_file)
    assert text.exit_code == 0, text.output
    assert "what if" in text.output
    pytest.importorskip("plotly", reason="plotly (the report extra) is not installed")
    page = tmp_path / "report.html"
    result = invoke("report", plan_file, "-o", str(page))
    assert result.output.strip() == f"report written to {page}"
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "none.json"], "error: cannot read the plan none.json"),
        (["report", "none.json"], "error: cannot read the plan none.json"),
        (
            ["simulate", "{plan}", "--schedule", "zb"],
            "error: toy runs no schedule 'zb'; use one of",
        ),
    ],
)
def test_errors_are_one_message(plan_file: str, arguments: list[str], message: str) -> None:
    result = invoke(*(argument.format(plan=plan_file) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
