"""A script under torchrun ends well, and with another exit code when a rank fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.cluster.processes import ROOT, free_port

SCRIPT = """
import sys
import time
from tests.backends.cluster.fault_jobs import lower_limits
from tests.backends.cluster.jobs import compiled

made, batch = compiled("bert-qa", planned={"num_stages": 2})
with made:
    print("loss", made.train_step(batch).loss)
    if sys.argv[1] == "fails" and made.groups.layout.rank == 1:
        raise ValueError("mine")
    if sys.argv[1] == "hangs" and made.groups.layout.rank == 1:
        lower_limits()
        made.model.bert.encoder.layer[3].register_forward_pre_hook(lambda *_: time.sleep(1000))
    print("loss", made.train_step(batch).loss)
"""


# Our own launcher, which starts torchrun, is tested by test_start.py, and what ranks say that hang
# or fail by test_failures.py.
@pytest.mark.acceptance
@pytest.mark.parametrize("how", ["ends", "fails", "hangs"])
def test_a_script(tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--master-port", str(free_port()), str(script), how],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.count("loss") == (4 if how == "ends" else 2), done.stderr[-3000:]
    assert (done.returncode == 0) == (how == "ends")
    assert "exitcode: -6" not in done.stderr  # no rank aborts, whatever it still waits for
    if how == "fails":
        assert "ValueError: mine" in done.stderr
    if how == "hangs":
        message = "rank 1 hangs (stage 1, block 'bert.encoder.layer.3', forward pass of microbatch"
        summary = done.stderr.partition("Root Cause")[2]
        assert f"StallError: {message} 0, step 1) since " in summary
