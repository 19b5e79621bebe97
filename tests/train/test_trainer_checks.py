"""What PipelineTrainer refuses, and with which words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.debug_utils import DebugOption

import ipu_pipeline as ipp
from ipu_pipeline.errors import CheckpointError, LoweringError
from ipu_pipeline.train.trainer import PipelineTrainer
from ipu_pipeline.train.trainer_checks import (
    check_arguments,
    check_folder,
    chosen_target,
    inherited_from,
    recomputes,
    switch_off_checkpointing,
)
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
        ({"torch_compile": True}, "torch_compile does not go"),
        ({"use_liger_kernel": True}, "use_liger_kernel does not go"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size does not go"),
        ({"fp16": True, "loss_scaling": 64.0}, "loss_scaling=64.0 does not go with fp16 in Pipe"),
        ({"fp16": True, "target": "distributed"}, "fp16 does not go with target='distributed'"),
        (
            {"device": torch.device("cuda", 0), "n_gpu": 2},
            "the arguments chose cuda:0 with n_gpu=2; set use_cpu=True, or let it see one GPU",
        ),
        ({"replicas": 2}, "one copy of the pipeline, and replicas is 2; leave it out, or use"),
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
    args = arguments(tmp_path / "made", auto_find_batch_size=True)
    with pytest.raises(ValueError, match="auto_find_batch_size does not go"):
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


def overridden(names: Iterable[str], called: set[str]) -> type[Trainer]:
    """Return another trainer class with methods of its own."""

    def method(name: str) -> Callable[..., Any]:
        def call(self, *args, **kwargs):
            called.add(name)
            return getattr(super(Other, self), name)(*args, **kwargs)

        return call

    Other = type("Other", (Trainer,), {name: method(name) for name in names})
    return Other


OURS = sorted(n for n, value in vars(PipelineTrainer).items() if callable(value) and n[:2] != "__")
REFUSED = {"training_step", "compute_loss_context_manager", "autocast_smart_context_manager"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_methods_of_another_base_are_refused(tmp_path, name) -> None:
    both_bases = type("Both", (PipelineTrainer, overridden([name], set())), {})
    with pytest.raises(ValueError, match=f"{name} of Other does not go with PipelineTrainer"):
        both_bases(model=bert_qa(), num_stages=2, args=arguments(tmp_path))


def test_the_other_methods_of_another_base_are_called(tmp_path) -> None:
    names = {name for name in OURS if name in dir(Trainer)} - REFUSED
    called: set[str] = set()
    both_bases = type("Both", (PipelineTrainer, overridden(names, called)), {})
    strategies = dict.fromkeys(("save_strategy", "eval_strategy"), "steps")
    args = arguments(
        tmp_path, load_best_model_at_end=True, eval_steps=2, save_steps=2, **strategies
    )
    made = {"args": args, "train_dataset": marked(), "eval_dataset": marked(3)}
    trainer = both_bases(model=bert_qa(), num_stages=2, **made)
    trainer.train()
    trainer.evaluate()
    trainer.end()
    assert called == names


def test_another_trainer_before_ours() -> None:
    class Wrong(Seq2SeqTrainer, PipelineTrainer):
        pass

    with pytest.raises(ValueError, match=r"write class Wrong\(PipelineTrainer, Seq2SeqTrainer\)"):
        Wrong(model=bert_qa(), num_stages=2)
    assert inherited_from(Wrong, PipelineTrainer, "prediction_step") is Trainer


class Generating(PipelineTrainer, Seq2SeqTrainer):
    pass


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
    for base in (Seq2SeqTrainer, Generating):
        extra = {"num_stages": 2} if base is Generating else {}
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
