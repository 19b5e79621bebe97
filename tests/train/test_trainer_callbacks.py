"""Callbacks of transformers, called by PipelineTrainer as by their Trainer."""

from __future__ import annotations

import pytest
from transformers import Trainer, TrainerCallback

from ipu_pipeline.train import PipelineTrainer
from tests.train.eager_executable import Questions, tiny_bert
from tests.train.test_trainer_losses import arguments

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
SCHEDULES = {
    "steps": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_strategy":
              "steps", "save_steps": 4, "num_train_epochs": 3, "max_steps": -1},
    "epochs": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch",
               "num_train_epochs": 2, "max_steps": -1},
    "max_steps": {"max_steps": 5, "logging_first_step": True, "logging_steps": 3},
}  # fmt: skip


class Recorder(TrainerCallback):
    """Writes down every event with the step, the epoch and what came with it."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        for name in EVENTS:
            setattr(self, name, self.recording(name))

    def recording(self, name):
        def record(args, state, control, **kwargs):
            logged = sorted(kwargs.get("logs", kwargs.get("metrics", {})))
            entry = (name, state.global_step, round(state.epoch or 0, 6), state.max_steps, logged)
            self.events.append(entry)

        return record


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_events_are_those_of_the_trainer(tmp_path, schedule) -> None:
    found = []
    for kind in (Trainer, PipelineTrainer):
        recorder = Recorder()
        args = arguments(
            tmp_path / kind.__name__, gradient_accumulation_steps=2, **SCHEDULES[schedule]
        )
        trainer = kind(
            tiny_bert(),
            args,
            train_dataset=Questions(14),
            eval_dataset=Questions(5, seed=2),
            callbacks=[recorder],
        )
        trainer.train()
        saved = sorted(p.name for p in (tmp_path / kind.__name__).glob("checkpoint-*"))
        found.append((recorder.events, saved))
    theirs, ours = found
    assert ours == theirs
    assert {"on_substep_end", "on_optimizer_step"} <= {event[0] for event in ours[0]}


def test_what_a_callback_asks_for_is_done(tmp_path) -> None:
    class Flags(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = state.global_step == 2
            control.should_save = state.global_step == 3
            control.should_training_stop = state.global_step == 5
            return control

    trainer = PipelineTrainer(
        tiny_bert(),
        arguments(tmp_path, max_steps=9, logging_strategy="no"),
        train_dataset=Questions(12),
        callbacks=[Flags],
    )
    assert trainer.train().global_step == 5
    assert [log["step"] for log in trainer.state.log_history] == [2, 5]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
