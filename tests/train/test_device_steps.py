"""PipelineTrainer on IPUs (the stand-in): the same losses, files and weights as on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, set_seed

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.train.arguments import TrainingArguments
from ipu_pipeline.train.device_steps import joined
from ipu_pipeline.train.trainer import PipelineTrainer
from tests.backends.ipu.conftest import poptorch  # noqa: F401 - a fixture
from tests.backends.ipu.emulated import assert_same_weights, sessions_of
from tests.tiny_models import TINY
from tests.train.helpers import CHECKPOINTING
from tests.train.test_trainer_losses import bert_qa, marked

IPUS = {"target": "poptorch", "machine": "pod4", "num_stages": 2}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # rounding noise of zero gradients does not become steps
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **options | changes)


def trainer_of(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    set_seed(0)
    data = {"train_dataset": marked(19), "eval_dataset": marked(11)}
    return PipelineTrainer(bert_qa(), arguments(folder, **changes or {}), **data | options)


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Tail(TrainerCallback):
    """Keeps the weights that a callback sees after every step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.qa_outputs.weight.detach().clone())


@pytest.mark.usefixtures("poptorch")
def test_a_training_equals_the_local_one(tmp_path, caplog) -> None:
    """Losses, learning rates, evaluations, weights, and what a callback reads."""
    watched, found = (Tail(), Tail()), []
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    for watch, options in zip(watched, ({"num_stages": 2}, IPUS), strict=True):
        data = {"train_dataset": marked(16), "callbacks": [watch]}
        trainer = trainer_of(tmp_path / str(len(found)), changes, **data, **options)
        trainer.train()
        found.append(trainer)
    local, ipus = found
    for name in ("loss", "learning_rate", "eval_loss"):
        assert logged(ipus, name) == pytest.approx(logged(local, name), rel=1e-5), name
    assert len(logged(ipus)) == 4
    assert not logged(ipus, "grad_norm")
    assert_same_weights(ipus.model, local.model)
    for one, other in zip(watched[1].seen, watched[0].seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    sessions = sessions_of(ipus._steps.executable)
    assert sessions.training.isCompiled()
    assert sessions.inference.isCompiled()
    ipus.close()
    assert ipus._steps.executable is None


@pytest.mark.usefixtures("poptorch")
def test_a_resumed_training_equals_the_whole_one(tmp_path) -> None:
    """From a checkpoint, with a rest of the data that fills no step; the best model is loaded."""
    changes = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
               "load_best_model_at_end": True, "per_device_eval_batch_size": 8}  # fmt: skip
    whole = trainer_of(tmp_path / "one", changes, **IPUS)
    whole.train()
    assert whole.state.global_step == 4
    assert logged(whole, "epoch")[-1] == 2
    again = trainer_of(tmp_path / "two", changes, **IPUS)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert_same_weights(again.model, whole.model)
    assert logged(again)[-2:] == pytest.approx(logged(whole)[-2:], rel=1e-6)
    again.save_model(tmp_path / "saved")
    read = type(again.model).from_pretrained(tmp_path / "saved")
    assert_same_weights(read, again.model, tolerance=0)
    first = torch.load(tmp_path / "one" / "checkpoint-4" / "optimizer.pt")["state"]
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(first[0])
    for trainer in (whole, again):
        trainer.close()


@pytest.mark.usefixtures("poptorch")
def test_copies_of_the_pipeline_read_their_samples(tmp_path) -> None:
    """Two replicas of four microbatches, planned by a configuration, equal eight microbatches."""
    config = IPUConfig(
        layers_per_ipu=(1, 2), gradient_accumulation_steps=4, replication_factor=2,
        output_mode="all",
    )  # fmt: skip
    two = {"replicas": 2}
    options = {"target": "poptorch", "machine": "pod4", "ipu_config": config}
    data = {"train_dataset": marked(32)}
    ipus = trainer_of(tmp_path / "ipus", two, **options, **data)
    ipus.train()
    local = trainer_of(tmp_path / "local", {"gradient_accumulation_steps": 8}, num_stages=2, **data)
    local.train()
    assert (ipus.plan.replicas, ipus.plan.num_microbatches) == (2, 4)
    assert logged(ipus) == pytest.approx(logged(local), rel=1e-5)
    assert_same_weights(ipus.model, local.model)
    ipus.close()


@pytest.mark.usefixtures("poptorch")
def test_what_was_compiled_to_evaluate_is_compiled_again_to_train(tmp_path) -> None:
    row = {name: torch.tensor([value, value]) for name, value in marked()[0].items()}
    plan = ipp.plan(bert_qa(), row, machine="pod4", num_stages=2, microbatches=4)
    ipus = trainer_of(tmp_path, {"max_steps": 1}, plan=plan, target="poptorch")
    before = ipus.evaluate()["eval_loss"]
    assert ipus._steps.executable.optimizer is None
    ipus.train()
    local = trainer_of(tmp_path, {"max_steps": 1}, num_stages=2)
    assert local.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    local.train()
    assert local.evaluate()["eval_loss"] == pytest.approx(ipus.evaluate()["eval_loss"], rel=1e-5)
    ipus.end()


class InStep(TrainerCallback):
    def on_optimizer_step(self, *args, **kwargs):
        raise AssertionError


class OwnLoss(PipelineTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2 * model(**inputs).loss


def test_what_ipus_do_not_compute_is_refused_before_anything_runs(tmp_path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[InStep()], **IPUS)
    with pytest.raises(
        ValueError, match=r"InStep\.on_optimizer_step acts inside an optimizer step"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="the loss is computed outside of the model"):
        OwnLoss(bert_qa(), arguments(tmp_path), train_dataset=marked(), **IPUS)
    evaluates = OwnLoss(bert_qa(), arguments(tmp_path), **IPUS)
    with pytest.raises(ValueError, match="the loss is computed outside of the model"):
        evaluates.train()
    for changes, message in (
        ({CHECKPOINTING: True}, "what IPUs recompute is the plan's to say"),
        ({"bf16": True}, "IPUs have no autocast and no bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, changes, **IPUS)


def test_data_that_make_no_whole_step(tmp_path) -> None:
    few = trainer_of(tmp_path, train_dataset=marked(7), **IPUS)
    with pytest.raises(ValueError, match="the data holds 7 samples, and a step on IPUs takes"):
        few.train()
    grouped = trainer_of(tmp_path, {"train_sampling_strategy": "sequential"}, **IPUS)
    with pytest.raises(ValueError, match=r"holds 19 samples, .* give 16 samples"):
        grouped.train()


def test_several_steps_in_one_call_of_the_device(tmp_path) -> None:
    config = IPUConfig(layers_per_ipu=(1, 2), gradient_accumulation_steps=4, device_iterations=2)
    options = {"target": "poptorch", "machine": "pod4", "ipu_config": config}
    with pytest.raises(ValueError, match="device_iterations 2 makes several optimizer steps"):
        trainer_of(tmp_path, **options).train()


def test_microbatches_of_other_shapes() -> None:
    parts = [{"input_ids": torch.zeros(2, n)} for n in (3, 4)]
    with pytest.raises(ValueError, match=r"'input_ids' has the shapes \[\(2, 3\), \(2, 4\)\]"):
        joined(parts)


class Items(torch.utils.data.Dataset):
    """Tokens; of sample n, ``first + n * more`` labels do not count."""

    def __init__(self, first: int, more: int) -> None:
        self.first, self.more = first, more

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(16).add(index).remainder(40)
        left_out = torch.arange(16) < self.first + index * self.more
        return {"input_ids": tokens, "labels": torch.where(left_out, -100, tokens)}


@pytest.mark.usefixtures("poptorch")
def test_the_loss_over_all_items_of_a_step(tmp_path) -> None:
    """It is trained where it is the mean of the microbatches' means, and refused elsewhere."""

    def trainer_for(first: int, more: int) -> Any:
        set_seed(0)
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=8)
        data = Items(first, more)
        return PipelineTrainer(TINY["gpt2-lm"].build()[0], args, train_dataset=data, **IPUS)

    uneven = trainer_for(1, 1)
    with pytest.raises(ValueError, match="the labels that count in the microbatches of this step"):
        uneven.train()
    # transformers counts the first label of this class, which its loss leaves out.
    shifted = trainer_for(0, 0)
    with pytest.raises(ValueError, match="with num_items_in_batch, which transformers' Trainer"):
        shifted.train()
    uneven.model_accepts_loss_kwargs = False
    for trained in (uneven, trainer_for(1, 0)):
        trained.train()
        assert trained.state.global_step == 1
        trained.close()
