"""Checkpoints, resuming and callbacks of the inherited loop."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.train.helpers import OURS, TWO_STAGES, load_script, losses, run_script

STEPS = {"num_train_epochs": 2, "dropout": 0.1, "do_eval": False}


@pytest.mark.parametrize("name", ["classification", "qa"])
def test_resuming_in_the_middle_of_an_epoch_gives_the_uninterrupted_run(tmp_path, name) -> None:
    whole = run_script(name, tmp_path / "whole", TWO_STAGES, **STEPS)
    first = run_script(
        name, tmp_path / "cut", TWO_STAGES, **STEPS, save_strategy="steps", save_steps=3
    )
    assert losses(first) == losses(whole)  # saving draws no random numbers
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    again = run_script(
        name, tmp_path / "again", TWO_STAGES, **STEPS, resume_from_checkpoint=checkpoint
    )
    assert again.state.global_step == 8
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
    first = trainer._executable
    trainer.train()
    assert trainer._executable is first
    assert trainer.state.global_step == 2
    config = trainer.model.config
    made = module.BertForQuestionAnswering
    fresh = with_model_init(made, config, trainer)
    fresh.train()
    model = fresh.model
    executable = fresh._executable
    fresh.train()
    assert fresh.model is not model
    assert fresh._executable is not executable
    assert fresh._executable.model is fresh.model
    fresh.end()
    assert fresh._executable is None


def with_model_init(made, config, trainer):
    return type(trainer)(
        model_init=lambda: made(config), args=trainer.args, train_dataset=trainer.train_dataset
    )
