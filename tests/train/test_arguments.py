import logging
import math
import os
import subprocess
import sys

import pytest
from transformers import HfArgumentParser
from transformers import TrainingArguments as TheirArguments

from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.arguments import unread_by_the_loop


def test_all_of_transformers_arguments_with_their_defaults():
    ours, theirs = TrainingArguments(), TheirArguments(use_cpu=True)
    assert isinstance(ours, TheirArguments)
    for name, value in theirs.to_dict().items():
        assert ours.to_dict()[name] == value, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
        ({"num_train_epochs": math.nan}, "num_train_epochs must be finite, got nan"),
        (
            {"num_train_epochs": 1e12},
            "num_train_epochs may be 1000000000 at most, got 1000000000000.0",
        ),
        ({"num_train_epochs": -1}, "num_train_epochs must be at least 0, got -1"),
        ({"max_steps": 10**30}, "max_steps may be 1000000000 at most, got more"),
        ({"max_steps": math.inf}, "max_steps must be a whole number, got inf"),
        ({"max_steps": -2}, "max_steps must be at least -1, got -2"),
        ({"save_steps": math.inf}, "save_steps must be finite, got inf"),
        ({"logging_steps": 10**12}, "logging_steps may be 1000000000 at most"),
        ({"warmup_steps": 10**400 // 10**91}, "warmup_steps may be 1000000000 at most"),
        ({"learning_rate": math.nan}, "learning_rate must be finite, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
        ({"adam_epsilon": math.inf}, "adam_epsilon must be finite, got inf"),
        ({"dataloader_num_workers": 10**9}, "dataloader_num_workers may be 256 at most"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
        (
            {"lr_scheduler_kwargs": "[1]"},
            r"lr_scheduler_kwargs must be settings by name, got .\[1\]",
        ),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, got '1e-4'"),
        ({"seed": 2**32}, "seed may be 4294967295 at most, got 4294967296"),
        ({"data_seed": -1}, "data_seed must be at least 0, got -1"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio 0.1 and warmup_steps 5 contrad"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0; use None"),
        ({"batches": "some"}, "batches 'some' is unknown; use 'whole' or 'share'"),
        ({"loss_scaling": 0.0}, "loss_scaling must be above 0, got 0.0"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"lr_scheduler_type": "greedy"}, "greedy requires an eval strategy"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**settings)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 0), ({"warmup_ratio": 0.1}, 2), ({"warmup_steps": 3}, 3), ({"warmup_steps": 0.25}, 4)],
)
def test_warmup_steps_of_sixteen(settings, steps):
    assert TrainingArguments(**settings).get_warmup_steps(16) == steps


def test_a_whole_number_of_steps_may_be_a_float():
    assert TrainingArguments(max_steps=1e3).max_steps == 1000


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
    assert not options.replicated_tensor_sharding
    arguments = TrainingArguments(replicated_tensor_sharding=True, replicas=2)
    assert arguments.execution_options().replicated_tensor_sharding


def test_a_command_line_gives_them():
    flags = (
        "--output_dir out --num_train_epochs 2 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 16 --learning_rate 6e-5 --lr_scheduler_type cosine "
        "--loss_scaling 64 --warmup_ratio 0.1 --resume_from_checkpoint auto --fp16 --async_save "
        "--num_stages 4 --machine pod4"
    )
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags.split())
    assert (
        arguments.to_dict()
        == TrainingArguments(
            output_dir="out",
            num_train_epochs=2.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=16,
            learning_rate=6e-5,
            lr_scheduler_type="cosine",
            loss_scaling=64.0,
            warmup_ratio=0.1,
            resume_from_checkpoint="auto",
            fp16=True,
            async_save=True,
            num_stages=4,
            machine="pod4",
        ).to_dict()
    )


def test_what_the_loop_would_ignore_has_a_name():
    read = {"learning_rate": 1.0, "save_strategy": "epoch", "do_eval": True, "num_stages": 3}
    assert unread_by_the_loop(TrainingArguments(**read)) == []
    ignored = {"eval_strategy": "epoch", "label_smoothing_factor": 0.1, "optim": "sgd"}
    assert unread_by_the_loop(TrainingArguments(**ignored)) == sorted(ignored)


ONE_OF_TWO = """
import sys
import torch.distributed as dist
from ipu_pipeline.train import TrainingArguments
print("transformers.trainer" in sys.modules)
arguments = TrainingArguments()
print(arguments.process_index, arguments.world_size, arguments.should_save, dist.is_initialized())
"""


@pytest.mark.acceptance
def test_one_process_of_two_imports_no_trainer_and_starts_no_process_group(root):
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_OF_TWO],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "1", "2", "False", "False"]
