"""Writing while training goes on, and what waits for it."""

import logging
import multiprocessing
import threading

import pytest
import torch

from ipu_pipeline import checkpoint
from ipu_pipeline.checkpoint import Background, is_complete, write_checkpoint
from ipu_pipeline.checkpoint.writer import Shard
from tests.backends.cluster.jobs import compiled
from tests.backends.cluster.saving_jobs import files
from tests.checkpoint.models import one_step

PLANNED = {"num_stages": 2}


@pytest.fixture
def held_up(monkeypatch):
    """Nothing is written until the event is set."""
    go_on = threading.Event()
    write = checkpoint.writer.write_shard
    monkeypatch.setattr(
        checkpoint.writer, "write_shard", lambda *args: go_on.wait(60) and write(*args)
    )
    yield go_on
    go_on.set()


@pytest.fixture
def full(monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.writer, "write_shard", fail)


def test_it_holds_what_was_there_when_it_was_asked_for(trained, tmp_path, held_up):
    model, optimizer = trained
    held_up.set()
    kwargs = {"model": model, "optimizer": optimizer, "global_step": 2}
    extra = {"losses": [1.0]}
    now = write_checkpoint(tmp_path / "now", extra=extra, **kwargs)
    held_up.clear()
    background = Background()
    later = write_checkpoint(tmp_path / "later", background=background, extra=extra, **kwargs)
    extra["losses"].append(2.0)
    one_step(model, optimizer)
    model.config.hidden_dropout_prob = 0.9
    optimizer.param_groups[0]["lr"] = 9.0
    assert not later.exists()
    held_up.set()
    background.wait()
    assert files(later) == files(now)
    for name in ("config.json", "optimizer.json"):
        assert (later / name).read_bytes() == (now / name).read_bytes()
    one = checkpoint.read_manifest(now)
    assert checkpoint.read_manifest(later)["extra"] == one["extra"] == {"losses": [1.0]}


def test_another_save_in_this_process_leaves_it_alone(trained, tmp_path, held_up):
    model, _ = trained
    background = Background()
    kwargs = {"model": model, "optimizer": None, "global_step": 0}
    write_checkpoint(tmp_path / "a", background=background, **kwargs)
    checkpoint.directory.remove_stale(tmp_path)
    held_up.set()
    background.wait()
    assert is_complete(tmp_path / "a")


@pytest.mark.parametrize("how", ["save", "load", "wait", "close"])
def test_an_error_waits_for_the_next_call(tmp_path, full, how, caplog):
    made, batch = compiled("bert-qa", planned=PLANNED, target="local")
    made.train_step(batch)
    made.save_checkpoint(tmp_path / "a", blocking=False)
    made.train_step(batch)
    call = {
        "save": lambda: made.save_checkpoint(tmp_path / "b"),
        "load": lambda: made.load_checkpoint(tmp_path / "a"),
        "wait": made.wait_for_checkpoint,
        "close": made.close,
    }[how]
    with pytest.raises(OSError, match="No space left on device"):
        call()
    assert "a checkpoint could not be written: [Errno 28]" in caplog.text
    made.wait_for_checkpoint()
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_the_callers_own_error_goes_on(tmp_path, full, caplog):
    def run(error=None):
        made, _ = compiled("bert-qa", planned=PLANNED, target="local")
        with made:
            made.save_checkpoint(tmp_path / "a", blocking=False)
            if error is not None:
                raise error

    with caplog.at_level(logging.ERROR), pytest.raises(KeyError):
        run(KeyError("mine"))
    assert "could not be written" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        run()


def test_the_process_waits_before_it_ends(tmp_path):
    def save():
        torch.set_num_threads(1)
        model = torch.nn.Linear(3, 3)
        go_on = threading.Event()
        write = checkpoint.writer.write_shard
        checkpoint.writer.write_shard = lambda *args: go_on.wait(60) and write(*args)
        write_checkpoint(
            tmp_path / "a", model=model, optimizer=None, global_step=0, background=Background()
        )
        threading.Timer(0.2, go_on.set).start()

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert is_complete(tmp_path / "a")


def test_files_that_were_attached_may_change(trained, tmp_path):
    model, _ = trained

    def attach(folder):
        (folder / "notes.txt").write_text("one")
        (folder / "more").mkdir()
        (folder / "more" / "notes.txt").write_text("two")

    path = write_checkpoint(
        tmp_path / "a", model=model, optimizer=None, global_step=0, attach=attach
    )
    (path / "notes.txt").write_text("three")
    assert is_complete(path)
    assert "notes.txt" not in checkpoint.read_manifest(path)["files"]


def test_nothing_is_left_when_attaching_fails(trained, tmp_path):
    def attach(folder):
        raise KeyError(folder)

    with pytest.raises(KeyError):
        write_checkpoint(
            tmp_path / "a", model=trained[0], optimizer=None, global_step=0, attach=attach
        )
    assert list(tmp_path.iterdir()) == []


def test_a_part_without_tensors_may_have_values():
    assert Shard({"model": {}}).is_empty
    assert not Shard({"model": {}}, {"weight": {"step": 1}}).is_empty
