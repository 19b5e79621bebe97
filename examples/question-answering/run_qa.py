r"""Fine-tune a Transformers model for extractive question answering, split over pipeline stages.

    python examples/question-answering/run_qa.py --model_name_or_path minilm --num_stages 2 \
        --train_file out/demo_data/train.json --validation_file out/demo_data/validation.json \
        --do_train --do_eval --output_dir out/qa

Options are spelled as in transformers' own run_qa.py: ``qa_options.py``, ``../common/``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from demo_model import load_model_and_tokenizer
from fine_tuning import Job, Scores, fine_tune, prepare
from plan_report import is_first
from qa_data import load_windows
from qa_options import Options
from script_options import run_command_line
from script_run import read_ipu_config
from transformers import default_data_collator

from ipu_pipeline.stages.executable import Executable
from ipu_pipeline.train.data import Collator
from tasks.evaluation import EvalOutput, evaluate_loop
from tasks.packed_model import packed
from tasks.question_answering import (
    QuestionAnsweringDataset,
    score_predictions,
    select_answers,
    write_predictions,
)


def run(options: Options) -> None:
    """Fine-tune and evaluate a question-answering model that is split over pipeline stages."""
    prepare(options)
    model, tokenizer = load_model_and_tokenizer(options.model_name_or_path)
    train_windows, validation_windows = load_windows(options, tokenizer)
    splits = {"train": train_windows, "validation": validation_windows}
    data: dict[str, Any] = {split: windows for split, windows in splits.items() if windows}
    collate: Collator = default_data_collator
    if options.pack:
        data, collate = packed(model, data, collate, tokenizer, options)
    samples = next(iter(data.values()))  # Options refuses to do neither training nor evaluation

    def evaluate_now(executable: Executable) -> Scores:
        assert validation_windows is not None  # there whenever something is evaluated
        output = evaluate_loop(executable, data["validation"], options, collate_fn=collate)
        return evaluate(options, output, validation_windows)

    job = Job(
        model,
        tokenizer,
        data.get("train"),
        example=lambda size: collate([samples[n] for n in range(min(size, len(samples)))]),
        evaluate=evaluate_now,
        in_words=in_words,
        collate_fn=collate,
        ipu_config=read_ipu_config(options),
    )
    fine_tune(options, job)


def evaluate(
    options: Options, output: EvalOutput, windows: QuestionAnsweringDataset
) -> dict[str, Any]:
    """Answer every validation question; write the answers and return the scores."""
    answers = select_answers(
        windows.examples,
        windows.windows,
        output.outputs["start_logits"].float().numpy(),
        output.outputs["end_logits"].float().numpy(),
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
    )
    best = {identifier: candidates[0].text for identifier, candidates in answers.items()}
    scores = score_predictions(windows.examples, best)
    if is_first():
        write_predictions(options.folder, answers)
    return output.metrics | {
        "eval_f1": scores.f1,
        "eval_exact_match": scores.exact_match,
        "eval_samples": scores.total,
    }


def in_words(scores: Scores) -> str:
    """Return the scores as a line."""
    return (
        f"F1 {scores['eval_f1']:.2f}, exact match {scores['eval_exact_match']:.2f} "
        f"on {scores['eval_samples']} questions ({scores['eval_runtime']:.1f} s)"
    )


def main() -> None:
    """Run the command line; an error that the user can act on is one line."""
    run_command_line(run, Options)


if __name__ == "__main__":
    main()
