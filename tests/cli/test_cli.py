from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ipu_pipeline.cli import app
from ipu_pipeline.ir.plan import Plan
from tests.quick_calibration import make_quick
from tests.tiny_models import TINY

RUNNER = CliRunner(env={"COLUMNS": "80"})


def invoke(*arguments: str):
    return RUNNER.invoke(app, list(arguments))


@pytest.fixture
def bert(tmp_path) -> str:
    config = TINY["bert-qa"].config()
    config.architectures = ["BertForQuestionAnswering"]
    config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_plan_is_made_printed_saved_and_explained(bert: str, tmp_path) -> None:
    file = tmp_path / "plan.json"
    size = ("--num-stages", "2", "--seq-length", "16", "--micro-batch", "3", "--microbatches", "4")
    result = invoke("plan", bert, *size, "-o", str(file))
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    assert (plan.num_stages, plan.num_microbatches, plan.micro_batch_size) == (2, 4, 3)
    assert plan.model.model_class == "BertForQuestionAnswering"
    assert f"plan written to {file}" in result.output
    explained = invoke("explain", str(file))
    assert explained.exit_code == 0
    assert explained.output.strip() in result.output


def test_task_granularity_and_folder_are_used(bert: str, tmp_path) -> None:
    result = invoke("blocks", str(tmp_path), "--task", "masked-lm", "--seq-length", "16")
    assert result.exit_code == 0, result.output
    assert "bert.encoder.layer.3" in result.output
    assert "cls" in result.output
    finer = invoke("blocks", bert, "--granularity", "sublayer", "--seq-length", "16")
    assert finer.exit_code == 0, finer.output
    assert len(finer.output.splitlines()) > len(result.output.splitlines())


def test_layers_of_an_ipu_config_are_respected(bert: str, tmp_path) -> None:
    file = tmp_path / "plan.json"
    result = invoke(
        *("plan", bert, "--machine", "pod4", "--seq-length", "16", "-o", str(file)),
        *("--ipu-config-overrides", "layers_per_ipu=[1 3],gradient_accumulation_steps=5"),
    )
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    layers = [sum(".layer." in block for block in stage.blocks) for stage in plan.stages]
    assert layers == [1, 3]
    assert plan.num_microbatches == 5


def test_profiled_costs_are_measured(bert: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_quick(monkeypatch)
    file = tmp_path / "plan.json"
    result = invoke(
        *("plan", bert, "--costs", "profiled", "--num-stages", "2", "--seq-length", "16"),
        *("-o", str(file)),
    )
    assert result.exit_code == 0, result.output
    assert Plan.load(file).cost_source == "profiled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "no/such-model"], "error: no transformers config at 'no/such-model'"),
        (["explain", "none.json"], "error: cannot read the plan none.json"),
        (["blocks", "{bert}", "--task", "qa"], "error: unknown task 'qa'"),
        (
            ["plan", "{bert}", "--seq-length", "65"],
            "config.json: seq_length 65 is longer than the 64",
        ),
        (["plan", "{bert}", "--ipu-config", "x"], "error: no file or folder 'x'"),
        (["plan", "{bert}", "--pod-type", "x"], "error: pod type 'x' is unknown"),
        (
            ["plan", "{bert}", "--ipu-config-overrides", "a"],
            "error: override 'a' is not name=value",
        ),
    ],
)
def test_errors_are_one_message(bert: str, arguments: list[str], message: str) -> None:
    result = invoke(*(argument.format(bert=bert) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_traceback_on_request(monkeypatch) -> None:
    from ipu_pipeline.errors import PlanError

    monkeypatch.setenv("IPU_PIPELINE_TRACEBACK", "1")
    assert isinstance(invoke("explain", "none.json").exception, PlanError)


def test_settings_without_effect_are_said(bert: str, tmp_path) -> None:
    folder = tmp_path / "ipu"
    folder.mkdir()
    settings = {"layers_per_ipu": [2, 2], "use_popdist": True, "gradient_accumulation_steps": 4}
    (folder / "ipu_config.json").write_text(json.dumps(settings))
    options = ("--ipu-config", str(folder), "--machine", "pod4", "--seq-length", "16")
    result = invoke("plan", bert, *options)
    assert result.exit_code == 0, result.output
    assert "note: use_popdist=True has no effect" in result.stderr


def test_a_process_of_its_own_collects_rarely() -> None:
    code = (
        "import gc, sys; from ipu_pipeline.cli import run; sys.argv = ['x', '--help']\n"
        "try: run()\nexcept SystemExit: print(gc.get_threshold())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "(200000, 20, 100)" in result.stdout


def test_module_form() -> None:
    command = [sys.executable, "-m", "ipu_pipeline", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: ipu-pipeline" in result.stdout


# ---------------------------------------------------------------- predict


def test_predict_shows_memory_and_step_of_a_configuration(bert: str, tmp_path) -> None:
    folder = tmp_path / "ipu"
    folder.mkdir()
    settings = {"layers_per_ipu": [2, 2], "gradient_accumulation_steps": 4}
    (folder / "ipu_config.json").write_text(json.dumps(settings))
    options = ("--ipu-config", str(folder), "--machine", "pod4", "--seq-length", "16")
    result = invoke("predict", bert, *options)
    assert result.exit_code == 0, result.output
    assert "samples/s in training on 1 x 2 ipu-gc200" in result.output
    for part in ("stash", "fullest tile", "fill", "flush", "optimizer"):
        assert part in result.output


def test_predict_refuses_an_unknown_configuration(bert: str) -> None:
    result = invoke("predict", bert, "--ipu-config", "Graphcore/no-such-ipu")
    assert result.exit_code == 1
    assert "no packaged preset is called 'Graphcore/no-such-ipu'" in result.stderr


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, bert: str) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "load", interrupt)
    result = invoke("explain", bert)
    assert (result.exit_code, result.stderr, result.stdout) == (130, "interrupted\n", "")
