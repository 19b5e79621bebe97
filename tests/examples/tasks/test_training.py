"""Every task, trained for seconds in two stages, beats its baseline; resuming repeats it."""

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.train import TrainingArguments, build_optimizer, train
from tasks.evaluation import baseline_scores, evaluate_task
from tasks.table import TASKS
from tests.examples.tasks.tiny import build
from tests.later import one_in

MICROBATCHES = 2
# Most learn in fewer steps.
STEPS = dict.fromkeys(TASKS, 80) | {"token-classification": 120}
# How far the main score has to get from the baseline's: a sum, or a factor below it.
MARGINS = {
    "sequence-classification": 0.3,
    "token-classification": 0.3,
    "multiple-choice": 0.3,
    "masked-lm": 0.6,
    "pretraining": 0.6,
}


def arguments_for(folder, **changes):
    given = {
        "output_dir": str(folder),
        "max_steps": 120,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": MICROBATCHES,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**(given | changes))


def compiled(tiny, arguments, num_stages=2):
    size = arguments.per_device_train_batch_size
    plan = ipp.plan(tiny.model, tiny.batch(size), num_stages=num_stages, microbatches=MICROBATCHES)
    optimizer = build_optimizer(tiny.model, arguments)
    return ipp.compile(tiny.model, plan, optimizer=optimizer, self_check=False)


@pytest.mark.parametrize("name", one_in(5, TASKS))
def test_a_short_training_beats_the_trivial_baseline(name, tmp_path):
    tiny = build(name, num_hidden_layers=2, count=400)
    arguments = arguments_for(tmp_path, max_steps=STEPS[name])
    held_out = tiny.encode(60, seed=1)
    with compiled(tiny, arguments) as executable:
        train(executable, tiny.train, arguments, collate_fn=tiny.task.collator(tiny.setup))
        scores = evaluate_task(tiny.task, executable, held_out, arguments, tiny.setup)
    trivial = baseline_scores(tiny.task, tiny.model, tiny.train, held_out, arguments, tiny.setup)
    reached, baseline = scores[f"eval_{tiny.task.main_metric}"], trivial[tiny.task.main_metric]
    assert scores["eval_samples"] == len(held_out)
    if tiny.task.main_metric == "perplexity":
        assert reached < MARGINS[name] * baseline
    else:
        assert reached > MARGINS[name] + baseline


def test_a_resumed_run_hides_the_same_tokens_under_another_split(tmp_path):
    def losses(folder, num_stages, **changes):
        tiny = build("masked-lm", count=40, num_hidden_layers=2)
        arguments = arguments_for(
            folder, max_steps=6, save_strategy="steps", save_steps=3, **changes
        )
        with compiled(tiny, arguments, num_stages) as executable:
            result = train(
                executable, tiny.train, arguments, collate_fn=tiny.task.collator(tiny.setup)
            )
        return [row["loss"] for row in result.log_history if "loss" in row]

    whole = losses(tmp_path / "whole", 1)
    again = losses(
        tmp_path / "again", 2, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert len(whole) == 6
    assert len(set(whole)) == 6
    assert again == pytest.approx(whole, abs=1e-5)


def test_evaluating_twice_hides_the_same_tokens(tmp_path):
    tiny = build("masked-lm", count=20, num_hidden_layers=2)
    arguments = arguments_for(tmp_path)
    with compiled(tiny, arguments) as executable:
        torch.manual_seed(1)
        first = evaluate_task(tiny.task, executable, tiny.train, arguments, tiny.setup)
        torch.manual_seed(2)
        second = evaluate_task(tiny.task, executable, tiny.train, arguments, tiny.setup)
    assert first["eval_perplexity"] == second["eval_perplexity"]
