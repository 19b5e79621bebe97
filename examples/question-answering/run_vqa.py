r"""Train LXMERT for visual question answering, split over pipeline stages.

    python examples/question-answering/run_vqa.py --model_name_or_path small \
        --dataset_name easy-vqa --ipu_config_name Graphcore/lxmert-base-ipu \
        --do_train --do_eval --output_dir out/vqa

Options are spelled as in transformers' own scripts: ``vqa_options.py``, ``../common/``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from fine_tuning import (
    Job,
    Scores,
    evaluate_after,
    evaluate_before,
    fine_tune,
    prepare,
    save_model,
)
from plan_report import is_first
from script_options import run_command_line
from script_run import machine_of, read_ipu_config, write_results
from vqa_data import read_splits
from vqa_model import Loaded, load_lxmert
from vqa_options import Options
from vqa_placement import in_execution_order, with_published_placement
from vqa_unsplit import Unsplit, train_unsplit

from ipu_pipeline.ir.files import write_text
from ipu_pipeline.stages.executable import Executable
from tasks.evaluation import evaluate_loop
from tasks.visual_question_answering import (
    VisualQuestionAnsweringDataset,
    score_answers,
)

Dataset = VisualQuestionAnsweringDataset


def run(options: Options) -> None:
    """Train and evaluate LXMERT for visual question answering, split over pipeline stages."""
    prepare(options)
    splits = read_splits(options)
    loaded = load_lxmert(options, splits)
    width = loaded.model.config.visual_feat_dim
    train_set, validation = splits.build(options, loaded.tokenizer, loaded.answers, width)
    job = make_job(options, loaded, train_set, validation)
    if options.unsplit:
        _run_unsplit(options, job, train_set)
    else:
        fine_tune(options, job)


def make_job(
    options: Options, loaded: Loaded, train_set: Dataset | None, validation: Dataset | None
) -> Job:
    """Return what is trained and how it is scored, in the published placement if one is named."""
    dataset = train_set or validation
    assert dataset is not None  # the options refuse to do neither training nor evaluation

    def evaluate_now(executable: Executable) -> Scores:
        assert validation is not None  # read_splits gives it whenever something is evaluated
        return evaluate(options, executable, validation, loaded)

    config = with_published_placement(read_ipu_config(options), loaded.model.config)
    return Job(
        loaded.model,
        loaded.tokenizer,
        train_set,
        example=dataset.head,
        evaluate=evaluate_now,
        in_words=in_words,
        ipu_config=config,
        constraints=in_execution_order(config, machine_of(options, config)),
    )


def _run_unsplit(options: Options, job: Job, train_set: Dataset | None) -> None:
    """Train and evaluate the model in one piece."""
    options.gradient_accumulation_steps = options.gradient_accumulation_steps or 1
    runner = cast(Executable, Unsplit(job.model))
    evaluate_before(options, job, runner)
    if train_set is not None:
        write_results(options, "train", train_unsplit(job.model, train_set, options))
        save_model(options, job, runner)
    evaluate_after(options, job, runner)


def evaluate(
    options: Options, executable: Executable, dataset: Dataset, loaded: Loaded
) -> dict[str, Any]:
    """Answer every validation question; write the answers and return the scores."""
    output = evaluate_loop(executable, dataset, options)
    chosen = output.outputs["question_answering_score"].argmax(dim=1).tolist()
    scores = score_answers(dataset.labels.weights, chosen)
    if is_first():
        _write_predictions(options.folder, dataset, [loaded.answers.names[i] for i in chosen])
    return output.metrics | {
        "eval_accuracy": scores.accuracy,
        "eval_constant_accuracy": scores.constant_accuracy,
        "eval_samples": scores.total,
    }


def in_words(scores: Scores) -> str:
    """Return the scores as a line."""
    return (
        f"accuracy {scores['eval_accuracy']:.2f} on {scores['eval_samples']} questions "
        f"({scores['eval_runtime']:.1f} s); the best single answer to all of them: "
        f"{scores['eval_constant_accuracy']:.2f}"
    )


def _write_predictions(folder: Path, dataset: Dataset, answers: Sequence[str]) -> None:
    """Write ``predictions.json`` in the format of VQA's results."""
    rows = [{"question_id": i, "answer": a} for i, a in zip(dataset.ids, answers, strict=True)]
    text = json.dumps(rows, indent=1, default=int)
    write_text(folder / "predictions.json", text + "\n")


def main() -> None:
    """Run the command line."""
    run_command_line(run, Options)


if __name__ == "__main__":
    main()
