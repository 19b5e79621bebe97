"""The scripts of the table's tasks on the real local target, with a tiny model of two stages."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ipu_pipeline.errors import DatasetError
from tasks.table import TASKS
from tests.examples.tasks.tiny import BERT, ENCODER, make_tokenizer
from tests.later import every_second

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "sequence-classification": ("text-classification/run_classification.py", "classification"),
    "token-classification": ("token-classification/run_ner.py", "ner"),
    "multiple-choice": ("multiple-choice/run_swag.py", "swag"),
    "masked-lm": ("language-modeling/run_mlm.py", "mlm"),
    "pretraining": ("pretraining/run_pretraining.py", "pretraining"),
}


@pytest.fixture
def run_task(example):
    return example("run_task")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Write an encoder without any head, and its tokenizer; return the folder."""
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128}
    BertModel(BERT(**{**ENCODER, **sizes})).save_pretrained(folder)
    make_tokenizer(model_max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture
def options(example, run_task, encoder, tmp_path):
    def make(name, **changes):
        data = tmp_path / "data"
        example("make_task_data").main(SCRIPTS[name][1], data, 1, 24, 8)
        found = {path.stem: path for path in data.iterdir()}
        given = {
            "model_name_or_path": str(encoder),
            "output_dir": tmp_path / "out",
            "train_file": found["train"],
            "validation_file": found["validation"],
            "max_seq_length": 64,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_stages": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        }
        return run_task.options_of(TASKS[name])(**(given | changes))

    return make


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", every_second(TASKS))
def test_trains_evaluates_and_writes_everything(run_task, options, name, capsys):
    made = options(name, do_train=True, do_eval=True)
    run_task.run(TASKS[name], made)
    results = read(made.folder / "all_results.json")
    score = TASKS[name].main_metric
    assert {f"eval_{score}", f"eval_baseline_{score}", "eval_loss", "train_loss"} <= set(results)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "plan.json"):
        assert (made.folder / file).is_file()
    shown = capsys.readouterr().out
    assert "new weights, to be trained" in shown
    assert f"after training: {score} " in shown
    assert "(trivial baseline " in shown
    if TASKS[name].labels_of is not None:
        assert len(read(made.folder / "config.json")["id2label"]) > 2

    again = options(
        name, do_eval=True, train_file=None, model_name_or_path=str(made.folder),
        plan=made.folder / "plan.json", num_stages=None,
        output_dir=made.folder.with_name("again"),
    )  # fmt: skip
    run_task.run(TASKS[name], again)
    written = read(again.folder / "all_results.json")
    assert written[f"eval_{score}"] == pytest.approx(results[f"eval_{score}"])
    assert not any("baseline" in key for key in written)  # there is nothing it could learn from
    assert f"result: {score} " in capsys.readouterr().out


def test_packed_samples_have_the_scores_of_padded_ones(run_task, options, capsys, tmp_path):
    name, data = "sequence-classification", tmp_path / "short.csv"
    rows = [f"{'w1 ' * n}{word},{word}" for n in range(1, 7) for word in ("good", "bad")]
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    files = {"train_file": data, "validation_file": data}
    made = options(name, do_train=True, do_eval=True, max_steps=1, pack=True, **files)
    run_task.run(TASKS[name], made)
    assert "packed validation: 12 sequences in 2 rows of 64 tokens" in capsys.readouterr().out
    padded = options(
        name, do_eval=True, train_file=None, validation_file=data, pad_to_max_length=False,
        model_name_or_path=str(made.folder), output_dir=tmp_path / "padded",
    )  # fmt: skip
    run_task.run(TASKS[name], padded)
    found, expected = (read(one.folder / "eval_results.json") for one in (made, padded))
    for score in ("eval_loss", "eval_accuracy", "eval_f1", "eval_samples"):
        assert found[score] == pytest.approx(expected[score], abs=1e-5)


def test_numbers_of_a_trained_model_stay(run_task, options, capsys):
    """Training goes on with the classes that the model knows, though the new data has fewer."""
    name = "sequence-classification"
    made = options(name, do_train=True)
    run_task.run(TASKS[name], made)
    rows = csv.DictReader(made.train_file.read_text().splitlines())
    fewer = [row for row in rows if row["label"] != "negative"]
    path = made.folder.with_name("fewer.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in fewer))
    second = options(
        name, do_train=True, train_file=path, model_name_or_path=str(made.folder),
        output_dir=made.folder.with_name("second"),
    )  # fmt: skip
    capsys.readouterr()
    run_task.run(TASKS[name], second)
    assert "new weights" not in capsys.readouterr().out
    config = read(second.folder / "config.json")
    assert config["id2label"] == {"0": "negative", "1": "positive", "2": "unmentioned"}


def test_a_hub_data_set_takes_the_place_of_files(run_task, options, monkeypatch):
    import datasets

    rows = [{"text": "w1", "label": label} for label in "abab"]
    only = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only)
    hub = {"dataset_name": "mine", "train_file": None, "validation_file": None}
    made = options("sequence-classification", do_train=True, max_train_samples=3, **hub)
    assert run_task.read_splits(made) == {"train": rows[:3]}
    made = options("sequence-classification", do_eval=True, **hub)
    with pytest.raises(DatasetError, match="'mine' has no split 'validation', only train; write"):
        run_task.read_splits(made)


@pytest.mark.parametrize("name", TASKS)
def test_is_a_short_script_that_says_what_is_wrong(name, encoder, tmp_path, monkeypatch):
    path = EXAMPLES / SCRIPTS[name][0]
    assert len(path.read_text().splitlines()) <= 40
    given = ["--do_eval", "--validation_file", "none.csv", "--model_name_or_path", str(encoder)]
    monkeypatch.setattr(sys, "argv", [path.name, *given, "--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    with pytest.raises(
        SystemExit, match=r"^error: cannot read the samples none\.csv: No such file"
    ):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.usefixtures("run_task")
@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_as_a_script(name, encoder, tmp_path, monkeypatch):
    command = [SCRIPTS[name][0], "--do_eval", "--output_dir", str(tmp_path / "out")]
    command += ["--validation_file", "none.json", "--model_name_or_path", str(encoder)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^error: cannot read the samples none.json") as ended:
        runpy.run_path(str(EXAMPLES / SCRIPTS[name][0]), run_name="__main__")
    assert "\n" not in ended.value.code


# Flags that transformers' own scripts of these tasks have, as people write them.
COMMANDS = {
    "sequence-classification": "--text_column_names a,b --label_column_name c",
    "token-classification": "--text_column_name words --label_column_name tags",
    "multiple-choice": "--no_pad_to_max_length",
    "masked-lm": "--mlm_probability 0.3 --line_by_line --pad_to_max_length",
    "pretraining": "--mlm_probability 0.3 --nsp_probability 0.4 --text_column_name text",
}


@pytest.mark.parametrize("name", TASKS)
def test_takes_the_flags_of_transformers(example, run_task, name, capsys):
    kind, parse = run_task.options_of(TASKS[name]), example("script_options").parse
    common = "--model_name_or_path m --output_dir o --do_train --train_file t --max_seq_length 99"
    options = parse(kind, [*common.split(), *COMMANDS[name].split()])
    assert options.max_seq_length == 99
    assert options.pad_to_max_length is (name != "multiple-choice")
    with pytest.raises(SystemExit):
        parse(kind, ["--help"])
    assert "--pad_to_max_length" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_seq_length must be at least 4, got 2"):
        parse(kind, [*common.split()[:-1], "2"])
