"""run_vqa.py on tiny data: the published command, every form of labels, split and unsplit."""

import json
import runpy
import sys
from itertools import pairwise

import datasets
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from ipu_pipeline.errors import DatasetError, PipelineError
from tests.examples.conftest import FOLDER
from tests.examples.vqa_tables import records, write_config, write_json
from tests.later import now
from tests.quick_calibration import make_quick

PLACED = {"ipu_config_name": "Graphcore/lxmert-base-ipu"}


@pytest.fixture
def script(example):
    return example("run_vqa")


@pytest.fixture
def options(example, script, tmp_path):
    """Return a function that makes options for tiny data and a tiny model."""
    folder = write_config(tmp_path / "model")

    def make(form="hard", **changes):
        train, validation = write_json(tmp_path, form)
        given = {
            "model_name_or_path": str(folder),
            "output_dir": tmp_path / "out",
            "train_file": train,
            "validation_file": validation,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return example("vqa_options").Options(**(given | changes))

    return make


def read(folder, name="all_results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def losses(folder):
    history = read(folder, "trainer_state.json")["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def weights(folder):
    """Return the trained weights, but for biases of keys: their gradients are rounding alone."""
    found = load_file(folder / "model.safetensors")
    return {name: value for name, value in found.items() if not name.endswith("key.bias")}


def test_the_published_command_runs(script, tmp_path, monkeypatch, capsys):
    parts = {"train": records(17), "validation": records(5, seed=1)}
    stored = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    stored.save_to_disk(tmp_path / "data")
    folder, out = write_config(tmp_path / "model"), tmp_path / "out"
    command = f"""
    --model_name_or_path {folder} --ipu_config_name Graphcore/lxmert-base-ipu
    --dataset_name {tmp_path / "data"} --do_train --do_eval --max_seq_length 512
    --per_device_train_batch_size 1 --num_train_epochs 1 --dataloader_num_workers 1
    --logging_steps 5 --learning_rate 5e-5 --lr_scheduler_type linear --loss_scaling 16384
    --weight_decay 0.01 --warmup_ratio 0.1 --output_dir {out} --dataloader_drop_last
    --replace_qa_head --pod_type pod16 --disable_tqdm
    """
    monkeypatch.setattr(sys, "argv", ["run_vqa.py", *command.split()])
    script.main()
    assert read(out, "trainer_state.json")["global_step"] == 2  # of 8 rows; the last row is dropped
    assert [len(stage["blocks"]) for stage in read(out, "plan.json")["stages"]] == [2, 1, 1, 4]
    answers = read(out, "predictions.json")
    assert [row["question_id"] for row in answers] == list(range(5))
    assert {row["answer"] for row in answers} <= {"0", "1", "2"}
    shown = capsys.readouterr().out
    for text in ("local target runs 1 of the 4 replicas", "after training: accuracy",
                 "the best single answer", "measured ms"):  # fmt: skip
        assert text in shown


@pytest.mark.parametrize("form", now(["soft"], ["hard", "text", "soft"]))
def test_the_split_does_not_change_what_is_learned(script, options, tmp_path, form):
    runs = {"placed": PLACED, "two": {"num_stages": 2}, "unsplit": {"unsplit": True}}
    for name, changes in runs.items():
        made = options(form, do_train=True, do_eval=True, output_dir=tmp_path / name, **changes)
        script.run(made)
    assert read(tmp_path / "two", "plan.json")["stages"][-1]["blocks"][-1] == "loss"
    for one, other in pairwise(runs):
        first, second = read(tmp_path / one), read(tmp_path / other)
        for metric in ("train_loss", "eval_loss", "eval_accuracy", "eval_constant_accuracy"):
            assert second[metric] == pytest.approx(first[metric], abs=1e-5)
        assert_close(weights(tmp_path / other), weights(tmp_path / one), rtol=1e-3, atol=1e-5)
        assert read(tmp_path / one, "predictions.json") == read(
            tmp_path / other, "predictions.json"
        )


def test_it_learns_and_its_model_can_be_evaluated_again(script, options, tmp_path):
    script.run(
        options("text", do_train=True, do_eval=True, eval_before_training=True, num_stages=2,
                num_train_epochs=12, learning_rate=1e-2, validation_file=tmp_path / "train.json")
    )  # fmt: skip
    results = read(tmp_path / "out")
    assert results["eval_loss"] < results["before_eval_loss"] / 2
    assert results["eval_accuracy"] > results["before_eval_accuracy"]
    again = options(
        "text",
        do_eval=True,
        model_name_or_path=str(tmp_path / "out"),
        validation_file=tmp_path / "train.json",
        plan=tmp_path / "out" / "plan.json",
        output_dir=tmp_path / "again",
    )
    script.run(again)
    assert read(tmp_path / "again")["eval_accuracy"] == results["eval_accuracy"]


def test_resuming_gives_the_same_losses(script, options, tmp_path):
    script.run(options(do_train=True, num_stages=2, save_steps=2, output_dir=tmp_path / "one"))
    checkpoint = tmp_path / "one" / "checkpoint-2"
    script.run(
        options(do_train=True, output_dir=tmp_path / "two", resume_from_checkpoint=str(checkpoint),
                **PLACED)
    )  # fmt: skip
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_the_unsplit_run_stops_where_it_is_told_to(script, options, tmp_path, capsys):
    script.run(
        options(do_train=True, eval_before_training=True, unsplit=True, max_steps=5,
                max_grad_norm=0.0, logging_steps=2)
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "before training: accuracy" in shown
    assert shown.count("'loss'") == 2
    assert read(tmp_path / "out", "train_results.json")["train_loss"] > 0
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_real_images_are_answered(script, options, monkeypatch, tmp_path):
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "cache"))
    make_quick(monkeypatch)
    made = options(
        do_train=True, do_eval=True, dataset_name="easy-vqa", train_file=None, validation_file=None,
        max_train_samples=8, max_eval_samples=4, num_stages=2,
    )  # fmt: skip
    script.run(made)
    assert read(tmp_path / "out")["eval_samples"] == 4
    assert read(tmp_path / "out", "config.json")["visual_feat_dim"] == 14
    assert read(tmp_path / "out", "config.json")["num_qa_labels"] == 13


def test_labels_out_of_range_are_refused(script, options, tmp_path):
    script.run(options("hard", do_train=True, num_stages=1, max_steps=1))
    (tmp_path / "more.json").write_text(json.dumps([{**records(1)[0], "label": 3}]))
    more = options(
        do_eval=True,
        model_name_or_path=str(tmp_path / "out"),
        validation_file=tmp_path / "more.json",
    )
    with pytest.raises(DatasetError, match=r"more\.json row 0: answer 3 is out of range, the mod"):
        script.run(more)


def test_another_feature_width_is_refused(script, options, tmp_path):
    script.run(options(do_train=True, num_stages=1, max_steps=1))
    wide = [{**row, "visual_feats": [[0.5] * 7] * 3} for row in records(2)]
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    changed = options(
        do_eval=True,
        model_name_or_path=str(tmp_path / "out"),
        validation_file=tmp_path / "wide.json",
    )
    with pytest.raises(DatasetError, match=r"has 7 features per region, the model reads 5 \("):
        script.run(changed)


def test_a_data_set_without_the_split_is_refused(script, options, tmp_path):
    datasets.Dataset.from_list(records(4)).save_to_disk(tmp_path / "one")
    made = options(
        do_eval=True, dataset_name=str(tmp_path / "one"), train_file=None, validation_file=None
    )
    with pytest.raises(DatasetError, match="has no split 'validation', only train; write that"):
        script.run(made)


def test_refuses_a_folder_with_another_run(script, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(PipelineError, match="out is not empty; resume with"):
        script.run(options(do_train=True))


@pytest.mark.usefixtures("script")
def test_an_unknown_data_set_is_one_line(tmp_path, monkeypatch):
    command = ["run_vqa.py", "--do_eval", "--dataset_name", "no/such"]
    command += ["--model_name_or_path", "small", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^error: data set 'no/such' cannot be lo") as ended:
        runpy.run_path(str(FOLDER / "run_vqa.py"), run_name="__main__")
    assert "\n" not in ended.value.code
