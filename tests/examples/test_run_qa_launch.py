"""run_qa.py in the processes that ``ipu-pipeline launch`` starts: the same as in one process."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.examples.conftest import FOLDER

STEPS = {"max_steps": 2, "save_steps": 1, "logging_steps": 1}
ROOT = FOLDER.parents[1]


def as_arguments(options) -> list[str]:
    """Return the command line that gives these options."""
    given = []
    for item in fields(options):
        value = getattr(options, item.name)
        if value is True:
            given.append(f"--{item.name}")
        elif value != item.default and value is not False:
            given += [f"--{item.name}", str(value)]
    return given


def log_history(folder: Path):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


@pytest.mark.acceptance
@pytest.mark.timeout(300)
def test_two_processes_train_and_write_what_one_does(script, options, tmp_path):
    one = options(do_train=True, do_eval=True, num_stages=2, output_dir=tmp_path / "one", **STEPS)
    script.run(one)
    two = options(do_train=True, do_eval=True, output_dir=tmp_path / "two", **STEPS)
    plan = one.output_dir / "plan.json"
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
    losses = [[row["loss"] for row in log_history(made.output_dir)] for made in (one, two)]
    assert len(losses[1]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    written = [sorted(path.name for path in made.output_dir.iterdir()) for made in (one, two)]
    assert written[1] == written[0]
    weights = [load_file(made.output_dir / "model.safetensors") for made in (one, two)]
    assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
