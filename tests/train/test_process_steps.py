"""PipelineTrainer in several processes: what one process gives, on every one of them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ipu_pipeline.errors import StageError
from ipu_pipeline.train import process_steps
from tests.backends.cluster import trainer_jobs
from tests.backends.cluster.processes import ROOT, Processes
from tests.train.helpers import OURS, QUIET, SCRIPTS, THEIRS, TWO_STAGES


def assert_equal(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Compare plain data; numbers to a part of their size."""
    if isinstance(expected, float) and isinstance(found, float | int):
        same = math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
        assert same or (math.isnan(found) and math.isnan(expected)), (where, found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_equal(found[name], value, tolerance, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_equal(mine, theirs, tolerance, f"{where}[{n}]")
    else:
        assert found == expected, where


def compare(
    processes: Processes, job: str, folder: Path, tolerance: float = 1e-6, **options: Any
) -> None:
    """Run a job in several processes, and in this one as the reference."""
    (folder / "one").mkdir()
    found = processes.run(f"trainer_jobs.{job}", folder=str(folder / "many"), **options)
    expected = getattr(trainer_jobs, job)(folder=str(folder / "one"), **options)
    for mine in found:
        assert_equal(mine, expected, tolerance)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["qa", "classification", "causal_lm"])
def test_a_script_gives_what_it_gives_in_one_process(two, tmp_path, name) -> None:
    """Losses, norms, learning rates, metrics, predictions, weights and files, on every process."""
    compare(two, "script", tmp_path, name=name)


@pytest.mark.acceptance
def test_checkpoints_the_best_model_and_resuming(two, tmp_path) -> None:
    """Logs, with dropout, are those of one process, and so are the files and what is in them."""
    compare(two, "kept", tmp_path)


def test_processes_that_do_not_come_are_named(monkeypatch) -> None:
    def gather(*_: Any) -> None:
        raise RuntimeError("Timed out waiting 660000ms")

    monkeypatch.setattr(process_steps, "gather_over", gather)
    with pytest.raises(StageError, match=r"another process has not come to this call, .*Timed out"):
        process_steps._ProcessGroup().gather(1)


@pytest.mark.acceptance
@pytest.mark.parametrize("job", ["further", "data", "generated"])
def test_other_trainings(two, tmp_path, job) -> None:
    """Early stops, data of every kind, generation."""
    compare(two, job, tmp_path)


def test_what_is_refused_is_refused_by_all(two, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    said = two.run("trainer_jobs.refused", folder=str(tmp_path / "out"))
    messages = [
        "the loss is computed outside of the model .*, and replicas divide every microbatch",
        "Inside.on_pre_optimizer_step acts inside an optimizer step, when each process has",
        "there is no complete checkpoint of the last run",
        "2 processes are more than the plan's 1 stage x 1 replica; start 1",
        "3 replicas cannot share 2 processes; start a multiple of 3",
        "include_num_input_tokens_seen counts what a process reads, which is a share of the data",
        "the replicas do not read shares of the same batches: their sampler draws from torch's",
        "hyperparameter_search would choose other values in every process; run it in one",
    ]
    for own in said:
        assert len(own) == len(messages)
        for found, message in zip(own, messages, strict=True):
            assert re.search(message, found), found


def test_code_around_the_model(two, tmp_path) -> None:
    """It sees what the model returns in every process; what only one has is refused."""
    names = ["parts_for_the_log", "learned_weights_of_the_tasks", "training_step_of_its_own"]
    names.append("measured_once_more")
    compare(two, "live", tmp_path, tolerance=1e-5, names=names)
    refused = ["penalty_on_all_weights", "mixup_of_embeddings", "fast_gradient_method"]
    for own in two.run("trainer_jobs.live", folder=str(tmp_path / "refused"), names=refused):
        assert all("uses a parameter of the model or its gradient" in said for said in own), own


@pytest.mark.acceptance
def test_copies_of_the_pipeline_share_the_batch(four, tmp_path) -> None:
    """Every process reads whole batches, or the share of its copy."""
    for batches in ("whole", "share"):
        (tmp_path / batches).mkdir()
        compare(four, "copied", tmp_path / batches, batches=batches)


@pytest.mark.acceptance
@pytest.mark.parametrize("stages", [1, 2])
def test_processes_that_share_products(tmp_path, stages) -> None:
    """Losses, norms, weights that a callback reads, checkpoints and predictions."""
    processes = Processes(2 * stages)
    try:
        compare(processes, "sliced", tmp_path, stages=stages, tolerance=1e-5)
    finally:
        processes.close()


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("other_data", "ValueError: rank 1 was called for .* but rank 0 with other values; give"),
        ("broken", "OSError: the disk of rank 1 is gone"),
    ],
)
def test_what_one_process_cannot_do_is_said_by_all(tmp_path, job, message) -> None:
    processes = Processes(2)
    try:
        said = processes.run(f"trainer_jobs.{job}", folder=str(tmp_path))
    finally:
        processes.close()
    assert all(re.search(message, text) for text in said), said
    assert said[0].startswith("StageError: rank 1")


@pytest.mark.acceptance
@pytest.mark.parametrize("line", [OURS, TWO_STAGES], ids=["import-only", "two-stages"])
@pytest.mark.parametrize("name", ["qa", "classification", "causal_lm"])
def test_torchrun_gives_what_plain_python_gives(tmp_path, name, line) -> None:
    """The script's file, with one changed import, by the command itself."""
    source = (SCRIPTS / f"{name}.py").read_text()
    script = tmp_path / f"{name}.py"
    script.write_text(source.replace(THEIRS, line))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    histories = {}
    for kind, launcher in {"one": [], "two": torchrun}.items():
        output = tmp_path / kind
        options = QUIET | {"num_train_epochs": 2, "num_train": 38, "output_dir": output}
        options |= {"save_strategy": "epoch", "eval_strategy": "epoch", "dropout": 0.1}
        words = [f"--{option}={value}" for option, value in options.items()]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
        histories[kind] = [
            {key: value for key, value in entry.items() if not re.search("runtime|_per_", key)}
            for entry in state["log_history"]
        ]
    print(name, *histories.values(), sep="\n")
    assert_equal(histories["two"], histories["one"], 1e-6)
