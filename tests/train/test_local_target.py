"""The loop on the local target: a run goes on under another number of stages, dropout on."""

import dataclasses

import pytest
import torch
from transformers import default_data_collator

import ipu_pipeline as ipp
from ipu_pipeline.train import (
    TrainingArguments,
    build_optimizer,
    latest_checkpoint,
    train,
)
from tests.train.eager_executable import Questions, tiny_bert

DATA = Questions(22)
EXAMPLE = {name: torch.tensor([DATA[i][name] for i in range(2)]) for name in DATA[0]}


def run(folder, num_stages, max_steps):
    """Return the loss of every step, and the evaluation."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=3,
        resume_from_checkpoint="auto",
        disable_tqdm=True,
    )
    model = tiny_bert(seed=0 if latest_checkpoint(folder) is None else 99)
    plan = ipp.plan(model, EXAMPLE, machine="local", num_stages=num_stages, microbatches=2)
    with ipp.compile(
        model,
        plan,
        target="local",
        optimizer=build_optimizer(model, arguments),
        **dataclasses.asdict(arguments.execution_options()),
    ) as executable:
        history = train(executable, DATA, arguments).log_history
        output = executable.eval_step(default_data_collator(list(Questions(7, seed=4))))
    return [log["loss"] for log in history if "loss" in log], output


def test_one_stage_equals_two_that_go_on_as_four(tmp_path):
    expected, reference = run(tmp_path / "whole", 1, 14)
    run(tmp_path / "split", 2, 7)
    losses, output = run(tmp_path / "split", 4, 14)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert len(losses) == 14
    assert output.loss == pytest.approx(reference.loss, abs=1e-6)
    assert output.outputs["start_logits"].shape == (7, 12)
