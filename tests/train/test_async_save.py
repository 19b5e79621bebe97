"""Training that does not wait for its checkpoints."""

import logging

import pytest
import torch

from ipu_pipeline import checkpoint
from ipu_pipeline.train import latest_checkpoint, list_checkpoints
from ipu_pipeline.train.output_folder import LOCK
from tests.train.test_data import wordless_tokenizer
from tests.train.test_resume import (
    KillAt,
    Killed,
    run,
    settings,
    without_times,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(settings(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("step", [4, 12])
def test_an_interrupted_run_computes_what_the_whole_run_does(tmp_path, whole, step):
    reference, expected = whole
    arguments = settings(tmp_path, async_save=True, save_total_limit=1)
    with pytest.raises(Killed):
        run(arguments, KillAt(step))
    kept = (step - 1) // 3 * 3
    assert latest_checkpoint(tmp_path).name == f"checkpoint-{kept}"
    resumed, result = run(arguments)
    assert resumed.losses == reference.losses[kept:]
    assert without_times(result.log_history) == without_times(expected.log_history)
    torch.testing.assert_close(resumed.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-18"]


def test_the_folder_has_everything_when_it_appears(tmp_path):
    arguments = settings(tmp_path, async_save=True, max_steps=3)
    run(arguments, tokenizer=wordless_tokenizer())
    names = {p.name for p in (tmp_path / "checkpoint-3").iterdir()}
    assert names >= {"trainer_state.json", "tokenizer_config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.glob(".*")] == [LOCK]


def test_deletion_waits_until_the_new_one_is_complete(tmp_path, monkeypatch, caplog):
    found = []
    write = checkpoint.writer.write_shard

    def look(*args):
        found.append([p.name for p in list_checkpoints(tmp_path)])
        return write(*args)

    monkeypatch.setattr(checkpoint.writer, "write_shard", look)
    with caplog.at_level(logging.INFO):
        run(settings(tmp_path, async_save=True, save_total_limit=1, max_steps=9))
    assert found == [[], ["checkpoint-3"], ["checkpoint-6"]]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9"]


def test_an_error_in_the_background_ends_training_and_loses_nothing(tmp_path, monkeypatch):
    write = checkpoint.writer.write_shard
    number = []

    def fail_third(*args):
        number.append(1)
        if len(number) == 3:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(checkpoint.writer, "write_shard", fail_third)
    with pytest.raises(OSError, match="No space left on device"):
        run(settings(tmp_path, async_save=True, save_total_limit=1))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-6"]
    assert [path.name for path in tmp_path.glob(".*")] == [LOCK]


def test_a_replacement_that_was_cut_off_is_found(tmp_path):
    arguments = settings(tmp_path, max_steps=3)
    run(arguments)
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.previous")
    assert latest_checkpoint(tmp_path) is None
    executable, _ = run(arguments)
    assert executable.losses == []  # it resumes at the last step
