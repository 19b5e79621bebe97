"""A rank is killed with signal 9; torchrun starts all again, and nothing is different.

``python -m tests.backends.cluster.drill --points 10`` does this at 40 points.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.backends.cluster.processes import ROOT


@pytest.mark.acceptance
@pytest.mark.timeout(600)  # most of it is starting processes
def test_a_killed_rank_changes_nothing() -> None:
    command = [sys.executable, "-m", "tests.backends.cluster.drill", "--points", "1"]
    command += ["--places", "forward", "checkpoint", "--torchrun-every", "2"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert "0 of 2 points failed" in done.stdout, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": same") == 2
    assert "forward of transformer.h.2.ln_1, microbatch 2 by torchrun: from checkpoint-" in (
        done.stdout
    )
