"""run_qa.py in the processes that ``ipu-pipeline launch`` starts: the same as in one process."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.examples.conftest import FOLDER

STEPS = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
ROOT = FOLDER.parents[1]


def as_arguments(given) -> list[str]:
    """Return the command line that gives these options."""
    flags = [[f"--{n}"] if value is True else [f"--{n}", str(value)] for n, value in given.items()]
    return list(chain.from_iterable(flags))


def log_history(folder: Path):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.acceptance
@pytest.mark.timeout(300)
def test_two_processes_train_and_write_what_one_does(script, options, tmp_path):
    one = options(do_train=True, do_eval=True, num_stages=2, output_dir=tmp_path / "one", **STEPS)
    script.run(one)
    two = options.given(do_train=True, do_eval=True, output_dir=tmp_path / "two", **STEPS)
    plan = one.folder / "plan.json"
    command = [sys.executable, "-m", "ipu_pipeline", "launch", str(plan), "--"]
    done = subprocess.run(
        [*command, str(FOLDER / "run_qa.py"), *as_arguments(two)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after training: F1") == 1
    assert "rank 1" not in done.stderr
    folders = tmp_path / "one", tmp_path / "two"
    losses = [[row["loss"] for row in log_history(folder)] for folder in folders]
    assert len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    written = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert written[1] == written[0]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
