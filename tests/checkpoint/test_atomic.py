import os
import pathlib
import re
import resource
import signal
import time

import pytest

from ipu_pipeline.checkpoint import (
    directory,
    is_complete,
    read_checkpoint,
    weights,
    write_checkpoint,
    writer,
)
from tests.checkpoint.models import Tied, bert
from tests.train.kill_drill import DrillError


@pytest.mark.parametrize("limit", [100, 20_000, 50_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(saved, trained, limit):
    """The kernel refuses to write more than ``limit`` bytes into a file, as on a full disk."""
    model, optimizer = trained
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert max(map(len, before.values())) > 50_000
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError, match=r"too large|could not write"):
            write_checkpoint(saved, model=model, optimizer=optimizer, global_step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def killed_while(action):
    """Run ``action`` in a forked process that has to die by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise DrillError("the kill did not happen")


@pytest.mark.parametrize("point", ["save_settings", "write_shard", "write_manifest"])
def test_killed_while_saving(saved, trained, monkeypatch, point):
    model, optimizer = trained

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    new = saved.parent / "new"

    def save():
        monkeypatch.setattr(writer, point, die)
        write_checkpoint(new, model=model, optimizer=optimizer, global_step=8)

    killed_while(save)
    assert not new.exists()
    [left, lock] = sorted(p for p in saved.parent.iterdir() if p != saved)
    assert re.fullmatch(r"\.new\.incomplete\.[0-9a-f]{16}", left.name), "it cannot be guessed"
    assert lock.name == f"{left.name}.lock"
    assert not is_complete(left)
    write_checkpoint(new, model=model, optimizer=optimizer, global_step=8)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["c", "new"]


def test_killed_between_the_two_renames_of_a_replacement(saved, trained, monkeypatch):
    model, optimizer = trained

    def replace():
        rename = pathlib.Path.rename

        def die_on_second(self, target):
            rename(self, target)
            if target.name.endswith(".previous"):
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(pathlib.Path, "rename", die_on_second)
        write_checkpoint(saved, model=model, optimizer=optimizer, global_step=8)

    killed_while(replace)
    assert not saved.exists()
    assert read_checkpoint(saved, model=model, optimizer=optimizer).global_step == 7
    write_checkpoint(saved, model=model, optimizer=optimizer, global_step=9)
    assert read_checkpoint(saved, model=model, optimizer=optimizer).global_step == 9
    assert [p.name for p in saved.parent.iterdir()] == ["c"]


def test_killed_after_both_renames_of_a_replacement(saved, trained):
    model, optimizer = trained
    (saved.parent / ".c.previous").mkdir()
    read_checkpoint(saved, model=model, optimizer=optimizer)
    assert [p.name for p in saved.parent.iterdir()] == ["c"]


def test_a_live_writer_elsewhere_is_left_alone(tmp_path):
    """It holds a lock; what has none, or one that nobody holds, is of writers that are gone."""
    said, saying = os.pipe()
    writer = os.fork()
    if writer == 0:
        made = directory.AtomicDirectory(tmp_path / "a")
        os.write(saying, str(made).encode())
        time.sleep(1000)
        os._exit(1)
    os.read(said, 1)
    kept = set(tmp_path.iterdir())
    assert len(kept) == 2
    (tmp_path / ".d.incomplete.0").mkdir()
    (tmp_path / ".e.incomplete.1").mkdir()
    (tmp_path / ".e.incomplete.1.lock").touch()
    (tmp_path / ".f.incomplete.2.lock").touch()
    write_checkpoint(tmp_path / "c", model=Tied(), optimizer=None, global_step=0)
    assert set(tmp_path.iterdir()) == kept | {tmp_path / "c"}
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(said)
    os.close(saying)
    directory.remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


def test_a_lock_that_may_not_be_taken_counts_as_held(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    (tmp_path / ".a.incomplete.1").mkdir()
    (tmp_path / ".a.incomplete.1.lock").touch()
    monkeypatch.setattr(directory.FileLock, "acquire", refuse)
    directory.remove_stale(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_pickled(saved):
    endings = {p.suffix for p in saved.iterdir()}
    assert endings == {".json", ".safetensors"}


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bars_of_transformers_stay_as_they_were(tmp_path, capfd, shown):
    logging = weights.transformers_logging
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        write_checkpoint(tmp_path / "c", model=bert(), optimizer=None, global_step=0)
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
