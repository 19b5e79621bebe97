"""The worker as a process: it trains, dies, is interrupted, and never outlives its reason."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ipu_pipeline.backends.ipu import worker as worker_module
from ipu_pipeline.backends.ipu.runtime import serve
from ipu_pipeline.backends.ipu.sdk_python import SdkPython, doctor, find_sdk_python
from ipu_pipeline.backends.ipu.worker import Worker
from ipu_pipeline.errors import LoweringError, StageError
from tests.backends.ipu.emulated import assert_same_weights, case


def test_a_worker_trains_and_dies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = case()
    device = made.compile(sdk_python=f"{sys.executable} --emulate")
    with made.local() as local:
        for seed in range(2):
            batch = made.batch(seed)
            loss = device.train_step(batch).loss
            assert loss == pytest.approx(local.train_step(batch).loss, abs=1e-6)
        device.state_dict()
        assert_same_weights(made.model, local.model)
        assert "the stand-in takes the place of poptorch" in caplog.text
        assert "worker: compiling the training program" in caplog.text
        device.train_step(made.batch(2))
        process = device._worker._process
        os.kill(process.pid, signal.SIGKILL)
        message = r"died by signal SIGKILL in the command 'train'.*fetched last(.|\n)*compiling"
        for _ in range(2):
            with pytest.raises(StageError, match=message):
                device.train_step(made.batch(3))
        device.close()
        assert "the weights are those that were fetched last" in caplog.text
        assert_same_weights(made.model, local.model)
    assert process.returncode == -signal.SIGKILL
    assert not Path(device._folder.name).exists()


def test_a_worker_without_its_parent_removes_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "plan.json").touch()
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    serve._end_with(os.getppid() + 1, tmp_path / "bundle")
    assert ended == [1]
    assert not list(tmp_path.iterdir())


@pytest.mark.acceptance
def test_a_process_that_is_killed_leaves_no_bundle(tmp_path: Path) -> None:
    lines = (
        "import os, sys",
        "from tests.backends.ipu.emulated import case",
        "case().compile(sdk_python=f'{sys.executable} --emulate')",
        "os.kill(os.getpid(), 9)",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=False, env=os.environ | {
            "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)
        },
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while list(tmp_path.glob("ipu-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def _script(folder: Path, text: str) -> SdkPython:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return SdkPython(str(path))


@pytest.mark.parametrize(
    ("text", "how"),
    [("echo no licence; exit 3", "with exit status 3"), ("kill -TERM $$", "by signal SIGTERM")],
)
def test_a_worker_that_dies_while_it_starts(text: str, how: str, tmp_path: Path) -> None:
    said = "no licence" if "echo" in text else r"\(nothing\)"
    with pytest.raises(StageError, match=rf"died {how} in the command 'start'(.|\n)*  {said}"):
        Worker(_script(tmp_path, text), tmp_path)


def test_ctrl_c_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    plain = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(plain(*args, **options))
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        return started[0]

    monkeypatch.setattr(worker_module.subprocess, "Popen", popen)
    # A run in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Worker(_script(tmp_path, "exec sleep 100"), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == -signal.SIGKILL


def test_without_poptorch_the_worker_says_so() -> None:
    with pytest.raises(LoweringError, match=r"cannot import poptorch: .*source the SDK's enable"):
        case().compile(sdk_python=sys.executable)


# ---- which Python ---------------------------------------------------------------------------


def test_nothing_is_named() -> None:
    message = (
        r"sdk_python='/path.*IPU_PIPELINE_SDK_PYTHON.*ipu-pipeline emit.*run bundle/ --emulate"
    )
    with pytest.raises(LoweringError, match=message):
        find_sdk_python(None)


def test_what_is_named_is_no_program() -> None:
    with pytest.raises(LoweringError, match=r"names '/nowhere/python', which is no file that can"):
        find_sdk_python("/nowhere/python --emulate")


def test_a_program_that_is_no_python() -> None:
    with pytest.raises(LoweringError, match=r"/false does not run as Python"):
        find_sdk_python("false").versions()


def test_the_stand_in_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipu_pipeline_emulator", None)
    with pytest.raises(LoweringError, match=r"the stand-in for poptorch is not installed"):
        find_sdk_python("--emulate")


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "IPU_PIPELINE_SDK_PYTHON"
    monkeypatch.setenv(name, "--emulate")
    state, why = doctor()
    assert state == "ready"
    assert f"torch {version('torch')}" in why
    assert "poptorch the stand-in, on the CPU" in why
    monkeypatch.setenv(name, sys.executable)
    assert doctor()[0] == "unavailable"
    assert "poptorch is missing" in doctor()[1]
    monkeypatch.setenv(name, "/nowhere")
    assert "which is no file" in doctor()[1]
