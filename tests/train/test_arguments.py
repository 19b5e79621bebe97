import json
import logging
import math

import pytest
from transformers import HfArgumentParser, IntervalStrategy, SchedulerType
from transformers import TrainingArguments as TheirArguments

from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.train import TrainingArguments


def test_shared_names_have_the_defaults_of_transformers():
    ours, theirs = TrainingArguments(), TheirArguments(use_cpu=True)
    filled_in = {"eval_steps", "disable_tqdm"}
    for name, value in ours.to_dict().items():
        if hasattr(theirs, name) and name not in filled_in:
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"logging_steps": 0}, "logging_steps must be at least 1"),
        ({"eval_steps": 0}, "eval_steps must be at least 1"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be 0 or more, got nan"),
        ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\), got 1.0"),
        ({"adam_beta2": -0.1}, r"adam_beta2 must be in \[0, 1\)"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 to follow num_train_epochs"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio 0.1 and warmup_steps 5 contrad"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0; use None"),
        ({"loss_scaling": 0.0}, "loss_scaling must be above 0, got 0.0"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 are both set; choose one"),
        ({"save_strategy": "best"}, "save_strategy 'best' is unknown; use one of"),
        ({"eval_strategy": "never"}, "eval_strategy 'never' is unknown"),
        ({"lr_scheduler_type": "slow"}, "lr_scheduler_type 'slow' is unknown; use one of"),
        ({"lr_scheduler_type": "greedy"}, "'greedy' follows an evaluation metric; set eval_str"),
        ({"lr_scheduler_kwargs": "{"}, "lr_scheduler_kwargs is not JSON: .*; got '{'"),
        ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs must be a JSON object, got"),
        ({"load_best_model_at_end": True}, "eval_strategy is 'no' and save_strategy 'steps'"),
        (
            {"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 4},
            r"save_steps \(4\) to be a multiple of eval_steps \(3\)",
        ),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**settings)


def test_what_follows_from_other_fields():
    assert TrainingArguments().eval_strategy == "no"
    arguments = TrainingArguments(eval_steps=5)
    assert arguments.eval_strategy == "steps"
    assert TrainingArguments(eval_strategy="steps", logging_steps=7).eval_interval == 7
    arguments = TrainingArguments(eval_steps=2, save_steps=4, load_best_model_at_end=True)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("loss", False)
    assert TrainingArguments(metric_for_best_model="f1").greater_is_better is True


def test_enums_and_json_text_are_accepted():
    arguments = TrainingArguments(
        eval_strategy=IntervalStrategy.EPOCH,
        lr_scheduler_type=SchedulerType.POLYNOMIAL,
        lr_scheduler_kwargs='{"power": 2}',
    )
    assert arguments.eval_strategy == "epoch"
    assert arguments.lr_scheduler_type == "polynomial"
    assert arguments.lr_scheduler_kwargs == {"power": 2}
    assert json.loads(arguments.to_json_string()) == arguments.to_dict()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 0), ({"warmup_ratio": 0.1}, 2), ({"warmup_steps": 3}, 3), ({"warmup_steps": 0.25}, 4)],
)
def test_warmup_steps_of_sixteen(settings, steps):
    assert TrainingArguments(**settings).get_warmup_steps(16) == steps


def test_batch_sizes():
    arguments = TrainingArguments(
        per_device_train_batch_size=3, gradient_accumulation_steps=4, replicas=2
    )
    assert (arguments.samples_divisor, arguments.global_batch_size) == (8, 24)


def test_execution_options(caplog):
    arguments = TrainingArguments(fp16=True, loss_scaling=128.0, max_grad_norm=0, seed=5)
    assert arguments.execution_options(sequential=True) == ExecutionOptions(
        precision="fp16", loss_scaling=128.0, max_grad_norm=None, seed=5, sequential=True
    )
    assert TrainingArguments(bf16=True).execution_options().precision == "bf16"
    with caplog.at_level(logging.WARNING):
        options = TrainingArguments(loss_scaling=16384).execution_options()
    assert (options.precision, options.loss_scaling) == ("float32", 1.0)
    assert "loss_scaling 16384 is not applied" in caplog.text


def test_state_divided_among_replicas_is_an_execution_option():
    assert not TrainingArguments().execution_options().replicated_tensor_sharding
    arguments = TrainingArguments(replicated_tensor_sharding=True, replicas=2)
    assert arguments.execution_options().replicated_tensor_sharding


def test_a_command_line_gives_them():
    flags = (
        "--output_dir out --num_train_epochs 2 --per_device_train_batch_size 2 "
        "--per_device_eval_batch_size 4 --gradient_accumulation_steps 16 --learning_rate 6e-5 "
        "--seed 1 --lr_scheduler_type linear --loss_scaling 64 --weight_decay 0.01 "
        "--warmup_ratio 0.1 --logging_steps 1 --save_steps 100 --dataloader_num_workers 4 "
        "--resume_from_checkpoint auto --fp16"
    )
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags.split())
    assert arguments == TrainingArguments(
        output_dir="out",
        num_train_epochs=2.0,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=16,
        learning_rate=6e-5,
        seed=1,
        loss_scaling=64.0,
        weight_decay=0.01,
        warmup_ratio=0.1,
        logging_steps=1,
        save_steps=100,
        dataloader_num_workers=4,
        resume_from_checkpoint="auto",
        fp16=True,
    )


def test_what_transformers_callbacks_read():
    arguments = TrainingArguments(lr_scheduler_kwargs={"power": 2})
    plain = arguments.to_sanitized_dict()
    assert plain["lr_scheduler_kwargs"] == "{'power': 2}"
    assert (plain["train_batch_size"], plain["eval_batch_size"]) == (8, 8)
    assert (arguments.world_size, arguments.process_index, arguments.n_gpu) == (1, 0, 0)
    assert arguments.should_save
    assert arguments.report_to == []
    assert not arguments.do_eval
