"""run_qa.py on the real local target: stages and resuming change nothing."""

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

STEPS = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def losses(folder):
    return [
        row["loss"] for row in read(folder, "trainer_state.json")["log_history"] if "loss" in row
    ]


@pytest.fixture
def reference(script, options, tmp_path):
    """Train in one stage without interruption."""
    made = options(do_train=True, do_eval=True, num_stages=1, output_dir=tmp_path / "one", **STEPS)
    script.run(made)
    return made.folder


def test_two_stages_give_the_same_losses_weights_and_answers(script, options, reference, tmp_path):
    folder = tmp_path / "two"
    script.run(options(do_train=True, do_eval=True, num_stages=2, output_dir=folder, **STEPS))
    assert len(read(folder, "plan.json")["stages"]) == 2
    assert len(losses(folder)) == 4
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-5)
    weights = load_file(reference / "model.safetensors")
    assert_close(load_file(folder / "model.safetensors"), weights, rtol=1e-4, atol=1e-5)
    one, two = read(reference, "all_results.json"), read(folder, "all_results.json")
    assert two["eval_f1"] == pytest.approx(one["eval_f1"])


def test_resuming_in_two_stages_gives_the_same_losses(script, options, reference, tmp_path):
    folder = tmp_path / "resumed"
    script.run(
        options(
            do_train=True,
            do_eval=True,
            num_stages=2,
            output_dir=folder,
            resume_from_checkpoint=str(reference / "checkpoint-2"),
            **STEPS,
        )
    )
    assert losses(folder) == pytest.approx(losses(reference), abs=1e-5)
    weights = load_file(reference / "model.safetensors")
    assert_close(load_file(folder / "model.safetensors"), weights, rtol=1e-4, atol=1e-5)


def test_the_written_plan_and_model_can_be_evaluated_again(script, options, reference, tmp_path):
    folder = tmp_path / "again"
    script.run(
        options(
            do_eval=True,
            train_file=None,
            model_name_or_path=str(reference),
            plan=reference / "plan.json",
            output_dir=folder,
        )
    )
    assert read(folder, "predictions.json") == read(reference, "predictions.json")
