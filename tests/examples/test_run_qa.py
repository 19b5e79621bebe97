"""run_qa.py around an unsplit stand-in for the target: what it asks for, writes and prints."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import DatasetDict

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.errors import DatasetError, PipelineError
from tests.examples.conftest import FOLDER, make_plan


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")  # transformers' own loading report
def test_trains_evaluates_and_writes_everything(script, options, eager, capsys):
    made = options(do_train=True, do_eval=True, eval_before_training=True, num_stages=2)
    script.run(made)
    folder = made.folder
    results = read(folder / "all_results.json")
    assert {"before_eval_f1", "eval_f1", "eval_exact_match", "eval_loss", "train_loss"} <= set(
        results
    )
    assert results["eval_samples"] == 8
    assert read(folder / "trainer_state.json")["global_step"] == 3
    predictions = read(folder / "predictions.json")
    assert set(predictions) == {f"validation-{i}" for i in range(8)}
    assert set(read(folder / "nbest_predictions.json")) == set(predictions)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "plan.json"):
        assert (folder / name).is_file()
    shown = capsys.readouterr().out
    for text in ("block", "Plan for Tiny", "before training: F1", "after training: F1",
                 "measured ms", "samples/s over 3 steps"):  # fmt: skip
        assert text in shown
    assert eager["executable"].closed


@pytest.mark.filterwarnings("ignore")
def test_packed_windows_have_the_answers_of_padded_ones(script, options, eager):
    answers = []
    for pack in (False, True):
        made = options(do_eval=True, pack=pack, max_seq_length=128)
        script.run(made)
        answers.append(read(made.folder / "nbest_predictions.json"))
    for question, candidates in answers[0].items():
        assert [c["text"] for c in answers[1][question]] == [c["text"] for c in candidates]


def test_what_it_asks_the_library_for(script, options, eager):
    script.run(options(do_train=True, num_stages=2, costs="profiled", schedule="gpipe", bf16=True))
    asked = eager["plan"]
    assert (asked["machine"], asked["num_stages"], asked["microbatches"]) == ("local", 2, 2)
    assert (asked["costs"], asked["config"]) == ("profiled", None)
    assert asked["batch"]["input_ids"].shape == (2, 192)
    assert set(asked["batch"]) >= {"attention_mask", "start_positions", "end_positions"}
    compiled = eager["compile"]
    assert compiled["target"] == "local"
    assert isinstance(compiled["optimizer"], torch.optim.AdamW)
    run_options = compiled["options"]
    assert (run_options.precision, run_options.schedule) == ("bf16", "gpipe")
    assert run_options.max_grad_norm == 1.0


def test_ipu_options_make_a_configuration(script, options, eager):
    script.run(
        options(
            do_train=True,
            gradient_accumulation_steps=None,
            ipu_config_overrides="layers_per_ipu=[1 1],gradient_accumulation_steps=3",
        )
    )
    config = eager["plan"]["config"]
    assert eager["plan"]["replicas"] == 1
    assert config.layers_per_ipu == (1, 1)
    assert eager["plan"]["microbatches"] == 3


def test_replicas_that_the_local_target_leaves_out_are_named(script, options, eager, capsys):
    changes = "layers_per_ipu=[1 1],replication_factor=2"
    script.run(options(do_train=True, ipu_config_overrides=changes, pod_type="pod4"))
    printed = capsys.readouterr().out
    assert "local target runs 1 of the 2 replicas" in printed
    assert "without effect" not in printed
    assert eager["plan"]["replicas"] == 1
    script.run(
        options(
            do_train=True,
            ipu_config_overrides=changes,
            target="poptorch",
            pod_type="pod4",
            overwrite_output_dir=True,
            max_train_samples=16,
        )
    )
    assert (eager["plan"]["replicas"], eager["plan"]["machine"]) == (2, "pod4")


@pytest.mark.parametrize(("target", "sharded"), [("distributed", True), ("local", False)])
def test_state_is_divided_where_the_configuration_says_so(
    script, options, eager, tmp_path, target, sharded
):
    plan = tmp_path / "plan.json"
    make_plan(2, 2).save(plan)
    changes = "replicated_tensor_sharding=true"
    script.run(options(do_train=True, ipu_config_overrides=changes, target=target, plan=plan))
    assert eager["compile"]["options"].replicated_tensor_sharding is sharded


def test_evaluation_alone_needs_no_optimizer(script, options, eager, capsys):
    script.run(options(do_eval=True, train_file=None, max_eval_samples=3))
    assert eager["compile"]["optimizer"] is None
    assert len(eager["plan"]["batch"]["input_ids"]) <= 4
    shown = capsys.readouterr().out
    assert "result: F1" in shown
    assert "on 3 questions" in shown


def test_a_plan_file_replaces_planning(script, options, eager, tmp_path):
    path = make_plan(2, 2).save(tmp_path / "plan.json")
    script.run(options(do_train=True, plan=path or tmp_path / "plan.json"))
    assert "plan" not in eager
    assert eager["executable"].plan.num_stages == 2


def test_refuses_a_folder_with_another_run(script, options, eager, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(PipelineError, match=r"out is not empty; resume with --resume_from_check"):
        script.run(options(do_train=True))
    script.run(options(do_train=True, overwrite_output_dir=True))
    assert eager["executable"].global_step == 3


def test_closes_the_executable_after_an_error(example, script, options, eager, monkeypatch):
    def fail(*_, **__):
        raise PipelineError("stage 1 failed")

    monkeypatch.setattr(example("fine_tuning"), "train", fail)
    with pytest.raises(PipelineError, match="stage 1 failed"):
        script.run(options(do_train=True))
    assert eager["executable"].closed


def test_a_hub_data_set_without_the_split_is_refused(example, options, monkeypatch):
    import datasets

    row = {"id": "a", "context": "in 1887", "question": "when", "title": ""}
    row["answers"] = {"text": ["1887"], "answer_start": [3]}
    only = DatasetDict(train=datasets.Dataset.from_list([row]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: only)
    made = options(do_eval=True, dataset_name="mine", train_file=None, validation_file=None)
    with pytest.raises(DatasetError, match="'mine' has no split 'validation', only train; write"):
        example("qa_data").load_windows(made, None)


def test_measurements_leave_out_the_first_step(example):
    report = example("plan_report")
    timed = report.TimedExecutable(None)
    plan = make_plan()
    assert "nothing to compare" in report.measured_against_predicted(plan, timed)
    timed.step_s, timed.stage_s, timed.num_samples = [9, 0.5, 0.5], [(8, 8), (0.12, 0.06)] * 1, 30
    shown = report.measured_against_predicted(plan, timed)
    first = next(line for line in shown.splitlines() if line.strip().startswith("0:"))
    # Predicted: (10 + 20) ms for each of 2 microbatches; measured: 120 ms.
    assert first.split()[-3:] == ["60.00", "120.00", "2.00"]
    assert shown.endswith("3.0 samples/s over 3 steps")


def test_without_times_of_stages_there_is_the_step_alone(example):
    report = example("plan_report")
    timed = report.TimedExecutable(None)
    timed.step_s, timed.num_samples = [9, 0.5, 0.5], 30
    *_, step, summary = report.measured_against_predicted(make_plan(), timed).splitlines()
    assert step.split() == ["optimizer", "step", "100.00", "500.00", "5.00"]
    assert summary == "3.0 samples/s over 3 steps"
    assert "0:" not in report.measured_against_predicted(make_plan(), timed)


def test_only_the_first_process_prints_and_writes(script, options, eager, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    made = options(do_train=True, do_eval=True, eval_before_training=True, num_stages=2)
    script.run(made)
    assert "F1" not in capsys.readouterr().out
    # The stand-in for the target does not know of other processes.
    assert [path.name for path in made.folder.iterdir()] == ["checkpoint-3"]


MISTAKES = [
    (["--do_train"], r"error: --do_train needs --train_file \(SQuAD v1.1 JSON\)"),
    (["--do_eval", "--validation_file", "none.json"], r"none\.json: No such file"),
    (["--do_eval", "--dataset_name", "squad"], "error: data set 'squad' cannot be loaded "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(script, tiny_model, tmp_path, monkeypatch, arguments, message):
    import datasets

    def offline(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    common = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["run_qa.py", *common, *arguments])
    with pytest.raises(SystemExit, match=message) as caught:
        script.main()
    assert "\n" not in str(caught.value)
    left = [path.name for path in (tmp_path / "out").glob("*")]
    assert left in ([], [".run.lock"])  # the folder is tried before data are loaded


@pytest.mark.acceptance
def test_runs_as_a_script(tiny_model, tmp_path):
    environment = {"PYTHONPATH": str(FOLDER.parents[1]), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, str(FOLDER / "run_qa.py"), "--do_eval", "--dataset_name", "squad"]
    command += ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: data set 'squad' cannot be load")
    assert "Traceback" not in done.stderr


def test_ipu_settings_without_effect_here_are_named(script):
    report = sys.modules["plan_report"]
    config = IPUConfig(layers_per_ipu=(1, 1), embedding_serialization_factor=2)
    assert report.local_note(config) == (
        "note: without effect on the local target: embedding_serialization_factor=2"
    )
    assert report.local_note(IPUConfig(layers_per_ipu=(1, 1))) == ""
