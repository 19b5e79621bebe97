import inspect
import math

import pytest
import torch
from transformers import Trainer, TrainerState

from ipu_pipeline.errors import StageError
from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train import TrainingArguments, build_optimizer, list_checkpoints, loop, train
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert


def arguments(tmp_path, **settings):
    return TrainingArguments(
        output_dir=str(tmp_path),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        | settings,
    )


def executable(settings, **kwargs):
    model = tiny_bert()
    return EagerExecutable(model, build_optimizer(model, settings), **kwargs)


def test_the_reference_executable_keeps_the_protocol():
    assert isinstance(executable(TrainingArguments()), Executable)


def test_the_loop_is_thin():
    assert len(inspect.getsource(loop).splitlines()) < 100


def test_it_learns(tmp_path):
    settings = arguments(
        tmp_path, num_train_epochs=30, learning_rate=1e-2, per_device_train_batch_size=16,
        logging_steps=1,
    )  # fmt: skip
    result = train(executable(settings), Questions(64), settings)
    assert result.log_history[0]["loss"] > 2.0
    assert result.log_history[-2]["loss"] < 1.0


def test_metrics_and_state_have_transformers_names(tmp_path):
    settings = arguments(tmp_path, logging_steps=2)
    result = train(executable(settings), Questions(7), settings)
    assert set(result.metrics) == {
        "epoch", "train_loss", "train_runtime", "train_samples_per_second",
        "train_steps_per_second",
    }  # fmt: skip
    assert result.log_history[-1] == result.metrics | {"step": 8}
    assert [log["step"] for log in result.log_history] == [2, 4, 6, 8, 8]
    state = result.state
    assert isinstance(state, TrainerState)
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (8, 8, 2)
    assert (state.logging_steps, state.train_batch_size) == (2, 2)
    assert list(tmp_path.iterdir()) == []


def test_losses_norms_rates_and_weights_are_those_of_the_trainer(tmp_path):
    """With all data in one batch, gradients differ by rounding alone."""
    settings = {
        "num_train_epochs": 6,
        "per_device_train_batch_size": 12,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.5,
        "disable_tqdm": True,
        # Some gradients are 0 but for rounding; Adam must not blow that up.
        "adam_epsilon": 1e-3,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs, ours = tiny_bert(**no_dropout), tiny_bert(**no_dropout)
    given = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", **settings)
    trainer = Trainer(theirs, given, train_dataset=Questions(12))
    trainer.train()
    given = TrainingArguments(output_dir=str(tmp_path), **settings)
    runner = EagerExecutable(ours, build_optimizer(ours, given), max_grad_norm=0.5)
    result = train(runner, Questions(12), given)
    assert len(result.log_history) == len(trainer.state.log_history) == 7
    assert result.log_history[-2]["loss"] < result.log_history[0]["loss"]
    for mine, wanted in zip(result.log_history, trainer.state.log_history, strict=True):
        assert mine.keys() == wanted.keys() - {"total_flos"}
        for name in ("loss", "grad_norm", "learning_rate", "epoch", "step", "train_loss"):
            if name in wanted:
                assert mine[name] == pytest.approx(wanted[name], rel=1e-4), name
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


SCHEDULES = [
    ({"logging_steps": 3}, [3, 6, 8]),
    ({"logging_steps": 5, "logging_first_step": True}, [1, 5, 8]),
    ({"logging_strategy": "epoch"}, [4, 8, 8]),
    ({"logging_strategy": "no"}, [8]),
]


@pytest.mark.parametrize(("settings", "steps"), SCHEDULES)
def test_when_it_logs(tmp_path, settings, steps):
    settings = arguments(tmp_path, **settings)
    result = train(executable(settings), Questions(8), settings)
    assert [log["step"] for log in result.log_history] == steps


SAVES = [
    ({"save_strategy": "steps", "save_steps": 3}, [3, 6, 8]),
    ({"save_strategy": "epoch"}, [4, 8]),
    ({"save_strategy": "epoch", "max_steps": 6}, [4, 6]),
    ({"save_strategy": "no"}, []),
]


@pytest.mark.parametrize(("settings", "steps"), SAVES)
def test_when_it_saves(tmp_path, settings, steps):
    settings = arguments(tmp_path, **settings)
    train(executable(settings), Questions(8), settings)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in steps]


def test_every_step_is_told(tmp_path):
    settings, seen = arguments(tmp_path, max_steps=3), []
    train(
        executable(settings),
        Questions(8),
        settings,
        on_step=lambda state, result: seen.append((state.global_step, state.epoch, result.loss)),
    )
    assert [entry[:2] for entry in seen] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_lines_are_printed_above_the_bar(tmp_path, capsys):
    settings = arguments(tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False)
    train(executable(settings), Questions(16), settings)
    shown = capsys.readouterr()
    assert "step 2  loss 2." in shown.out
    assert "train_samples_per_second" in shown.out
    assert "4/4" in shown.err
    train(executable(settings), Questions(16), arguments(tmp_path, max_steps=4, logging_steps=2))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({"num_train_epochs": 2}, 8, 2),
        ({"num_train_epochs": 0.5}, 2, 1),
        ({"num_train_epochs": 1.1}, 5, 2),
        ({"max_steps": 9}, 9, 3),
        ({"max_steps": 1}, 1, 1),
    ],
)
def test_number_of_steps(tmp_path, settings, steps, epochs):
    settings = arguments(tmp_path, **settings)
    result = train(executable(settings), Questions(8), settings)
    assert result.global_step == steps
    assert result.state.num_train_epochs == epochs
    assert result.state.epoch == pytest.approx(steps / 4)


def test_microbatches_and_replicas_share_a_step(tmp_path):
    settings = arguments(tmp_path, gradient_accumulation_steps=3, replicas=2)
    sizes = []

    class Sizes(EagerExecutable):
        def train_step(self, batch):
            sizes.append(len(batch["input_ids"]))
            return super().train_step(batch)

    model = tiny_bert()
    runner = Sizes(model, build_optimizer(model, settings), microbatches=3, replicas=2)
    train(runner, Questions(21), settings)
    assert sizes == [12, 6, 12, 6]


def test_a_target_that_takes_any_size_gets_every_sample(tmp_path, caplog):
    settings = arguments(tmp_path, gradient_accumulation_steps=4, num_train_epochs=1)
    seen = []

    class AnySize(EagerExecutable):
        batch_divisor = 1

        def train_step(self, batch):
            seen.extend(map(tuple, batch["input_ids"].tolist()))
            self.parts = 1
            return super().train_step(batch)

    model, data = tiny_bert(), Questions(21)
    train(AnySize(model, build_optimizer(model, settings), microbatches=4), data, settings)
    assert sorted(seen) == sorted(map(tuple, data.rows.tolist()))
    assert not caplog.records


def test_an_overflow_is_skipped_and_the_schedule_waits(tmp_path):
    settings = arguments(tmp_path, max_steps=4, logging_steps=1, per_device_train_batch_size=4)

    class Overflow(EagerExecutable):
        def forward_backward(self, batch):
            loss = super().forward_backward(batch)
            if self.global_step in (1, 2):
                self.model.qa_outputs.weight.grad[0, 0] = math.inf
            return math.nan if self.global_step == 2 else loss

    model = tiny_bert()
    runner = Overflow(model, build_optimizer(model, settings), loss_scaling=8.0)
    result = train(runner, Questions(8), settings)
    logs = result.log_history[:4]
    assert [log["learning_rate"] for log in logs] == pytest.approx(
        [5e-5, 3.75e-5, 3.75e-5, 3.75e-5]
    )
    assert [log.get("skipped_steps", 0) for log in logs] == [0, 1, 1, 0]
    assert ["grad_norm" in log for log in logs] == [True, False, False, True]
    assert math.isnan(logs[2]["loss"])
    finite = [logs[i]["loss"] for i in (0, 1, 3)]
    assert result.training_loss == pytest.approx(sum(finite) / 3)
    assert (result.skipped_steps, result.global_step) == (2, 4)
    assert len(runner.optimizer.state[model.qa_outputs.weight]) > 0
    assert runner.optimizer.state[model.qa_outputs.weight]["step"] == 2


def test_a_run_that_has_skipped_every_step_does_not_end_well(tmp_path):
    settings = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=2)

    class Overflow(EagerExecutable):
        finite_at = -1

        def forward_backward(self, batch):
            super().forward_backward(batch)
            if self.global_step != self.finite_at:
                self.model.qa_outputs.weight.grad[0, 0] = math.nan
            return math.nan

    model = tiny_bert()
    runner = Overflow(model, build_optimizer(model, settings))
    message = "none of the 3 optimizer steps changed a weight: the gradients were not finite"
    with pytest.raises(StageError, match=message):
        train(runner, Questions(8), settings)
    settings.max_steps, settings.resume_from_checkpoint = 4, "auto"
    runner.finite_at = 3  # of four steps one
    assert train(runner, Questions(8), settings).skipped_steps == 3


def test_a_loss_that_is_not_finite_shows(tmp_path):
    settings = arguments(tmp_path, max_steps=2, logging_steps=1)

    class Broken(EagerExecutable):
        def forward_backward(self, batch):
            super().forward_backward(batch)
            return math.nan

    model = tiny_bert()
    result = train(Broken(model, build_optimizer(model, settings)), Questions(8), settings)
    assert math.isnan(result.training_loss)


def test_refusals(tmp_path):
    settings, data = arguments(tmp_path), Questions(8)
    with pytest.raises(ValueError, match="the executable has no optimizer; compile it with opt"):
        train(EagerExecutable(tiny_bert(), None), data, settings)
    message = "gradient_accumulation_steps is 1 and the plan was made for 2"
    with pytest.raises(ValueError, match=message):
        train(executable(settings, microbatches=2), data, settings)
    with pytest.raises(ValueError, match="replicas is 1 and the plan was made for 4"):
        train(executable(settings, replicas=4), data, settings)
    ignored = arguments(tmp_path, eval_strategy="epoch", load_best_model_at_end=False, optim="sgd")
    with pytest.raises(ValueError, match=r"train\(\) does not read eval_strategy, optim; use Pip"):
        train(executable(ignored), data, ignored)


def test_a_model_that_is_not_of_transformers(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 1)

        def forward(self, input_ids):
            class Output(dict):
                loss = self.table(input_ids).square().mean()

            return Output()

    settings = arguments(tmp_path, save_strategy="steps")
    model = Plain()
    train(EagerExecutable(model, build_optimizer(model, settings)), Questions(8), settings)
    assert (tmp_path / "checkpoint-8" / "model.safetensors").is_file()
