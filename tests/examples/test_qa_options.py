"""The command line of run_qa.py: every published flag is accepted, contradictions are refused."""

import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

# The published command line of the IPU version of run_qa.py, word for word.
PUBLISHED = """
--model_name_or_path bert-base-uncased --ipu_config_name Graphcore/bert-base-ipu
--dataset_name squad --do_train --do_eval --num_train_epochs 2
--per_device_train_batch_size 4 --per_device_eval_batch_size 16
--gradient_accumulation_steps 16 --pod_type pod16 --learning_rate 9e-5 --max_seq_length 384
--doc_stride 128 --seed 1984 --lr_scheduler_type linear --loss_scaling 64 --weight_decay 0.01
--warmup_ratio 0.2 --logging_steps 10 --save_steps 1000 --dataloader_num_workers 64
--ipu_config_overrides=device_iterations=1,matmul_proportion=[0.2,0.3] --output_dir output
"""


@pytest.fixture
def module(example):
    return example("qa_options")


@pytest.fixture
def common(example):
    return example("script_options")


@pytest.fixture
def call(module, common):
    """Return a function that gives the options of a command line."""
    return lambda *arguments: common.parse(module.Options, list(arguments))


def test_takes_the_published_command_line(call):
    options = call(*shlex.split(PUBLISHED))
    assert options.model_name_or_path == "bert-base-uncased"
    assert options.ipu_config_name == "Graphcore/bert-base-ipu"
    assert options.ipu_config_overrides == "device_iterations=1,matmul_proportion=[0.2,0.3]"
    assert (options.dataset_name, options.do_train, options.do_eval) == ("squad", True, True)
    assert (options.num_train_epochs, options.learning_rate) == (2.0, 9e-5)
    assert (options.gradient_accumulation_steps, options.pod_type) == (16, "pod16")
    assert (options.loss_scaling, options.warmup_ratio, options.seed) == (64, 0.2, 1984)
    assert options.folder == Path("output")


OWN = """
--model_name_or_path minilm --output_dir o --do_train --train_file t.json --target local
--num_stages 2 --resume_from_checkpoint auto --max_steps 7 --max_train_samples 9
--max_eval_samples 8 --max_grad_norm 0 --bf16 --schedule gpipe --machine local --n_best_size 3
--max_answer_length 9 --overwrite_output_dir --costs profiled --eval_before_training
--validation_file v.json --save_total_limit 1 --disable_tqdm
"""


def test_takes_the_options_of_its_own(call):
    options = call(*shlex.split(OWN))
    assert options.evaluates
    assert (options.train_file, options.num_stages, options.costs) == (
        Path("t.json"),
        2,
        "profiled",
    )
    assert (options.max_steps, options.schedule, options.bf16) == (7, "gpipe", True)


def test_every_field_is_an_option_with_help(module, call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert issubclass(module.Options, TrainingArguments)
    own = {f.name for f in fields(module.Options)} - {f.name for f in fields(TrainingArguments)}
    assert len(own) > 25
    for item in fields(module.Options):
        assert f"--{item.name} " in shown
        assert item.name not in own or item.metadata["help"].split()[0] in shown


def test_launch_tells_plan_target_and_schedule(call, monkeypatch):
    told = {"PLAN": "p.json", "TARGET": "distributed", "SCHEDULE": "gpipe"}
    for name, value in told.items():
        monkeypatch.setenv(f"IPU_PIPELINE_{name}", value)
    given = (
        "--model_name_or_path",
        "m",
        "--output_dir",
        "o",
        "--do_eval",
        "--validation_file",
        "v",
    )
    options = call(*given)
    assert (options.plan, options.target, options.schedule) == (
        "p.json",
        "distributed",
        "gpipe",
    )
    options = call(*given, "--target", "local", "--plan", "own.json")
    assert (options.plan, options.target) == ("own.json", "local")


def test_an_unknown_option_is_refused(call):
    for wrong in ("--learning", "--learning_rates"):  # no abbreviations
        with pytest.raises(ValueError, match=wrong):
            call(*OWN.split(), wrong, "1")


def test_what_the_scripts_would_ignore_is_refused(module):
    given = {
        "do_eval": True,
        "validation_file": Path("v"),
        "eval_strategy": "epoch",
        "optim": "sgd",
    }
    with pytest.raises(ValueError, match="does nothing with --eval_strategy and --optim; leave"):
        module.Options(model_name_or_path="m", output_dir="o", **given)


CONTRADICTIONS = {
    "nothing to do: give --do_train or --do_eval": {},
    "--dataset_name squad and --train_file or --validation_file are both given": {
        "do_train": True,
        "dataset_name": "squad",
        "train_file": Path("t"),
    },
    r"--do_train needs --train_file \(SQuAD v1.1 JSON\) or --dataset_name": {"do_train": True},
    r"evaluating needs --validation_file \(SQuAD": {"do_eval": True},
    "--target distributed runs in processes that share one plan: give --plan, or start": {
        "do_eval": True,
        "validation_file": Path("v"),
        "target": "distributed",
    },
    "--plan p.json already decides what --machine and --num_stages would": {
        "do_eval": True,
        "validation_file": Path("v"),
        "plan": "p.json",
        "num_stages": 2,
        "machine": "local",
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_refuses_contradictions(module, message):
    with pytest.raises(ValueError, match=message):
        module.Options(model_name_or_path="m", output_dir=Path("o"), **CONTRADICTIONS[message])


@pytest.mark.parametrize(
    ("name", "least"),
    [("max_train_samples", 1), ("max_answer_length", 1), ("n_best_size", 1), ("doc_stride", 0)],
)
def test_counts_are_not_negative(module, name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got -1"):
        module.Options(
            model_name_or_path="m", output_dir="o", do_train=True, train_file="t", **{name: -1}
        )


def test_a_disk_that_is_full_is_one_line(module, monkeypatch):
    import script_options

    def full(_):
        raise OSError(28, "No space left on device", "out/x")

    monkeypatch.setattr(sys, "argv", ["run_qa.py", *OWN.split()])
    with pytest.raises(SystemExit, match=r"error: .*No space left on device: 'out/x'; make room"):
        script_options.run_command_line(full, module.Options)


def test_ctrl_c_is_one_line_and_130(root):
    script = root / "examples" / "question-answering" / "run_qa.py"
    source = script.read_text().replace(
        "from fine_tuning", "raise KeyboardInterrupt\nfrom fine_tuning"
    )
    code = f"__file__ = {str(script)!r}\nexec(compile({source!r}, 'run_qa.py', 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.parametrize(
    ("given", "machine"),
    [
        ({}, "local"),
        ({"target": "poptorch"}, "pod1"),
        ({"target": "poptorch", "num_stages": 2}, "pod2"),
        ({"target": "poptorch", "ipu_config_name": "Graphcore/bert-base-ipu"}, "pod4"),
        (
            {
                "target": "poptorch",
                "ipu_config_name": "Graphcore/bert-base-ipu",
                "pod_type": "pod16",
            },
            "pod16",
        ),
        ({"target": "poptorch", "machine": "bow-pod16"}, "bow-pod16"),
    ],
)
def test_machine_of_a_plan(example, module, given, machine):
    script_run = example("script_run")
    options = module.Options(model_name_or_path="m", output_dir=Path("o"), do_eval=True,
                             validation_file="v", **given)  # fmt: skip
    assert script_run.machine_of(options, script_run.read_ipu_config(options)) == machine
