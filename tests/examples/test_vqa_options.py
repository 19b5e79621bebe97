"""The command line of run_vqa.py: every published flag is accepted, contradictions are refused."""

import shlex
from pathlib import Path

import pytest

# The published command line of the IPU version of run_vqa.py, word for word.
PUBLISHED = """
--model_name_or_path unc-nlp/lxmert-base-uncased --ipu_config_name Graphcore/lxmert-base-ipu
--dataset_name Graphcore/vqa-lxmert --do_train --do_eval --max_seq_length 512
--per_device_train_batch_size 1 --num_train_epochs 4 --dataloader_num_workers 64
--logging_steps 5 --learning_rate 5e-5 --lr_scheduler_type linear --loss_scaling 16384
--weight_decay 0.01 --warmup_ratio 0.1 --output_dir /tmp/vqa/ --dataloader_drop_last
--replace_qa_head --pod_type pod16
"""


@pytest.fixture
def module(example):
    return example("vqa_options")


@pytest.fixture
def call(module, example):
    """Return a function that gives the options of a command line."""
    return lambda *arguments: example("script_options").parse(module.Options, list(arguments))


def test_takes_the_published_command_line(call):
    options = call(*shlex.split(PUBLISHED))
    assert options.model_name_or_path == "unc-nlp/lxmert-base-uncased"
    assert options.ipu_config_name == "Graphcore/lxmert-base-ipu"
    assert (options.dataset_name, options.do_train, options.do_eval) == (
        "Graphcore/vqa-lxmert",
        True,
        True,
    )
    assert (options.max_seq_length, options.per_device_train_batch_size) == (512, 1)
    assert (options.num_train_epochs, options.dataloader_num_workers) == (4.0, 64)
    assert (options.logging_steps, options.learning_rate) == (5, 5e-5)
    assert (options.lr_scheduler_type, options.loss_scaling) == ("linear", 16384)
    assert (options.weight_decay, options.warmup_ratio) == (0.01, 0.1)
    assert (options.dataloader_drop_last, options.replace_qa_head) == (True, True)
    assert (options.folder, options.pod_type) == (Path("/tmp/vqa/"), "pod16")


def test_the_pod_has_two_names(call):
    later = PUBLISHED.replace("--pod_type pod16", "--n_ipu 16")
    assert call(*shlex.split(later)).pod_type == "pod16"
    with pytest.raises(ValueError, match="--n_ipu 16 and --pod_type pod16 say the same; give one"):
        call(*shlex.split(PUBLISHED), "--n_ipu", "16")


def test_takes_the_options_of_its_own(call):
    own = """--model_name_or_path small --output_dir o --do_train --do_eval --train_file t.parquet
    --validation_file v.jsonl --target local --image_grid 8 --unsplit"""
    options = call(*shlex.split(own))
    assert (options.image_grid, options.unsplit, options.target) == (8, True, "local")
    assert options.validation_file == Path("v.jsonl")


def test_help_shows_its_own_options(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in ("replace_qa_head", "image_grid", "unsplit", "train_file", "pod_type", "costs"):
        assert f"--{name} " in shown


EASY = {"dataset_name": "easy-vqa"}
CONTRADICTIONS = {
    r"--do_train needs --train_file \(Parquet or JSON with region features\)": {"do_train": True},
    "--unsplit runs the whole model in float32 .* leave out --num_stages, --schedule": {
        **EASY,
        "do_train": True,
        "unsplit": True,
        "num_stages": 2,
        "schedule": "gpipe",
    },
    "without checkpoints; leave out --target": {
        **EASY,
        "do_train": True,
        "unsplit": True,
        "target": "poptorch",
    },
    "--replace_qa_head makes a new head, which has to be trained; add --do_train": {
        **EASY,
        "do_eval": True,
        "replace_qa_head": True,
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_refuses_contradictions(module, message):
    with pytest.raises(ValueError, match=message):
        module.Options(model_name_or_path="m", output_dir=Path("o"), **CONTRADICTIONS[message])
