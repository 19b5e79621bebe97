import copy
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import time
from functools import reduce

import pytest
import torch
from transformers import BertForQuestionAnswering

from ipu_pipeline import checkpoint
from ipu_pipeline.errors import CheckpointError
from ipu_pipeline.train import (
    TrainingArguments,
    build_optimizer,
    latest_checkpoint,
    list_checkpoints,
    output_folder,
    train,
)
from ipu_pipeline.train.checkpoints import find_resume_checkpoint
from ipu_pipeline.train.output_folder import RUN, locked
from tests.later import now
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert
from tests.train.kill_drill import DrillError
from tests.train.test_data import wordless_tokenizer

DATA = Questions(22)


class Killed(Exception):
    pass


class KillAt:
    def __init__(self, step):
        self.step = step

    def __call__(self, state, result):
        if state.global_step == self.step:
            raise Killed


def settings(folder, **changes):
    return TrainingArguments(
        output_dir=str(folder),
        disable_tqdm=True,
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.1,
            "logging_steps": 4,
            "save_steps": 3,
            "resume_from_checkpoint": "auto",
        }
        | changes,
    )


def run(arguments, on_step=None, executable_class=EagerExecutable, **kwargs):
    """Train a freshly made model, dropout on; one that resumes starts from other weights."""
    model = tiny_bert(seed=0 if latest_checkpoint(arguments.output_dir) is None else 99)
    executable = executable_class(
        model, build_optimizer(model, arguments), microbatches=arguments.gradient_accumulation_steps
    )
    return executable, train(executable, DATA, arguments, on_step=on_step, **kwargs)


def without_times(history):
    return [
        {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
        for log in history
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: 5 steps of 4 samples and one of 2 per epoch, 18 steps."""
    return run(settings(tmp_path_factory.mktemp("whole")))


# Before the first save, at one, after one, at the end; the others are acceptance tests.
@pytest.mark.parametrize("step", now([1, 9, 13, 18], [1, 4, 7, 9, 12, 13, 17, 18]))
def test_an_interrupted_run_computes_what_the_whole_run_does(tmp_path, whole, step):
    reference, expected = whole
    arguments = settings(tmp_path)
    with pytest.raises(Killed):
        run(arguments, KillAt(step))
    resumed, result = run(arguments)
    kept = (step - 1) // 3 * 3
    assert resumed.losses == reference.losses[kept:]
    assert without_times(result.log_history) == without_times(expected.log_history)
    assert result.training_loss == expected.training_loss
    torch.testing.assert_close(resumed.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert len(reference.losses) == result.global_step == resumed.global_step == 18


BY_EPOCH = {"logging_strategy": "epoch", "save_strategy": "epoch"}


@pytest.fixture(scope="module")
def whole_by_epoch(tmp_path_factory):
    return run(settings(tmp_path_factory.mktemp("whole"), **BY_EPOCH))


@pytest.mark.parametrize("step", now([6, 7], [5, 6, 7, 12]))
def test_epoch_strategies_resume_exactly(tmp_path, whole_by_epoch, step):
    _, expected = whole_by_epoch
    arguments = settings(tmp_path, **BY_EPOCH)
    with pytest.raises(Killed):
        run(arguments, KillAt(step))
    _, result = run(arguments)
    assert without_times(result.log_history) == without_times(expected.log_history)


@pytest.mark.parametrize("changes", [{}, {"max_steps": 8}])
def test_resuming_a_finished_run_does_nothing_more(tmp_path, changes):
    arguments = settings(tmp_path, **changes)
    _, first = run(arguments)
    executable, again = run(arguments)
    assert executable.losses == []
    assert again.global_step == first.global_step
    assert again.training_loss == first.training_loss


def test_more_steps_later_continue_in_the_middle_of_the_epoch(tmp_path, whole):
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    reference, _ = run(settings(tmp_path / "whole", max_steps=16, **constant))
    first, _ = run(settings(tmp_path / "cut", max_steps=8, **constant))
    second, _ = run(settings(tmp_path / "cut", max_steps=16, **constant))
    assert first.losses + second.losses == reference.losses


def test_kill_9_while_training(tmp_path, whole):
    reference, expected = whole
    pid = os.fork()
    if pid == 0:
        try:
            run(settings(tmp_path), lambda state, _: time.sleep(1000 * (state.global_step == 8)))
        finally:
            os._exit(1)
    ended = 0
    while len(list_checkpoints(tmp_path)) < 2 and not ended:
        time.sleep(0.01)  # it goes on for two steps at most
        ended, _ = os.waitpid(pid, os.WNOHANG)
    if ended:
        raise DrillError("the training ended before the kill")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    executable, result = run(settings(tmp_path))
    assert 0 < len(executable.losses) < 18
    assert executable.losses == reference.losses[-len(executable.losses) :]
    assert without_times(result.log_history) == without_times(expected.log_history)


def test_kill_9_while_saving(tmp_path, whole, monkeypatch):
    reference, expected = whole
    pid = os.fork()
    if pid == 0:
        try:

            def die(folder, content, *others):
                if content["global_step"] == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(folder, content, *others)

            write = checkpoint.writer.write_manifest
            monkeypatch.setattr(checkpoint.writer, "write_manifest", die)
            run(settings(tmp_path))
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise DrillError("the kill did not happen")
    left = [p.name for p in tmp_path.iterdir()]
    hidden = [name for name in left if name.startswith(".checkpoint-9.incomplete.")]
    own = [".run.lock", "run.json", "checkpoint-3", "checkpoint-6"]
    assert len(hidden) == 2, "the folder and its lock"
    assert sorted(left) == sorted([*own, *hidden])
    (tmp_path / ".checkpoint-3.incomplete.13").mkdir()  # of a deletion
    assert latest_checkpoint(tmp_path).name == "checkpoint-6"
    executable, result = run(settings(tmp_path))
    assert executable.losses == reference.losses[6:]
    assert without_times(result.log_history) == without_times(expected.log_history)
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]


# ---------------------------------------------------------------- which checkpoint


def test_what_a_checkpoint_folder_holds(tmp_path, whole):
    model = tiny_bert()
    arguments = settings(tmp_path, max_steps=3)
    executable = EagerExecutable(model, build_optimizer(model, arguments), microbatches=2)
    train(executable, DATA, arguments, tokenizer=wordless_tokenizer())
    path = tmp_path / "checkpoint-3"
    names = {p.name for p in path.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "optimizer.safetensors", "optimizer.json",
        "checkpoint.json", "trainer_state.json", "tokenizer.json",
    }  # fmt: skip
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    loaded = BertForQuestionAnswering.from_pretrained(path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_rotation_keeps_the_newest(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(settings(tmp_path, save_total_limit=2, save_steps=4))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-18"]
    assert "deleting" in caplog.text
    assert "save_total_limit is 2" in caplog.text


def test_a_resume_finishes_the_rotation_that_a_kill_has_cut_short(tmp_path, caplog):
    run(settings(tmp_path / "old"))
    run(settings(tmp_path, resume_from_checkpoint=None))
    shutil.copytree(tmp_path / "old" / "checkpoint-18", tmp_path / "checkpoint-24")
    run(settings(tmp_path, save_total_limit=2))  # nothing is left to train
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-15", "checkpoint-18", "checkpoint-24"]
    # A run that goes back, or on from elsewhere, deletes nothing before it has saved.
    run(settings(tmp_path, save_total_limit=1, resume_from_checkpoint=str(tmp_path / names[0]),
                 max_steps=15, save_strategy="steps"))  # fmt: skip
    outside = shutil.copytree(tmp_path / names[1], tmp_path / "kept" / names[1])
    run(settings(tmp_path, save_total_limit=1, resume_from_checkpoint=str(outside)))
    assert [p.name for p in list_checkpoints(tmp_path)] == names
    assert outside.is_dir()


def test_rotation_deletes_only_after_the_new_one_is_complete(tmp_path):
    arguments = settings(tmp_path, save_total_limit=1)

    class FullDisk(EagerExecutable):
        def save_checkpoint(self, path, extra=None, **options):
            if self.global_step == 9:
                raise OSError(28, "No space left on device")
            return super().save_checkpoint(path, extra, **options)

    with pytest.raises(OSError, match="No space left on device"):
        run(arguments, executable_class=FullDisk)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-6"


# ---------------------------------------------------------------- whose checkpoints


def test_an_older_run_never_wins_a_resume(tmp_path, whole, caplog):
    reference, expected = whole
    run(settings(tmp_path, max_steps=9, learning_rate=0.5))
    with pytest.raises(Killed):  # before it has a checkpoint of its own
        run(settings(tmp_path, resume_from_checkpoint=None), KillAt(2))
    assert "holds checkpoint-3, checkpoint-6, checkpoint-9 of another run" in caplog.text
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of its last run"):
        run(settings(tmp_path, resume_from_checkpoint="latest"))
    with pytest.raises(Killed):
        run(settings(tmp_path, save_total_limit=1), KillAt(7))
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    # The older run's are not deleted in place of the own ones that are too many.
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-9"]
    resumed, result = run(settings(tmp_path))
    assert resumed.losses == reference.losses[6:]
    assert without_times(result.log_history) == without_times(expected.log_history)


def test_a_run_that_goes_back_does_not_jump_forward_again(tmp_path, whole, caplog):
    reference, _ = whole
    with pytest.raises(Killed):
        run(settings(tmp_path), KillAt(10))
    for step in (4, 7):  # without and with a checkpoint of its own
        back = "auto" if step > 4 else str(tmp_path / "checkpoint-3")
        with pytest.raises(Killed):
            run(settings(tmp_path, resume_from_checkpoint=back), KillAt(step))
        kept = (step - 1) // 3 * 3
        assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{kept}"
    said = "holds checkpoint-6, checkpoint-9 of the run that went on behind checkpoint-3: this one"
    assert caplog.text.count("does not resume") == 2
    assert said in caplog.text
    resumed, _ = run(settings(tmp_path))
    assert resumed.losses == reference.losses[6:]
    elsewhere = settings(
        tmp_path / "other", resume_from_checkpoint=str(tmp_path / "checkpoint-6"), max_steps=8
    )
    with pytest.raises(Killed):
        run(elsewhere, KillAt(7))
    assert latest_checkpoint(tmp_path / "other") == tmp_path / "checkpoint-6"


def test_a_folder_that_does_not_say_which_run_is_the_last(tmp_path):
    for name in ("one", "other"):
        run(settings(tmp_path / name, max_steps=3 if name == "one" else 6))
    (tmp_path / "one" / "checkpoint-3").rename(tmp_path / "other" / "checkpoint-9")
    (tmp_path / "other" / RUN).unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3, checkpoint-6, checkpoint-9 of several run"
    ):
        run(settings(tmp_path / "other"))
    (tmp_path / "other" / RUN).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read the run .*run.json: "):
        run(settings(tmp_path / "other"))


def hold(folder, said):
    with locked(folder):
        os.write(said, b"held")
        time.sleep(100)


def test_one_run_at_a_time_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "_DYING_S", 0.1)
    said, saying = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, saying))
    process.start()
    assert os.read(said, 4) == b"held"
    place = rf"{tmp_path} is in use: process {process.pid} on {socket.gethostname()} trains into it"
    with pytest.raises(CheckpointError, match=f"{place}; wait until it ends, or choose another"):
        run(settings(tmp_path))
    run(settings(tmp_path, max_steps=1, save_strategy="no"))  # writes nothing there
    monkeypatch.undo()
    process.kill()
    (tmp_path / ".0123456789abcdef.partial").touch()  # a killed process was writing
    run(settings(tmp_path, max_steps=1))  # at once
    process.join()
    os.close(said), os.close(saying)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run.lock", "checkpoint-1", "run.json"]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot train into .*file/out: Not a directory"):
        run(settings(tmp_path / "file" / "out"))


def test_latest_passes_over_what_is_incomplete(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    run(settings(tmp_path, max_steps=9))
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-9" / "optimizer.safetensors").write_bytes(b"cut")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


def test_which_checkpoint_is_resumed(tmp_path):
    def find(value):
        return find_resume_checkpoint(settings(tmp_path, resume_from_checkpoint=value))

    assert find("auto") is None
    assert find(None) is find("false") is None
    with pytest.raises(
        CheckpointError, match=r"is 'latest' and .* holds no complete checkpoint of i"
    ):
        find("latest")
    run(settings(tmp_path, max_steps=6))
    for value in ("auto", "latest", "true", True, str(tmp_path / "checkpoint-6")):
        assert find(value) == tmp_path / "checkpoint-6"
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        run(settings(tmp_path, resume_from_checkpoint=str(tmp_path / "nothing")))


# ---------------------------------------------------------------- what does not fit


def test_another_order_of_the_data_is_refused(tmp_path):
    run(settings(tmp_path, max_steps=9))
    other = settings(tmp_path, seed=7, per_device_train_batch_size=1)
    with pytest.raises(
        CheckpointError,
        match="cannot be continued batch for batch: batch_size was 4 and is 2, seed was 42 and "
        "is 7; restore them, or load it with exec",
    ):
        run(other)


def test_another_factoring_of_the_batch_goes_on(tmp_path):
    run(settings(tmp_path, max_steps=9))
    changed = settings(
        tmp_path, max_steps=12, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    with pytest.raises(CheckpointError, match="samples_per_epoch was 22 and is 20"):
        run(changed)
    changed = settings(
        tmp_path, max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    executable, _ = run(changed)
    assert len(executable.losses) == 3


def test_a_checkpoint_that_train_did_not_write(tmp_path):
    model = tiny_bert()
    executable = EagerExecutable(model, build_optimizer(model, TrainingArguments()))
    path = executable.save_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"was not written by train\(\) of this version"):
        run(settings(tmp_path, resume_from_checkpoint=str(path)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("state.global_step", -5, "Expected `int` >= 0"),
        ("state.global_step", float("nan"), "Expected `int`, got `float`"),
        ("state", {}, "missing required field `global_step`"),
        ("state.total_flos", -1.0, "Expected `float` >= 0"),
        ("state.best_metric", "x", "Expected `float . null`"),
        ("state.best_global_step", -1, "Expected `int` >= 0"),
        ("state.trial_params", [], "Expected `object . null`"),
        ("state.log_history", [3], "Expected `object`"),
        ("state.log_history", {}, "Expected `array`"),
        ("losses.steps", 10**30, "Expected `int` <= "),
        ("losses.total", None, "Expected `float`"),
        ("losses.skipped", 4, "losses of 3 steps, 4 of them skipped"),
        ("data", 3, "'int' object is not a mapping"),
        ("scheduler", "x", "scheduler is 'x'"),
        ("scheduler.base_lrs", [], r"scheduler.base_lrs is \[\]"),
        ("scheduler.last_epoch", -1, "scheduler.last_epoch is -1"),
        ("scheduler._last_lr", [float("nan")] * 2, r"scheduler._last_lr\[0\] is nan"),
        ("scheduler._is_initial", None, "scheduler._is_initial is None"),
    ],
)
def test_a_position_that_makes_no_sense_is_refused_before_anything_is_loaded(
    written, place, value, message
):
    folder, training = written
    *outer, last = place.split(".")
    changed = copy.deepcopy(training)
    reduce(dict.__getitem__, outer, changed)[last] = value
    model = tiny_bert(seed=5)
    executable = EagerExecutable(model, build_optimizer(model, settings(folder)), microbatches=2)
    path = executable.save_checkpoint(folder / "checkpoint-1", {"training": changed})
    executable.model.load_state_dict(tiny_bert(seed=6).state_dict())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"was not written by train.*{message}"):
        train(executable, DATA, settings(folder, resume_from_checkpoint=str(path)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder, and the position in a checkpoint of it."""
    folder = tmp_path_factory.mktemp("written")
    run(settings(folder, max_steps=3))
    return folder, checkpoint.read_extra(folder / "checkpoint-3")["training"]
