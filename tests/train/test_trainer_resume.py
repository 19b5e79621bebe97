"""Checkpoints, resuming and callbacks of the inherited loop."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ipu_pipeline.train.output_folder import locked
from tests.later import every_second
from tests.train.helpers import OURS, TWO_STAGES, load_script, losses, run_script

STEPS = {"num_train_epochs": 2, "num_train": 48, "dropout": 0.1, "do_eval": False}


@pytest.mark.parametrize("name", every_second(["qa", "classification"]))
def test_resuming_in_the_middle_of_an_epoch_gives_the_uninterrupted_run(tmp_path, name) -> None:
    whole = run_script(name, tmp_path / "whole", TWO_STAGES, **STEPS)
    first = run_script(
        name, tmp_path / "cut", TWO_STAGES, **STEPS, save_strategy="steps", save_steps=2
    )
    assert losses(first) == losses(whole)  # saving draws no random numbers
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    again = run_script(
        name, tmp_path / "again", TWO_STAGES, **STEPS, resume_from_checkpoint=checkpoint
    )
    assert again.state.global_step == 6
    assert losses(again) == losses(whole)
    for found, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_best_model_early_stopping_and_a_limit_of_checkpoints(tmp_path) -> None:
    trainer = run_script(
        "classification",
        tmp_path,
        TWO_STAGES,
        max_steps=40,
        patience=1,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
    )
    assert trainer.state.global_step == 4  # nothing is learned, so the second evaluation stops it
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    accuracies = losses(trainer, "eval_accuracy")
    assert len(set(accuracies)) == 1


def test_an_older_run_never_wins_a_resume(tmp_path, caplog) -> None:
    kept = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    run_script("qa", tmp_path, TWO_STAGES, max_steps=4, do_eval=False, **kept)
    trainer = run_script("qa", tmp_path, TWO_STAGES, max_steps=2, do_eval=False, **kept)
    assert "holds checkpoint-1, checkpoint-2, checkpoint-3 and 1 more of another" in caplog.text
    own = losses(trainer)
    for last in (3, 3):
        trainer.args.max_steps = last
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == last
        assert losses(trainer)[:2] == own
        # A save that was cut off is passed over.
        (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trainer.add_callback(_Stop())
    trainer.train()
    with pytest.raises(ValueError, match="no complete checkpoint of the last run in "):
        trainer.train(True)
    with locked(tmp_path), ThreadPoolExecutor(1) as pool:
        refused = pool.submit(trainer.train).exception()
    assert f"{tmp_path} is in use: process {os.getpid()} on " in str(refused)


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop, control.should_save = True, False


def test_tensorboard_gets_the_logs(tmp_path) -> None:
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = tmp_path / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
        trainer = run_script("qa", tmp_path, OURS, max_steps=3, report_to="tensorboard")
    events = event_file.EventAccumulator(str(logs)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(trainer))
    assert "eval/exact_match" in events.Tags()["scalars"]


def test_a_second_training_and_another_model_start_over(tmp_path) -> None:
    module = load_script("qa", TWO_STAGES)
    trainer = run_script("qa", tmp_path, TWO_STAGES, max_steps=2, dropout=0.1)
    first = trainer._steps.executable
    trainer.train()
    assert trainer._steps.executable is first
    assert trainer.state.global_step == 2
    config = trainer.model.config
    made = module.BertForQuestionAnswering
    fresh = with_model_init(made, config, trainer)
    fresh.train()
    model = fresh.model
    executable = fresh._steps.executable
    fresh.train()
    assert fresh.model is not model
    assert fresh._steps.executable is not executable
    assert fresh._steps.executable.model is fresh.model
    fresh.end()
    assert fresh._steps.executable is None


def with_model_init(made, config, trainer):
    return type(trainer)(
        model_init=lambda: made(config), args=trainer.args, train_dataset=trainer.train_dataset
    )
