from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig
from typer.testing import CliRunner

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import IPUSettings, predict
from ipu_pipeline.backends.ipu.tune import TuneRequest, TuneResult, tune
from ipu_pipeline.backends.ipu.tune_text import comparison_text, result_text
from ipu_pipeline.capture import capture, model_identity
from ipu_pipeline.capture.from_config import from_config
from ipu_pipeline.cli import app
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.schedules.simulate import simulate

RUNNER = CliRunner(env={"COLUMNS": "80"})
SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4,
         "intermediate_size": 1024}  # fmt: skip
LONG = {"num_hidden_layers": 2, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 16384}  # fmt: skip


def capturer(config: dict, task: str, seq_length: int = 64):
    def captured(micro_batch: int):
        built, batch = from_config(
            BertConfig(**config), task, batch_size=micro_batch, seq_length=seq_length
        )
        return capture(built, batch)

    return captured


TASKS = ["question-answering", "masked-lm"]


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def result(task: str) -> TuneResult:
    asked = TuneRequest(64, ipus_per_replica=4, max_micro_batch=4)
    return tune(capturer(SMALL, task), machine_by_name("pod4"), asked)


def test_the_configuration_predicts_what_was_promised(result: TuneResult, tmp_path: Path) -> None:
    for point in result.front.points:
        path = result.ipu_config(point).save(tmp_path / "ipu_config.json")
        graph = result.graphs[point.prediction.micro_batch]
        read = IPUConfig.load(path)
        again = predict(graph, read, result.machine)
        assert again.time == point.prediction.time
        assert again.fits
        assert again.samples_per_step == result.request.global_batch


def test_the_plan_holds_the_prediction(result: TuneResult, task: str, tmp_path: Path) -> None:
    best = result.best.prediction
    captured = capturer(SMALL, task)(best.micro_batch)
    result.plan(model_identity(captured.model)).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.objective_s == best.time.total_s
    assert plan.lower_bound_s <= plan.objective_s
    assert plan.total_batch_size == 64
    assert [s.device for s in plan.stages] == [stage.ipu for stage in best.layout.stages]
    if best.settings.recompute:
        assert all(s.recompute == s.blocks for s in plan.stages[:-1])
    assert not plan.stages[-1].recompute
    held = {stage.device: 0 for stage in plan.stages}
    for stage in plan.stages:
        held[stage.device] += stage.memory_bytes
    assert held == {ipu: memory.total_bytes for ipu, memory in enumerate(best.memory)}
    assert simulate(plan).step_s == plan.objective_s


def test_text_names_every_difference(result: TuneResult) -> None:
    text = result_text(result)
    assert f"{result.best.samples_per_s:.1f} samples/s predicted" in text
    assert "Why this one:" in text
    own = result.ipu_config()
    other = own.apply_overrides("optimizer_state_offchip=true,layers_per_ipu=[1 1 1 1]")
    shown = comparison_text(result, "other", result.predict(other, None))
    assert "optimizer state: off chip" in shown or own.optimizer_state_offchip
    assert "microseconds per sample:" in shown
    same = comparison_text(result, "itself", result.predict(own, None))
    assert "(+0.0%)" in same
    assert "->" not in same


def test_another_batch_is_compared_per_sample(result: TuneResult) -> None:
    other = result.ipu_config().apply_overrides("gradient_accumulation_steps=1000")
    text = comparison_text(result, "other", result.predict(other, capturer(SMALL, "masked-lm")))
    assert "its global batch is" in text
    assert "times per sample are compared" in text


def test_nothing_fits_says_what_does() -> None:
    asked = TuneRequest(8, max_micro_batch=1)
    with pytest.raises(PartitionError, match=r"nothing fits pod1 .*closest were 1 IPU .* needs "):
        tune(capturer(LONG, "question-answering"), machine_by_name("pod1"), asked)


def test_recomputation_off_is_written() -> None:
    settings = IPUSettings(num_ipus=2, layers_per_ipu=(1, 1), recompute=False)
    assert settings.ipu_config().recompute is False
    assert not IPUSettings.from_config(settings.ipu_config()).recompute


@pytest.fixture
def model(tmp_path: Path) -> str:
    config = BertConfig(**SMALL, architectures=["BertForQuestionAnswering"])
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def invoke(*arguments: str):
    return RUNNER.invoke(app, ["tune", *arguments])


def test_command_writes_plan_and_configuration(model: str, tmp_path: Path) -> None:
    plan, config = tmp_path / "plan.json", tmp_path / "ipu_config.json"
    result = invoke(model, "--machine", "pod4", "--global-batch", "32", "--micro-batch", "2",
                    "--seq-length", "64", "-o", str(plan), "--ipu-config-output", str(config),
                    "--compare", str(config))  # fmt: skip
    assert result.exit_code == 1, "nothing to compare with yet"
    result = invoke(model, "--machine", "pod4", "--global-batch", "32", "--micro-batch", "2",
                    "--seq-length", "64", "-o", str(plan),
                    "--ipu-config-output", str(config))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"plan written to {plan}" in result.output
    assert f"IPU configuration written to {config} (micro batch 2)" in result.output
    assert Plan.load(plan).total_batch_size == 32
    compared = invoke(model, "--machine", "pod4", "--global-batch", "32", "--micro-batch", "2",
                      "--seq-length", "64", "--compare", str(config))  # fmt: skip
    assert "(+0.0%)" in compared.output


def test_json_is_json_alone(model: str) -> None:
    result = invoke(model, "--machine", "pod4", "--global-batch", "32", "--micro-batch", "2",
                    "--seq-length", "64", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    raw = json.loads(result.stdout)
    assert raw["front"][0]["ipu_config"]["gradient_accumulation_steps"] >= 1
    rates = [point["samples_per_s"] for point in raw["front"]]
    assert rates == sorted(rates, reverse=True)


def test_errors_are_one_message(model: str) -> None:
    result = invoke(model, "--machine", "pod4", "--global-batch", "7", "--micro-batch", "2")
    assert result.exit_code == 1
    assert "error: no split divides a global batch of 7" in result.stderr
    result = invoke(model, "--machine", "local", "--global-batch", "8")
    assert result.exit_code == 1
    assert "this machine, 'local', is for plan only" in result.stderr
