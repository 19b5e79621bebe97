"""The scripts over transformers' trainers: the same numbers in a pipeline and in one piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ipu_pipeline.errors import PipelineError
from tests.examples.tasks.tiny import BERT, ENCODER, NO_DROPOUT, make_tokenizer
from tests.later import now

EXAMPLES = Path(__file__).parents[2] / "examples"
# Script, demo data, its own flags, and the score that it prints.
SCRIPTS = {
    "clm": ("language-modeling/run_clm.py", "clm", "--block_size 32", "perplexity"),
    "summarization": (
        "summarization/run_summarization.py", "summarization",
        "--predict_with_generate --max_target_length 8 --num_beams 2", "rougeL",
    ),
    "translation": (
        "translation/run_translation.py", "translation",
        "--source_lang en --target_lang de --source_prefix to:", "loss",
    ),
    "glue": (
        "text-classification/run_glue.py", "sst2", "--task_name sst2 --max_seq_length 32",
        "accuracy",
    ),
    "xnli": (
        "text-classification/run_xnli.py", "xnli", "--language de --max_seq_length 32", "accuracy",
    ),
}  # fmt: skip


@pytest.fixture
def script(example, monkeypatch):
    """Return a function that imports a script by its path."""

    def load(path: str) -> Any:
        monkeypatch.syspath_prepend(str((EXAMPLES / path).parent))
        return example(Path(path).stem)

    return load


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BERT(**{**ENCODER, **NO_DROPOUT, "num_hidden_layers": 2})).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(example, script, tmp_path, encoder):
    def go(name: str, out: str, flags: str) -> dict[str, float]:
        path, demo, own, _ = SCRIPTS[name]
        data = tmp_path / "data"
        if not data.exists():
            example("make_task_data").main(demo, data, 1, 24, 8)
        files = {f.stem: f for f in data.iterdir() if f.stem in ("train", "validation")}
        small = (EXAMPLES / path).parent / "small"
        given = f"--model_name_or_path {small} --tokenizer_name {data}"
        if not (data / "tokenizer.json").exists():
            given = f"--model_name_or_path {encoder}"
        given += f" --train_file {files['train']} --validation_file {files['validation']}"
        given += f" --do_train --do_eval --max_steps 2 --disable_tqdm true --output_dir {out}"
        given += " --learning_rate 1e-3 --per_device_train_batch_size 4 --save_strategy no"
        given += " --gradient_accumulation_steps 2 --report_to none"
        module = script(path)
        options = example("script_options").parse(module.Options, f"{given} {own} {flags}".split())
        module.run(options)
        return json.loads((options.folder / "all_results.json").read_text())

    return go


# The others use the same trainer as one of these.
@pytest.mark.parametrize("name", now(("clm", "summarization", "glue"), SCRIPTS))
def test_two_stages_give_the_numbers_of_the_unsplit_model(run, tmp_path, capsys, name):
    whole = run(name, tmp_path / "whole", "--unsplit")
    split = run(name, tmp_path / "split", "--num_stages 2")
    assert (tmp_path / "split" / "plan.json").is_file()
    assert not (tmp_path / "whole" / "plan.json").exists()
    scores = [key for key in whole if not key.endswith(("_runtime", "_second", "_flos"))]
    assert f"eval_{SCRIPTS[name][3]}" in scores
    assert split == {**split, **{k: pytest.approx(whole[k], rel=1e-4) for k in scores}}
    assert capsys.readouterr().out.count(f"\n{SCRIPTS[name][3]} ") == 2


def test_without_predictions_the_score_is_the_loss(run, tmp_path, capsys):
    found = run("clm", tmp_path / "out", "--unsplit --prediction_loss_only")
    assert f"\nloss {found['eval_loss']:.4g} on " in capsys.readouterr().out


def test_latest_is_the_newest_checkpoint(run, tmp_path):
    flags = "--unsplit --save_strategy steps --save_steps 1 --logging_steps 1"
    out = tmp_path / "out"
    run("clm", out, f"{flags} --max_steps 1")
    run("clm", out, f"{flags} --resume_from_checkpoint latest")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


def test_a_causal_model_needs_two_tokens(run, tmp_path):
    with pytest.raises(ValueError, match="--block_size 1 leaves no next token; give at least 2"):
        run("clm", tmp_path / "out", "--unsplit --block_size 1")


def test_a_folder_without_a_tokenizer_is_named(example):
    small = EXAMPLES / "language-modeling" / "small"
    with pytest.raises(PipelineError, match=r"small holds no tokenizer; give the folder or name"):
        example("demo_model").load_tokenizer(str(small))


def test_scores_of_glue(script):
    glue = script(SCRIPTS["glue"][0])
    guess, labels = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 0])
    found = glue.f1(guess, labels, ("equivalent", "not_equivalent"))
    assert found == pytest.approx({"accuracy": 0.8, "f1": 0.8})
    found = glue.f1(guess, labels, ("0", "1"))
    assert found == pytest.approx({"accuracy": 0.8, "f1": 0.8})
    assert glue.matthews(guess, labels, ()) == pytest.approx({"matthews_correlation": 2 / 3})
    numbers = torch.tensor([1.0, 2.0, 4.0])
    assert glue.correlations(numbers, numbers**2, ())["spearmanr"] == pytest.approx(1, abs=1e-4)
