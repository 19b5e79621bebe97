"""Processes that are really started: exit codes, restarts, signals, and a training script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.launch.torchrun import _own_folder
from tests.backends.cluster.jobs import compiled
from tests.backends.cluster.listening import LOOPBACK, TABLES
from tests.backends.cluster.processes import ROOT, forked, launch

# Waits for nobody: rank 0 is ended by the launcher when rank 1 fails.
FAILS = """
import os, sys, time
print("start", os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
open(f"up-{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").close()
while not os.path.exists(f"up-0-{os.environ['TORCHELASTIC_RESTART_COUNT']}"):
    time.sleep(0.01)  # the first rank has printed
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] in sys.argv[2:]:
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
    if sys.argv[1] == "raise":
        raise ValueError("mine")
    if sys.argv[1] == "record":
        from torch.distributed.elastic.multiprocessing.errors import record
        @record
        def fail(): raise ValueError("mine")
        fail()
    if sys.argv[1] == "blame":
        from torch.distributed.elastic.multiprocessing.errors import record
        class StageError(Exception): pass
        @record
        def fail(): raise StageError("rank 0 failed (a step): ValueError: its own; rank 1 stopped")
        fail()
    sys.exit(int(sys.argv[1]))
time.sleep(60 * (sys.argv[2] != "0" or os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"))
"""


@dataclass
class Launched:
    """Starts a script in two processes, from a process of its own."""

    folder: Path

    def __call__(
        self, script: str, *arguments: str, logs: str = "", **changes: int
    ) -> subprocess.CompletedProcess[str]:
        (self.folder / "script.py").write_text(script)
        process = forked(launch, self.folder, logs, ("script.py", *arguments), changes)
        process.join(100)
        assert process.exitcode is not None
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess((), process.exitcode, out, err)

    def kept(self) -> list[Path]:
        """Return the temporary folders that are left."""
        return list(self.folder.glob("ipu-pipeline-launch-*"))


@pytest.fixture
def launched(tmp_path: Path) -> Launched:
    return Launched(tmp_path)


TALKS = """
import os, sys
rank = os.environ["RANK"]
print("out", rank, os.environ["IPU_PIPELINE_PLAN"])
print("err", rank, file=sys.stderr)
"""


def test_of_the_other_ranks_errors_are_shown_with_their_rank(launched: Launched) -> None:
    done = launched(TALKS)
    assert done.returncode == 0
    assert done.stdout == f"out 0 {launched.folder}/plan.json\n"
    assert sorted(done.stderr.splitlines()) == ["[rank1]:err 1", "err 0"]
    assert not launched.kept()


def test_a_folder_keeps_what_every_rank_writes(launched: Launched) -> None:
    done = launched(TALKS, logs="logs")
    assert done.stdout == f"[rank0]:out 0 {launched.folder}/plan.json\n"
    assert sorted(done.stderr.splitlines()) == ["[rank0]:err 0", "[rank1]:err 1"]
    found = {
        str(p.relative_to(p.parents[1])): p.read_text() for p in launched.folder.rglob("*.log")
    }
    assert found["0/stdout.log"] == f"out 0 {launched.folder}/plan.json\n"
    assert found["1/stdout.log"] == f"out 1 {launched.folder}/plan.json\n"
    assert found["1/stderr.log"] == "err 1\n"


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("3", 3, "error: rank 1 ended with exit code 3\n"),
        ("raise", 1, "[rank1]:ValueError: mine\n"),
        ("record", 1, "error: rank 1 ended with exit code 1: ValueError: mine\n"),
        ("blame", 1, "error: rank 0 failed (a step): ValueError: its own; rank 1 stopped\n"),
        ("kill", 137, "error: rank 1 ended by SIGKILL\n"),
    ],
)
def test_a_failing_script_gives_its_exit_code(
    launched: Launched, how: str, code: int, told: str
) -> None:
    done = launched(FAILS, how, "0")
    assert done.returncode == code
    assert told in done.stderr
    [folder] = launched.kept()
    assert f"what the ranks wrote: {folder}\n" in done.stderr
    assert "ChildFailedError" not in done.stderr


def test_a_restart_may_end_well(launched: Launched) -> None:
    done = launched(FAILS, "kill", "0", max_restarts=2)
    assert done.returncode == 0
    assert "failed (exitcode: -9) local_rank: 1" in done.stderr
    assert done.stdout.splitlines() == ["start 0 0", "start 0 1"]


def test_restarts_come_to_an_end(launched: Launched) -> None:
    done = launched(FAILS, "5", "0", "1", max_restarts=1)
    assert done.returncode == 5
    assert done.stdout.splitlines() == ["start 0 0", "start 0 1"]


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


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "error: stopped by SIGTERM; what the ranks wrote: "),
        (signal.SIGINT, 130, "interrupted; what the ranks wrote: "),
    ],
)
def test_signals_end_the_ranks(
    tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    (tmp_path / "script.py").write_text(WAITS)
    process = forked(launch, tmp_path, "", ("script.py", str(tmp_path)), {})
    out = tmp_path / "out"
    while process.is_alive() and not (out.exists() and out.read_text().endswith("\n")):
        time.sleep(0.01)
    assert out.read_text() == "up\n"
    os.kill(process.pid, number)
    process.join(100)
    messages = (tmp_path / "err").read_text()
    assert process.exitcode == code
    assert {"0", "1"} < {path.name for path in tmp_path.iterdir()}
    assert said in messages
    if number == signal.SIGINT:
        assert len(messages.splitlines()) == 1  # nothing of the agent, no traceback of a rank


TRAINS = """
import os, pathlib, sys, torch
print("threads", torch.get_num_threads())
import ipu_pipeline as ipp
from tests.backends.cluster.jobs import built
from tests.backends.cluster.listening import listening

plan = ipp.Plan.load(os.environ["IPU_PIPELINE_PLAN"])
model, _, batch = built("bert-qa", num_stages=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with ipp.compile(
    model, plan, target=os.environ["IPU_PIPELINE_TARGET"], optimizer=optimizer, self_check=False
) as made:
    print(*(made.train_step(batch).loss for _ in range(2)))
    addresses = listening([os.getpid(), os.getppid()])
pathlib.Path(sys.argv[1], "addresses-" + os.environ["RANK"]).write_text(" ".join(addresses))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_as_one_does_and_listen_on_loopback_only(
    tmp_path: Path, plan_file: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINS)
    command = [sys.executable, "-m", "ipu_pipeline", "launch", plan_file, "--threads", "2"]
    done = subprocess.run(
        [*command, "--", script, tmp_path],
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
    for rank in range(2):
        addresses = set((tmp_path / f"addresses-{rank}").read_text().split())
        assert addresses or not any(map(Path.exists, TABLES))  # only Linux tells
        assert addresses <= LOOPBACK


def test_what_a_killed_launch_has_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running, lock = _own_folder()
    killed, other_lock = _own_folder()
    other_lock.release()  # as the end of its process does
    failed = tmp_path / "ipu-pipeline-launch-of-a-failure"
    failed.mkdir()
    planted = tmp_path / "ipu-pipeline-launch-planted"
    planted.symlink_to(tmp_path / "elsewhere")
    found, last = _own_folder()
    assert sorted(tmp_path.iterdir()) == sorted([running, failed, planted, found])
    assert killed not in (running, found)
    lock.release()
    last.release()


@pytest.mark.acceptance
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("number", "rank"), [("SIGTERM", 1), ("SIGHUP", 0), ("SIGTERM", 0)])
def test_a_signal_to_one_rank_accuses_no_other(
    tmp_path: Path, plan_file: Path, number: str, rank: int
) -> None:
    script = tmp_path / "script.py"
    stopped = f'os.environ["RANK"] == "{rank}" and os.kill(os.getpid(), signal.{number})'
    loop = f"for _ in range(100):\n        made.train_step(batch)\n        {stopped}\n"
    script.write_text(TRAINS.replace("import os", "import os, signal").split("print(*")[0] + loop)
    done = subprocess.run(
        [sys.executable, "-m", "ipu_pipeline", "launch", plan_file, "--", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 128 + signal.Signals[number]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: rank {rank} ended by {number}"]
    assert "no sign of life" not in done.stderr
