"""The command ``launch``: what it makes of its options, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ipu_pipeline.backends.cluster.launch import spec as launch
from ipu_pipeline.backends.cluster.launch import torchrun
from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from ipu_pipeline.cli import app
from ipu_pipeline.ir.plan import Plan

RUNNER = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture
def folder(tmp_path: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a plan of two stages and a script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_bytes(plan_file.read_bytes())
    (tmp_path / "a.py").touch()
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LaunchSpec, dict[str, str]]]:
    """Start nothing; return what would have been started. The script ends with exit code 3."""
    calls = []

    def start(spec, environment, tell, log_folder):
        tell("a line")
        calls.append((spec, dict(environment)))
        return 3

    monkeypatch.setattr(torchrun, "start", start)
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    return calls


def invoke(*arguments: str):
    return RUNNER.invoke(app, ["launch", *arguments])


def test_a_script_is_started_and_its_exit_code_returned(folder: Path, started) -> None:
    result = invoke("--max-restarts", "2", "plan.json", "--", "a.py", "--max-restarts", "9", "--")
    assert result.exit_code == 3
    assert result.stderr == (
        "launch: 2 processes: 2 stages x 1 replica, 1f1b; threads of each: 4\na line\n"
    )
    assert result.stdout == ""
    [(spec, environment)] = started
    assert spec.program == (str(folder / "a.py"), "--max-restarts", "9", "--")
    assert (spec.num_processes, spec.max_restarts) == (2, 2)
    assert environment == {
        "IPU_PIPELINE_PLAN": str(folder / "plan.json"),
        "IPU_PIPELINE_TARGET": "distributed",
        "OMP_NUM_THREADS": "4",
        "MKL_NUM_THREADS": "4",
    }


def test_another_schedule_and_its_processes(folder: Path, started) -> None:
    invoke("plan.json", "--schedule", "looped_bfs", "--processes", "1", "--", "-m", "pytest")
    [(spec, environment)] = started
    assert (spec.num_processes, spec.program) == (1, ("-m", "pytest"))
    assert environment["IPU_PIPELINE_SCHEDULE"] == "looped_bfs"


def test_too_many_processes_are_noted(folder: Path, started, monkeypatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 1)
    assert "note: 2 processes share 1 core" in invoke("plan.json", "--", "a.py").stderr
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "note: 2 processes are more than the 1 GPU " in invoke("plan.json", "a.py").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json", "a.py"], "error: cannot read the plan none.json"),
        (["a.py", "a.py"], "error: cannot read the plan a.py"),
        (["plan.json", "none.py"], "none.py; give launch's own options before --"),
        (["plan.json", "--processes", "1", "a.py"], "2 stages do not fit 1 process"),
        (["plan.json", "--nodes", "2", "a.py"], "error: launch starts processes on this machine"),
        (
            ["plan.json", "--machine", "pod16", "--print", "a.py"],
            "error: machine pod16 is for target poptorch",
        ),
        (["plan.json", "--machine", "x", "--print", "a.py"], "error: machine 'x' is neither"),
        (
            ["plan.json", "--nodes", "3", "--print", "a.py"],
            "2 processes leave some of 3 nodes without",
        ),
        (
            ["plan.json", "--log-dir", "logs", "--print", "a.py"],
            "error: --log-dir is for processes that start here; give --print or --slurm alone",
        ),
        (
            ["plan.json", "--rdzv-endpoint", "n1", "--slurm", "job", "a.py"],
            "error: --rdzv-endpoint is for --print: here, and under Slurm, the processes find",
        ),
        (["plan.json", "--rdzv-endpoint", "n1", "a.py"], "error: --rdzv-endpoint is for --print"),
        *(
            (
                ["plan.json", "--nodes", "2", "--rdzv-endpoint", wrong, "--print", "a.py"],
                f"error: the endpoint is {wrong!r}; give HOST or HOST:PORT with a port from 1 to",
            )
            for wrong in ("n1:99999", "n1:0", "n1:", "fe80::1", "")
        ),
    ],
)
def test_errors_are_one_message(folder: Path, started, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not started


def test_print_starts_nothing(folder: Path, started) -> None:
    result = invoke("plan.json", "--nodes", "2", "--print", "--", "a.py", "x y")
    assert result.exit_code == 0, result.output
    assert "# run this on each of the 2 nodes" in result.stdout
    assert f"--rdzv-endpoint {socket.gethostname()}:29400" in result.stdout
    assert f"{folder / 'a.py'} 'x y'" in result.stdout
    given = invoke("plan.json", "--nodes", "2", "--rdzv-endpoint", "n1:5", "--print", "a.py")
    assert "--rdzv-endpoint n1:5 " in given.stdout
    six = invoke("plan.json", "--nodes", "2", "--rdzv-endpoint", "[fe80::1]", "--print", "a.py")
    assert "[fe80::1] is one of them" in six.stdout
    assert "--rdzv-endpoint '[fe80::1]:29400' " in six.stdout
    here = invoke("plan.json", "--print", "a.py")
    assert "--standalone" in here.stdout
    assert not started


def test_a_slurm_file_is_written(folder: Path, started) -> None:
    result = invoke("plan.json", "--machine", "a100-80g-x8", "--slurm", "my job", "--", "a.py")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "submit it with: sbatch --time HH:MM:SS 'my job'"
    subprocess.run(["bash", "-n", "my job"], check=True)
    text = (folder / "my job").read_text()
    assert "#SBATCH --job-name=ipu-pipeline-BertForQuestionAnswering\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert f"export IPU_PIPELINE_PLAN={folder / 'plan.json'}\n" in text
    assert not started
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_is_planned_by_default_is_launched(folder: Path, started) -> None:
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "num_hidden_layers": 24}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 768}))
    made = RUNNER.invoke(
        app, ["plan", "config.json", "--machine", "a100-80g-x16", "-o", "made.json"]
    )
    assert made.exit_code == 0, made.output
    plan = Plan.load("made.json")
    assert plan.num_stages > 8  # more than the 8 microbatches that are the default elsewhere
    result = invoke("made.json", "--print", "a.py")
    assert result.exit_code == 0, result.output
    assert f"# {plan.num_stages} processes: " in result.stdout
    assert "--nnodes 2 " in result.stdout
