"""A rank is killed with signal 9; torchrun starts all again, and nothing is different.

``make test-acceptance`` does this at 100 points: 25 each in the forward pass, the backward pass,
the optimizer's step and the writing of a checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.backends.cluster.processes import ROOT


@pytest.mark.acceptance
@pytest.mark.timeout(7200)  # most of it is starting processes
def test_a_killed_rank_changes_nothing() -> None:
    command = [sys.executable, "-m", "tests.backends.cluster.drill", "--points", "25"]
    command += ["--torchrun-every", "10"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=7100,
    )
    print(done.stdout)
    assert "\n0 of 100 points failed" in done.stdout, done.stderr[-3000:]
    assert done.stdout.count(": same\n") == 100
    assert " by torchrun: from checkpoint-" in done.stdout
