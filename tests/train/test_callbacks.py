import copy
import logging

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers import TrainingArguments as TheirArguments
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback

from ipu_pipeline.train import TrainingArguments, build_optimizer, build_scheduler, train
from ipu_pipeline.train.callbacks import Events
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Writes down every event with the step, the epoch and what came with it."""

    def __init__(self):
        self.events = []
        for name in EVENTS:
            setattr(self, name, self.recording(name))

    def recording(self, name):
        def record(args, state, control, **kwargs):
            assert {"model", "optimizer", "lr_scheduler", "train_dataloader"} <= kwargs.keys()
            logged = sorted(kwargs.get("logs", kwargs.get("metrics", {})))
            entry = (name, state.global_step, round(state.epoch or 0, 6), state.max_steps, logged)
            self.events.append(entry)

        return record

    @property
    def names(self):
        return [event[0] for event in self.events]


SCHEDULES = {
    "steps": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 4},
    "epochs": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
    "max_steps": {"max_steps": 5, "logging_first_step": True, "eval_strategy": "no",
                  "save_strategy": "no", "logging_steps": 3},
    "delayed": {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 4, "eval_on_start": True,
                "save_strategy": "no"},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_samples", [8, 7])
def test_events_are_those_of_the_trainer(tmp_path, schedule, num_samples):
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        **SCHEDULES[schedule],
    }
    data, eval_data = Questions(num_samples), Questions(5, seed=2)
    theirs, ours = Recorder(), Recorder()
    Trainer(
        tiny_bert(),
        TheirArguments(
            output_dir=str(tmp_path / "theirs"),
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=data,
        eval_dataset=eval_data,
        callbacks=[theirs],
    ).train()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "ours"), disable_tqdm=True, max_grad_norm=1.0, **settings
    )
    model = tiny_bert()
    executable = EagerExecutable(model, build_optimizer(model, arguments))
    train(executable, data, arguments, eval_dataset=eval_data, callbacks=[ours])
    assert ours.events == [
        (*event[:4], [k for k in event[4] if k != "eval_model_preparation_time"])
        for event in theirs.events
    ]
    folders = [sorted(p.name for p in (tmp_path / x).glob("*-*")) for x in ("ours", "theirs")]
    assert folders[0] == folders[1]


def test_losses_norms_rates_and_weights_are_those_of_the_trainer(tmp_path):
    """With all data in one batch the order of samples cannot matter."""
    settings = {
        "num_train_epochs": 6,
        "per_device_train_batch_size": 12,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.5,
        "disable_tqdm": True,
        # Some gradients are 0 but for rounding; Adam must not blow that up.
        "adam_epsilon": 1e-3,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data = Questions(12)
    theirs, ours = tiny_bert(**no_dropout), tiny_bert(**no_dropout)
    trainer = Trainer(
        theirs,
        TheirArguments(
            output_dir=str(tmp_path), use_cpu=True, dataloader_pin_memory=False,
            optim="adamw_torch", warmup_steps=2, **settings,
        ),
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=2, **settings)
    executable = EagerExecutable(ours, build_optimizer(ours, arguments), max_grad_norm=0.5)
    result = train(executable, data, arguments)
    assert len(result.log_history) == len(trainer.state.log_history) == 7
    assert result.log_history[-2]["loss"] < result.log_history[0]["loss"]
    for mine, wanted in zip(result.log_history, trainer.state.log_history, strict=True):
        assert mine.keys() == wanted.keys()
        for name in ("loss", "grad_norm", "learning_rate", "epoch", "step", "train_loss"):
            if name in wanted:
                assert mine[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert result.metrics["total_flos"] == trainer.state.total_flos
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


def run(tmp_path, callbacks, eval_losses=(), **settings):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        disable_tqdm=True,
        **{"num_train_epochs": 3, "save_strategy": "no"} | settings,
    )
    model = tiny_bert()
    executable = EagerExecutable(model, build_optimizer(model, arguments))
    losses = iter(eval_losses)
    eval_fn = (lambda executable: {"loss": next(losses)}) if eval_losses else None
    return train(executable, Questions(12), arguments, callbacks=callbacks, eval_fn=eval_fn)


def test_early_stopping_goes_back_to_the_best_checkpoint(tmp_path):
    weights = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            weights[state.global_step] = copy.deepcopy(kwargs["model"].state_dict())
            self.model = kwargs["model"]

    keep = Keep()
    result = run(
        tmp_path,
        [EarlyStoppingCallback(2), keep],
        eval_losses=[5.0, 4.0, float("nan"), 4.5, 4.6],
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    assert result.global_step == 4
    assert result.best_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    torch.testing.assert_close(keep.model.state_dict(), weights[2], rtol=0, atol=0)


def test_control_flags(tmp_path):
    class Flags(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1
            control.should_log = state.global_step == 2
            control.should_save = state.global_step == 3
            control.should_training_stop = state.global_step == 5
            return control

    recorder = Recorder()
    result = run(tmp_path, [Flags, recorder], logging_strategy="no")
    assert result.global_step == 5
    assert [h["step"] for h in result.log_history] == [2, 5]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    ends = [event[1] for event in recorder.events if event[0] == "on_epoch_end"]
    assert ends == [1, 4, 5]


def test_the_optimizer_events_surround_the_update(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(kwargs["model"].qa_outputs.weight.detach().clone())
            assert kwargs["model"].qa_outputs.weight.grad is not None

        def on_optimizer_step(self, args, state, control, **kwargs):
            assert not torch.equal(seen[-1], kwargs["model"].qa_outputs.weight)
            assert kwargs["model"].qa_outputs.weight.grad is not None

    run(tmp_path, [Watch], max_steps=2)
    assert len(seen) == 2


def test_the_hooks_are_gone_afterwards_also_after_an_error(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.optimizer = kwargs["optimizer"]
            raise RuntimeError("out of coffee")

    fail = Fail()
    with pytest.raises(RuntimeError, match="out of coffee"):
        run(tmp_path, [fail])
    assert not fail.optimizer._optimizer_step_pre_hooks
    assert not fail.optimizer._optimizer_step_post_hooks


def test_a_flow_callback_of_the_users_replaces_the_default(tmp_path):
    class Flow(DefaultFlowCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    assert run(tmp_path, [Flow]).global_step == 2


def test_transformers_own_printer_works(tmp_path, capsys):
    run(tmp_path, [PrinterCallback], logging_steps=3, max_steps=3)
    assert "'learning_rate'" in capsys.readouterr().out


def test_states_of_callbacks_are_kept_and_restored(caplog):
    model, arguments = tiny_bert(), TrainingArguments()
    optimizer = build_optimizer(model, arguments)

    def events(*callbacks):
        return Events(
            callbacks,
            arguments,
            model=model,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, arguments, 5),
        )

    class Second(EarlyStoppingCallback):
        pass

    first, second = EarlyStoppingCallback(3), Second(7)
    first.early_stopping_patience_counter = 2
    saved = events(first, second)
    saved.state.stateful_callbacks = saved.callback_states()
    fresh = EarlyStoppingCallback(4)
    restored = events(fresh)
    restored.restore(copy.deepcopy(vars(saved.state)))
    assert fresh.early_stopping_patience_counter == 2
    assert fresh.early_stopping_patience == 4
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "the checkpoint has a state for Second, which is not used now"
    ]
