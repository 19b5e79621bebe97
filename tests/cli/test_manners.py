"""What a person at a terminal, a log file and a shell get to see."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ipu_pipeline as ipp
from ipu_pipeline.cli import app
from ipu_pipeline.cli.progress import LOGGER, progress_line
from ipu_pipeline.errors import PartitionError
from tests.ir.plan_example import example_plan
from tests.tiny_models import TINY

RUNNER = CliRunner()


def test_the_version_is_said() -> None:
    done = RUNNER.invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"ipu-pipeline {ipp.__version__}\n")


def test_a_shell_completes_commands_and_options() -> None:
    variables = {"_IPU_PIPELINE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    words = {"COMP_WORDS": "ipu-pipeline s", "_TYPER_COMPLETE_ARGS": "ipu-pipeline s"}
    done = subprocess.run(
        [sys.executable, "-m", "ipu_pipeline"], env=os.environ | variables | words,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["simulate"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, terminal: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("TERM", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    level, handlers = LOGGER.level, list(LOGGER.handlers)
    with progress_line():
        logging.getLogger("ipu_pipeline.compiler").info("searching [all] stages")
        if terminal:
            logging.getLogger("ipu_pipeline.compiler").warning("mind the gap")
            assert LOGGER.handlers != handlers
    shown = capsys.readouterr()
    assert shown.out == ""
    assert bool(shown.err) == terminal
    assert ("mind the gap" in shown.err) == terminal
    assert (LOGGER.level, LOGGER.handlers) == (level, handlers)


def test_plan_compile_and_steps_leave_log_records(caplog: pytest.LogCaptureFixture) -> None:
    tiny = TINY["bert-qa"]
    model, batch = tiny.build()
    with caplog.at_level(logging.DEBUG, logger="ipu_pipeline"):
        half = {name: value[:1] for name, value in batch.items()}
        plan = ipp.plan(model, half, machine="a100-80g-x4", num_stages=2, microbatches=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ipp.compile(model, plan, optimizer=optimizer) as executable:
            executable.train_step(batch)
    said = [(record.levelname, record.name, record.getMessage()) for record in caplog.records]
    for level, name, text in (
        ("INFO", "ipu_pipeline.compiler", "capturing BertForQuestionAnswering"),
        ("INFO", "ipu_pipeline.compiler", "blocks captured in"),
        ("INFO", "ipu_pipeline.planner.backend", "searching the best of 2 stages over 4 devices"),
        ("INFO", "ipu_pipeline.compiler", "planned in"),
        ("INFO", "ipu_pipeline.compiler", "compiled BertForQuestionAnswering for local in"),
        ("DEBUG", "ipu_pipeline.stages.executable", "step 1: loss"),
    ):
        assert any(said_[:2] == (level, name) and text in said_[2] for said_ in said), (text, said)


def test_fewer_microbatches_than_stages_are_refused_by_name() -> None:
    model, batch = TINY["bert-qa"].build(device="meta")
    with pytest.raises(PartitionError, match="1f1b needs at least as many microbatches as stages"):
        ipp.plan(model, batch, machine="a100-80g-x4", num_stages=2, microbatches=1)


def test_a_script_that_only_the_cluster_has_is_printed(tmp_path: Path) -> None:
    example_plan().save(tmp_path / "plan.json")
    common = ["launch", str(tmp_path / "plan.json")]
    done = RUNNER.invoke(app, [*common, "--print", "--", "only/there.py", "--x"])
    assert done.exit_code == 0, done.output
    assert "only/there.py --x" in done.output
    assert RUNNER.invoke(app, [*common, "--print", "--", "-m", "only.there"]).exit_code == 0
    done = RUNNER.invoke(app, [*common, "--", "only/there.py"])
    assert done.exit_code == 1
    assert "there is no script" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "x", "--ipu-config", "Graphcore/bert-base-ipu", "--machine", "local"),
         "this machine, 'local', is for plan only"),
        (("tune", "x", "--global-batch", "1", "--optimizer", "nix"), "optimizer 'nix' is unknown"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = RUNNER.invoke(app, list(arguments))
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")
def test_an_output_that_is_full_is_one_line(tmp_path: Path) -> None:
    example_plan().save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "ipu_pipeline", "explain", str(tmp_path / "plan.json")]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 28] No space left on device; make room")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", ["m" * 100_000, "m " * 100_000])
@pytest.mark.parametrize("option", ["--machine", "--passes", "--schedule", "--task"])
def test_what_is_long_is_not_said_again(tmp_path: Path, option: str, wrong: str) -> None:
    TINY["bert-qa"].config(architectures=["BertForQuestionAnswering"]).to_json_file(
        tmp_path / "config.json"
    )
    done = RUNNER.invoke(app, ["plan", str(tmp_path / "config.json"), option, wrong])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert len(done.output) < 2000
