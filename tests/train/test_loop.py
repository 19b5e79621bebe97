import inspect
import json
import math

import pytest
import torch
from transformers import TrainerState

from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train import TrainingArguments, build_optimizer, loop, save_results, train
from tests.train.eager_executable import EagerExecutable, Questions, tiny_bert


def arguments(tmp_path, **settings):
    return TrainingArguments(
        output_dir=str(tmp_path),
        disable_tqdm=True,
        **{"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
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


def test_files_are_those_that_transformers_writes(tmp_path):
    settings = arguments(tmp_path, logging_steps=2)
    save_results(tmp_path, "eval", {"eval_loss": 1.5})
    result = train(executable(settings), Questions(7), settings)
    metrics = json.loads((tmp_path / "train_results.json").read_text())
    assert metrics == result.metrics
    assert set(metrics) == {
        "epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second",
        "train_steps_per_second",
    }  # fmt: skip
    combined = json.loads((tmp_path / "all_results.json").read_text())
    assert combined == metrics | {"eval_loss": 1.5}
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert state.log_history == result.log_history
    assert (state.global_step, state.max_steps, state.num_train_epochs) == (8, 8, 2)
    assert (state.logging_steps, state.train_batch_size) == (2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "all_results.json", "eval_results.json", "train_results.json", "trainer_state.json",
    ]  # fmt: skip


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
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["num_train_epochs"] == epochs
    assert state["epoch"] == pytest.approx(steps / 4)


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


def test_a_loss_that_is_not_finite_shows(tmp_path):
    settings = arguments(tmp_path, max_steps=2, logging_steps=1)

    class Broken(EagerExecutable):
        def forward_backward(self, batch):
            super().forward_backward(batch)
            return math.nan

    model = tiny_bert()
    result = train(Broken(model, build_optimizer(model, settings)), Questions(8), settings)
    assert math.isnan(result.training_loss)


@pytest.mark.parametrize(
    ("kind", "expected"), [("reduce_lr_on_plateau", 5e-5 / 16), ("greedy", 1e-4)]
)
def test_a_schedule_that_follows_a_metric(tmp_path, kind, expected):
    settings = arguments(
        tmp_path,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_steps=1,
        max_steps=5,
        logging_steps=1,
    )
    runner = executable(settings)
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    train(runner, Questions(8), settings, eval_fn=lambda executable: {"loss": next(values)})
    assert runner.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_evaluation_metrics(tmp_path):
    settings = arguments(tmp_path, eval_steps=4)

    def f1(executable):
        assert executable is runner
        return {"f1": torch.tensor(50.0), "eval_exact": 40}

    runner = executable(settings)
    result = train(runner, Questions(8), settings, eval_dataset=Questions(4), eval_fn=f1)
    log = result.log_history[0]
    assert (log["eval_f1"], log["eval_exact"], log["step"]) == (50.0, 40, 4)
    assert log["eval_loss"] > 0


def test_refusals(tmp_path):
    settings, data = arguments(tmp_path), Questions(8)
    with pytest.raises(ValueError, match="the executable has no optimizer; compile it with opt"):
        train(EagerExecutable(tiny_bert(), None), data, settings)
    message = "gradient_accumulation_steps is 1 and the plan was made for 2; set it to 2, or plan"
    with pytest.raises(ValueError, match=message):
        train(executable(settings, microbatches=2), data, settings)
    with pytest.raises(ValueError, match="replicas is 1 and the plan was made for 4"):
        train(executable(settings, replicas=4), data, settings)
    wanting = arguments(tmp_path, eval_steps=1)
    with pytest.raises(ValueError, match="eval_strategy is 'steps' and there is nothing to eval"):
        train(executable(wanting), data, wanting)
    with pytest.raises(ValueError, match="an evaluation was asked for; give train"):
        train(executable(settings), data, arguments(tmp_path, eval_on_start=True))
    following = arguments(tmp_path, eval_steps=1, metric_for_best_model="f2")
    with pytest.raises(
        ValueError, match=r"'f2' and the evaluation gave \['epoch', 'eval_f1'\]; ch"
    ):
        train(executable(following), data, following, eval_fn=lambda executable: {"f1": 1.0})


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
    result = train(EagerExecutable(model, build_optimizer(model, settings)), Questions(8), settings)
    assert result.metrics["total_flos"] == 0
    assert (tmp_path / "checkpoint-8" / "model.safetensors").is_file()
