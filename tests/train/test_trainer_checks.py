"""What PipelineTrainer refuses, and with which words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.debug_utils import DebugOption

import ipu_pipeline as ipp
from ipu_pipeline.errors import CheckpointError, LoweringError
from ipu_pipeline.train.mixin import PipelineMixin
from ipu_pipeline.train.trainer import PipelineSeq2SeqTrainer, PipelineTrainer
from ipu_pipeline.train.trainer_checks import (
    REFUSED_METHODS,
    check_arguments,
    check_folder,
    chosen_target,
    inherited_from,
    recomputes,
    refusals,
    switch_off_checkpointing,
)
from tests.later import now
from tests.tiny_models import TINY
from tests.train.test_trainer_losses import arguments, bert_qa, marked

PLAIN = {
    "fp16": False,
    "device": torch.device("cpu"),
    "n_gpu": 0,
    "optim": "adamw_torch",
    "debug": [],
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fsdp": "full_shard"}, "fsdp does not go with PipelineTrainer .* leave it out"),
        ({"deepspeed": {"zero": 3}}, "deepspeed does not go"),
        ({"parallelism_config": object()}, "parallelism_config does not go"),
        ({"torch_compile": True, "target": "distributed"}, "torch_compile does not go with .* on "),
        ({"torch_compile": True, "torch_compile_mode": "max-autotune"}, "not by None in mode max-"),
        ({"use_liger_kernel": True}, "use_liger_kernel does not go"),
        (
            {"auto_find_batch_size": True, "target": "distributed"},
            "auto_find_batch_size does not go",
        ),
        ({"fp16": True, "loss_scaling": 64.0}, "loss_scaling=64.0 does not go with fp16 in Pipe"),
        ({"fp16": True, "target": "distributed"}, "fp16 does not go with .* target='distributed' "),
        ({"gradient_checkpointing": True, "target": "poptorch"}, "what IPUs recompute is the plan"),
        (
            {"device": torch.device("cuda", 0), "n_gpu": 2},
            "the arguments chose cuda:0 with n_gpu=2; set use_cpu=True, or let it see one GPU",
        ),
        ({"replicas": 2}, "has one copy of the pipeline, and replicas is 2; leave it out, or use"),
        ({"save_on_each_node": True, "target": "distributed"}, "save_on_each_node does not go"),
        ({"async_save": True}, "async_save does not go"),
        ({"optim": "lomo"}, "optim 'lomo' steps inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "before the stages have summed their gradients"),
        ({"debug": [DebugOption.UNDERFLOW_OVERFLOW]}, "debug='underflow_overflow' watches"),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"every_n_layers": 2},
            },
            r"activation_checkpointing_kwargs \['every_n_layers'\] are not supported",
        ),
    ],
)
def test_arguments_that_a_pipeline_cannot_follow(wrong: dict[str, Any], message: str) -> None:
    target = wrong.pop("target", "local")
    check_arguments(SimpleNamespace(**PLAIN), target)
    one_gpu = {"device": torch.device("cuda", 0), "n_gpu": 1}
    check_arguments(SimpleNamespace(**PLAIN | one_gpu))
    with pytest.raises(ValueError, match=message):
        check_arguments(SimpleNamespace(**PLAIN | wrong), target)


def test_they_are_checked_before_anything_is_set_up(tmp_path) -> None:
    args = arguments(tmp_path / "made", use_liger_kernel=True)
    with pytest.raises(ValueError, match="use_liger_kernel does not go"):
        PipelineTrainer(bert_qa(), args)
    assert not (tmp_path / "made").exists()


def test_a_target_in_several_processes(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="cannot drive target 'cluster'; use target='local'"):
        PipelineTrainer(model=bert_qa(), target="cluster")
    args = arguments(tmp_path)  # of one process: no rank may train the whole job
    monkeypatch.setenv("WORLD_SIZE", "2")
    for target in ("local", "poptorch"):
        with pytest.raises(ValueError, match=f"2 processes .* target='{target}' each of them"):
            PipelineTrainer(bert_qa(), args, target=target)
    assert chosen_target(None) == "distributed"
    with pytest.raises(LoweringError, match="RANK, MASTER_ADDR, MASTER_PORT is not set; start"):
        PipelineTrainer(bert_qa(), args)


def test_a_checkpoint_that_a_machine_does_not_see(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint-2 is not there; let output_dir be in"):
        check_folder(tmp_path / "checkpoint-2")


def planned(microbatches: int) -> tuple[Any, Any]:
    model = bert_qa()
    row = {name: torch.tensor([value]) for name, value in marked()[0].items()}
    return model, ipp.plan(model, row, num_stages=3, microbatches=microbatches)


def test_a_plan_for_other_microbatches(tmp_path) -> None:
    model, plan = planned(8)
    message = "gradient_accumulation_steps is 3 and the plan was made for 8; make them equal"
    with pytest.raises(ValueError, match=message):
        PipelineTrainer(model, arguments(tmp_path), plan=plan)
    fits = arguments(tmp_path, gradient_accumulation_steps=8)
    for asked in ({"num_stages": 2}, {"granularity": "op"}):
        with pytest.raises(ValueError, match=f"{next(iter(asked))} is .* and the plan was made"):
            PipelineTrainer(model, fits, plan=plan, **asked)
    fits.auto_find_batch_size = True
    with pytest.raises(ValueError, match="makes microbatches smaller, and the plan was made for"):
        PipelineTrainer(model, fits, plan=plan)


def test_the_trainer_plans_with_a_granularity(tmp_path) -> None:
    trainer = PipelineTrainer(
        bert_qa(), arguments(tmp_path, max_steps=1), train_dataset=marked(), num_stages=2,
        granularity="sublayer",
    )  # fmt: skip
    trainer.train()
    assert trainer.plan.granularity == "sublayer"


def test_a_plan_file_is_used_from_the_first_evaluation_on(tmp_path) -> None:
    model, plan = planned(3)
    plan.save(tmp_path / "plan.json")
    trainer = PipelineTrainer(
        model,
        arguments(tmp_path),
        train_dataset=marked(),
        eval_dataset=marked(7),
        plan=tmp_path / "plan.json",
    )
    whole = PipelineTrainer(model, arguments(tmp_path), eval_dataset=marked(7))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"])
    assert trainer.plan.num_stages == 3
    executable = trainer._steps.executable
    assert executable is not None
    assert whole.plan is None
    trainer.train()
    assert trainer._steps.executable is executable
    assert executable.global_step == 1  # that of the last of two steps


def test_both_names_of_recomputation() -> None:
    assert not recomputes(SimpleNamespace(**PLAIN))  # type: ignore[arg-type]
    assert recomputes(SimpleNamespace(gradient_checkpointing=True))  # type: ignore[arg-type]
    called = []
    switch_off_checkpointing(
        SimpleNamespace(gradient_checkpointing_disable=lambda: called.append("older"))
    )
    assert called == ["older"]


def test_a_subclass_with_its_own_prediction_step_gets_its_batches_untouched(tmp_path) -> None:
    class Own(PipelineTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs["input_ids"] = torch.full_like(inputs["input_ids"], 9)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    model = bert_qa()
    own = Own(model, arguments(tmp_path), train_dataset=marked(), num_stages=2)
    own.train()
    plain = PipelineTrainer(model, arguments(tmp_path), plan=own.plan)
    nines = [{**marked()[i], "input_ids": [9] * 24} for i in range(4)]
    found, expected = own.predict(marked(4)), plain.predict(nines)
    assert found.predictions[0] == pytest.approx(expected.predictions[0], abs=1e-5)


def overridden(kind: type, names: Iterable[str], called: set[str]) -> type[Trainer]:
    """Return another trainer class with methods of its own."""

    def method(name: str) -> Callable[..., Any]:
        def call(self, *args, **kwargs):
            called.add(name)
            return getattr(super(Other, self), name)(*args, **kwargs)

        return call

    Other = type("Other", (kind,), {name: method(name) for name in names})
    return Other


def names_of(kind: type) -> set[str]:
    """Return the methods of a trainer of transformers and of its bases."""
    classes = [c for c in kind.__mro__ if issubclass(c, Trainer)]
    found = {n for c in classes for n, v in vars(c).items() if callable(v) and n[:2] != "__"}
    return {n for n in found if not isinstance(inspect.getattr_static(kind, n), staticmethod)}


def called_by(kind: type, names: set[str], folder: Path, **more: Any) -> set[str]:
    """Return which methods of another base are called while a trainer is used in many ways."""
    called: set[str] = set()
    other = overridden(kind, names, called)
    bases = (PipelineMixin, other) if more else (other,)
    strategies = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    args = Seq2SeqTrainingArguments if issubclass(kind, Seq2SeqTrainer) else TrainingArguments
    options = {
        **arguments(folder).to_dict(), "load_best_model_at_end": True, "eval_steps": 2,
        "save_steps": 2, **strategies, "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    known = {f.name for f in fields(args) if f.init}
    made = args(**{k: v for k, v in options.items() if k in known})
    trainer = type("Both", bases, {})(
        model=bert_qa(), args=made, train_dataset=marked(), eval_dataset=marked(3), **more
    )
    trainer.add_callback(TrainerCallback())
    trainer.train()
    trainer.evaluate()
    trainer.predict(marked(2))
    trainer.save_model(str(folder / "saved"))
    trainer.end()
    return called


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer])
def test_every_method_of_a_base_is_called_as_without_the_pipeline_or_refused(
    tmp_path, kind
) -> None:
    """With each of them overridden, none is left out."""
    names = names_of(kind) - REFUSED_METHODS.keys()
    expected = called_by(kind, names, tmp_path / "theirs")
    assert {"training_step", "compute_loss", "prediction_step", "_save_checkpoint"} <= expected
    assert called_by(kind, names, tmp_path / "ours", num_stages=2) == expected


@pytest.mark.parametrize(
    "name", now(["training_step"], ["compute_loss", "training_step", "_prepare_inputs"])
)
def test_a_method_is_called_where_it_is_the_only_one(tmp_path, name) -> None:
    """Where the stages compute the loss alone, some methods of transformers are not needed."""
    called = called_by(Trainer, {name}, tmp_path, num_stages=2)
    assert called == {name}


@pytest.mark.parametrize("name", sorted(REFUSED_METHODS))
def test_methods_of_another_base_are_refused(tmp_path, name) -> None:
    both_bases = type("Both", (PipelineTrainer, overridden(Trainer, [name], set())), {})
    with pytest.raises(ValueError, match=f"{name} of Other does not go with PipelineMixin"):
        both_bases(model=bert_qa(), num_stages=2, args=arguments(tmp_path))


def test_a_loop_of_its_own_is_refused() -> None:
    class Loops(Trainer):
        def train(self):
            return self.model

    with pytest.raises(ValueError, match="train of Loops is a loop of its own, which hands no"):
        type("Both", (PipelineMixin, Loops), {})(model=bert_qa())


def test_what_is_refused_is_a_table_for_documents(golden) -> None:
    golden("train/refusals.md", refusals())


def test_another_trainer_before_ours() -> None:
    class Wrong(Seq2SeqTrainer, PipelineTrainer):
        pass

    with pytest.raises(ValueError, match=r"write class Wrong\(PipelineMixin, Seq2SeqTrainer\)"):
        Wrong(model=bert_qa(), num_stages=2)
    assert inherited_from(Wrong, PipelineTrainer, "prediction_step") is PipelineMixin
    with pytest.raises(ValueError, match=r"no trainer of transformers .* Bare\(PipelineMixin, Tr"):
        type("Bare", (PipelineMixin,), {})()


@pytest.mark.parametrize("generate", [True, False])
def test_predictions_with_generation(tmp_path, generate) -> None:
    options = {
        k: v
        for k, v in arguments(tmp_path).to_dict().items()
        if k in {"max_steps", "use_cpu", "learning_rate", "optim", "disable_tqdm", "report_to"}
    } | {"output_dir": str(tmp_path), "predict_with_generate": generate, "save_strategy": "no"}
    options |= {"generation_max_length": 6, "dataloader_pin_memory": False}
    rows = [{"input_ids": [3 + i, 4, 5, 6], "labels": [5, 4, 3]} for i in range(8)]
    found = []
    for base in (Seq2SeqTrainer, PipelineSeq2SeqTrainer):
        extra = {"num_stages": 2} if base is PipelineSeq2SeqTrainer else {}
        torch.manual_seed(0)
        model = TINY["t5"].build()[0]
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = Seq2SeqTrainingArguments(**options)
        trainer = base(model=model, args=args, train_dataset=rows, **extra)
        trainer.train()
        found.append(trainer.predict(rows[:3]))
    theirs, ours = found
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-5)
    if generate:
        assert ours.predictions.tolist() == theirs.predictions.tolist()
    else:
        assert len(ours.predictions) == len(theirs.predictions)
        assert ours.predictions[0] == pytest.approx(theirs.predictions[0], abs=1e-5)


def test_what_is_refused_is_on_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "train.md"
    assert refusals() in page.read_text(encoding="utf-8")
