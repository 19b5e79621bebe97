"""``emit`` and ``run`` on the command line, the two published command lines among them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from ipu_pipeline.cli import app
from ipu_pipeline.ir.plan import Plan
from tests.tiny_models import TINY

RUNNER = CliRunner(env={"COLUMNS": "80"})
PUBLISHED = {
    # huggingface/optimum-graphcore, examples/question-answering: run_qa.py with
    # --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --pod_type pod16
    # --loss_scaling 64; the embedding in two slices. 2 x 16 x 4 replicas = 128.
    "bert": (
        transformers.BertConfig(architectures=["BertForQuestionAnswering"]),
        ("--micro-batch", "2", "--seq-length", "384"),
        "Graphcore/bert-base-ipu",
        "embedding_serialization_factor=2",
        (4, 16, 128, 128),
    ),
    # Graphcore/lxmert-vqa-uncased: micro batch 1, accumulation 8, device iterations 2, 4 replicas:
    # 32 samples per update (the card's total), 64 per call of the device.
    "lxmert": (
        transformers.LxmertConfig(architectures=["LxmertForQuestionAnswering"]),
        ("--micro-batch", "1", "--seq-length", "20"),
        "Graphcore/lxmert-base-ipu",
        "gradient_accumulation_steps=8,device_iterations=2",
        (4, 8, 32, 64),
    ),
}


def invoke(*arguments: str):
    return RUNNER.invoke(app, list(arguments))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_command_lines(name: str, tmp_path: Path) -> None:
    model, size, preset, overrides, (replicas, accumulation, total, per_call) = PUBLISHED[name]
    model.save_pretrained(tmp_path / "model")
    config = ("--ipu-config", preset, "--ipu-config-overrides", overrides, "--pod-type", "pod16")
    file, folder = tmp_path / "plan.json", tmp_path / "bundle"
    result = invoke(
        *("plan", str(tmp_path / "model"), "--machine", "pod16", *size, *config, "-o", str(file))
    )
    assert result.exit_code == 0, result.output
    plan = Plan.load(file)
    assert (plan.num_stages, plan.replicas, plan.num_microbatches) == (4, replicas, accumulation)
    assert plan.total_batch_size == total
    emitted = invoke(
        "emit", str(file), *config, "--loss-scaling", "64", "--half", "-o", str(folder)
    )
    assert emitted.exit_code == 0, emitted.output
    assert f"4 stages, {per_call} samples per call of the device" in emitted.output
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["loss_scaling"] == 64.0
    assert settings["accum_dtype"] == "float16"
    assert settings["replication_factor"] == replicas
    text = (folder / "model_parallel.py").read_text()
    assert ("serialize=2" in text) == (name == "bert")
    assert text.count("block(") - 1 == sum(b.kind != "loss" for b in plan.blocks)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A plan of a tiny model and its config.json."""
    config = TINY["bert-qa"].config()
    config.architectures = ["BertForQuestionAnswering"]
    config.save_pretrained(tmp_path)
    file = tmp_path / "plan.json"
    result = invoke(
        *("plan", str(tmp_path / "config.json"), "--machine", "pod4", "--seq-length", "16"),
        *("--ipu-config-overrides", "layers_per_ipu=[1 2 1],gradient_accumulation_steps=5"),
        *("--micro-batch", "2", "-o", str(file)),
    )
    assert result.exit_code == 0, result.output
    return file, tmp_path / "config.json"


def test_without_the_stand_in_it_says_how_to_get_it(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, config = made
    folder = tmp_path / "bundle"
    assert invoke("emit", str(plan), "-o", str(folder), "--model", str(config)).exit_code == 0
    monkeypatch.setitem(sys.modules, "ipu_pipeline_emulator", None)
    result = invoke("run", str(folder), "--emulate")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "pip install ipu-pipeline-emulator, or from a checkout with pip install -e" in said


def test_emit_then_emulate(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = made
    folder, out = tmp_path / "bundle", tmp_path / "out"
    emitted = invoke("emit", str(file), "-o", str(folder), "--model", str(config.parent))
    assert emitted.exit_code == 0, emitted.output
    assert "note: 3 IPUs (1 x 3) are no power of two: poptorch takes 4, and 1 of them idle" in (
        emitted.output
    )
    result = invoke("run", str(folder), "--emulate", "--steps", "2", "--output", str(out))
    assert result.exit_code == 0, result.output
    assert "emulated on the CPU" in result.output
    assert "step 2: loss" in result.output
    assert len(json.loads((out / "losses.json").read_text())) == 2
    help_ = invoke("run", str(folder), "--emulate", "--", "--help")
    assert "--check-only" in help_.output, help_.output


def test_a_wrong_edit_ends_with_a_message(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = made
    folder = tmp_path / "bundle"
    assert invoke("emit", str(file), "-o", str(folder), "--model", str(config)).exit_code == 0
    path = folder / "model_parallel.py"
    path.write_text(path.read_text().replace("ipu=2", "ipu=1"))
    result = invoke("run", str(folder), "--emulate")
    assert result.exit_code == 1
    assert "error: model_parallel.py: no block is on IPU 2" in result.output


def test_what_poptorch_refuses_ends_with_a_message(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = made
    folder = tmp_path / "bundle"
    assert invoke("emit", str(file), "-o", str(folder), "--model", str(config)).exit_code == 0
    path = folder / "settings.json"
    settings = json.loads(path.read_text()) | {"replication_factor": 32}
    path.write_text(json.dumps(settings))
    result = invoke("run", str(folder), "--emulate", "--steps", "1")
    assert result.exit_code == 1
    assert "error: poptorch cannot compile or run the model: 'poptorch_cpp_error'" in result.output
    assert "at most 64" in result.output
    assert "Traceback" not in result.output


def test_an_unknown_argument_of_the_script(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = made
    folder = tmp_path / "bundle"
    assert invoke("emit", str(file), "-o", str(folder), "--model", str(config)).exit_code == 0
    assert invoke("run", str(folder), "--emulate", "--nonsense").exit_code == 2


def test_refusals(made: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = made
    folder = str(tmp_path / "bundle")
    missing = invoke("emit", str(file), "-o", folder, "--model", str(tmp_path / "none"))
    assert missing.exit_code == 1
    assert "cannot read the model's configuration" in missing.output
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    listing = invoke("emit", str(file), "-o", folder, "--model", str(tmp_path / "list.json"))
    assert "list.json: it holds no object" in listing.output
    unknown = invoke("emit", str(file), "-o", folder, "--optimizer", "Lion")
    assert "optimizer 'Lion' does not exist in poptorch; use one of AdamW" in unknown.output
    changed = ("--ipu-config-overrides", "layers_per_ipu=[2 1 1],gradient_accumulation_steps=5")
    other = invoke("emit", str(file), "-o", folder, *changed)
    assert "the IPU configuration is not that of the plan" in other.output
    no_bundle = invoke("run", str(tmp_path))
    assert "is no bundle: it has no run.py; write one with emit" in no_bundle.output
    assert invoke("emit", str(file), "-o", folder, "--model", str(config)).exit_code == 0
    without = invoke("run", folder)
    assert without.exit_code == 1
    assert "poptorch is not installed: it comes with Graphcore's SDK" in without.output
