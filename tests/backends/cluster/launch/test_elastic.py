"""Processes that are really started: exit codes, restarts, signals, and a training script."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.launch.elastic import start
from ipu_pipeline.backends.cluster.launch.spec import LaunchSpec
from tests.backends.cluster.jobs import compiled

# The launcher leaves files open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
ROOT = Path(__file__).parents[2]
# Waits for nobody: rank 0 is ended by the launcher when rank 1 fails.
FAILS = """
import os, sys, time
print("start", os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"])
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] in sys.argv[2:]:
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
    if sys.argv[1] == "raise":
        raise ValueError("mine")
    sys.exit(int(sys.argv[1]))
time.sleep(60 * (sys.argv[2] != "0" or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"))
"""


class Launched:
    """Starts a script in two processes and keeps what the user is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = ""

    def __call__(self, script: str, *arguments: str, **changes) -> int:
        path = self.folder / "script.py"
        path.write_text(script)
        spec = LaunchSpec(
            plan_path=self.folder / "plan.json",
            program=(str(path), *arguments),
            num_processes=2,
            described="2 processes",
            **changes,
        )
        return start(spec, spec.settings(), self._tell, self.folder / "logs")

    def _tell(self, text: str) -> None:
        self.told += text


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    yield Launched(tmp_path)
    gc.collect()


def test_only_the_first_rank_prints(launched: Launched, capfd) -> None:
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    script = (
        "import os, sys; r = os.environ['RANK']; print('out', r, os.environ['IPU_PIPELINE_PLAN'])\n"
        "print('same', file=sys.stderr); print('own', r, file=sys.stderr)"
    )
    assert launched(script) == 0
    assert capfd.readouterr().out == f"out 0 {launched.folder}/plan.json\n"
    assert sorted(launched.told.splitlines()) == ["[rank 1] own 1", "own 0", "same"]
    files = sorted((launched.folder / "logs").rglob("stdout.log"))
    assert [path.read_text() for path in files] == [f"out 1 {launched.folder}/plan.json\n"]
    os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE")
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("3", 3, "error: rank 1 ended with exit code 3\n"),
        ("raise", 1, "error: rank 1 ended with exit code 1; its last message: ValueError: mine\n"),
        ("kill", 137, "error: rank 1 was ended by SIGKILL\n"),
    ],
)
def test_a_failing_script_gives_its_exit_code(
    launched: Launched, how: str, code: int, told: str
) -> None:
    assert launched(FAILS, how, "0") == code
    assert told in launched.told
    assert f"what every rank wrote: {launched.folder}/logs" in launched.told


def test_a_restart_may_end_well(launched: Launched, capfd) -> None:
    assert launched(FAILS, "kill", "0", max_restarts=2) == 0
    assert "launch: failed (exitcode: -9) local_rank: 1" in launched.told
    assert "launch: all processes start again, restart 1 of 2\n" in launched.told
    assert "restart 2" not in launched.told
    assert capfd.readouterr().out.splitlines() == ["start 0 0", "start 0 1"]


def test_restarts_come_to_an_end(launched: Launched) -> None:
    assert launched(FAILS, "5", "0", "1", max_restarts=1) == 5
    assert launched.told.count("all processes start again") == 1


def test_without_a_folder_files_are_kept_after_a_failure_only(
    launched: Launched, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    for code, kept in (("0", 0), ("4", 1)):
        spec = LaunchSpec(tmp_path, (str(script), code), num_processes=1, described="")
        assert start(spec, {}, launched._tell) == int(code)
        assert len(list(tmp_path.glob("ipu-pipeline-launch-*"))) == kept


WAITS = """
import os, signal, sys, time
def leave(number, frame):
    open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
open(f"{sys.argv[1]}/up-{os.environ['RANK']}", "w").close()
while len([name for name in os.listdir(sys.argv[1]) if name.startswith("up-")]) < 2:
    time.sleep(0.01)
print("up", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_signals_are_passed_on(tmp_path: Path, plan_file: Path) -> None:
    script, told = tmp_path / "script.py", tmp_path / "told"
    script.write_text(WAITS)
    told.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "ipu_pipeline", "launch", plan_file, "--", script, told],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert {"0", "1"} < {path.name for path in told.iterdir()}
    assert "error: stopped by SIGTERM" in messages


TRAINS = """
import os, torch
print("threads", torch.get_num_threads())
import ipu_pipeline as ipp
from tests.backends.cluster.jobs import built

plan = ipp.Plan.load(os.environ["IPU_PIPELINE_PLAN"])
model, _, batch = built("bert-qa", num_stages=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with ipp.compile(
    model, plan, target=os.environ["IPU_PIPELINE_TARGET"], optimizer=optimizer, self_check=False
) as made:
    print(*(made.train_step(batch).loss for _ in range(2)))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_as_one_does(tmp_path: Path, plan_file: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINS)
    done = subprocess.run(
        [sys.executable, "-m", "ipu_pipeline", "launch", plan_file, "--threads", "2", "--", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.splitlines() == [
        "launch: 2 processes: 2 stages x 1 replica, 1f1b; threads of each: 2"
    ]
    threads, losses = done.stdout.splitlines()
    made, batch = compiled("bert-qa", target="local", planned={"num_stages": 2})
    with made:
        expected = [made.train_step(batch).loss for _ in range(2)]
    assert [float(loss) for loss in losses.split()] == pytest.approx(expected, abs=1e-6)
    assert threads == "threads 2"
