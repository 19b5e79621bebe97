"""Fine-tune the same model twice: split over stages, and unsplit with transformers' Trainer.

Same weights, data, seed, batch size, steps, optimizer and schedule; dropout masks and the order
of the samples are drawn differently. Prints one JSON object with both F1 scores.

    python -m benchmarks.qa_parity --model_name_or_path minilm --num_stages 2 \
        --train_file T --validation_file V --do_train --do_eval --output_dir OUT [...]

Takes the options of ``examples/question-answering/run_qa.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "question-answering"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent / "common")]

from demo_model import load_model_and_tokenizer  # noqa: E402
from qa_data import load_windows  # noqa: E402
from qa_options import Options  # noqa: E402
from script_options import run_command_line  # noqa: E402

from tasks.question_answering import (  # noqa: E402
    QuestionAnsweringDataset,
    score_predictions,
    select_answers,
)


def compare(options: Options) -> None:
    """Run both and print their scores."""
    ours = _pipeline_scores(options)
    theirs = _trainer_scores(options)
    result = {
        "pipeline": ours,
        "trainer": theirs,
        "f1_difference": ours["f1"] - theirs["f1"],
    }
    print(json.dumps(result, indent=1))


def _pipeline_scores(options: Options) -> dict[str, Any]:
    """Run ``run_qa.py`` with the same command line in a process of its own."""
    command = [sys.executable, str(EXAMPLES / "run_qa.py"), *sys.argv[1:]]
    subprocess.run(command, check=True, stdout=sys.stderr)
    results = json.loads((options.folder / "all_results.json").read_text(encoding="utf-8"))
    return {
        "f1": results["eval_f1"],
        "exact_match": results["eval_exact_match"],
        "train_samples_per_second": results["train_samples_per_second"],
    }


def _trainer_scores(options: Options) -> dict[str, Any]:
    """Train the unsplit model with transformers' own Trainer."""
    import transformers

    transformers.set_seed(options.seed)
    model, tokenizer = load_model_and_tokenizer(options.model_name_or_path)
    train, validation = load_windows(options, tokenizer)
    assert train is not None
    assert validation is not None
    arguments = replace(
        options,
        output_dir=str(options.folder / "trainer"),
        gradient_accumulation_steps=options.gradient_accumulation_steps or 1,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=train)
    metrics = trainer.train().metrics
    scores = _score(options, validation, *trainer.predict(validation).predictions[:2])
    return scores | {"train_samples_per_second": metrics["train_samples_per_second"]}


def _score(
    options: Options, windows: QuestionAnsweringDataset, start: Any, end: Any
) -> dict[str, Any]:
    answers = select_answers(
        windows.examples,
        windows.windows,
        start,
        end,
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
    )
    best = {identifier: candidates[0].text for identifier, candidates in answers.items()}
    scores = score_predictions(windows.examples, best)
    return {"f1": scores.f1, "exact_match": scores.exact_match}


if __name__ == "__main__":
    run_command_line(compare, Options)
