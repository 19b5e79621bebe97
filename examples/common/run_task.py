"""One flow for every task of the table in ``examples/common/tasks/table.py``.

Read the data, choose the classes, load the model, encode, then plan, train and evaluate; the
trivial baseline is scored on the same batches as the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import ctrl_c  # noqa: F401 - from here on
from demo_model import load_model, load_tokenizer
from fine_tuning import Job, Scores, fine_tune, prepare
from plan_report import say
from script_data import find_classes, name_of, read_splits
from script_options import CommonOptions, run_command_line
from script_run import read_ipu_config

from ipu_pipeline.capture.example_batch import pair_label
from ipu_pipeline.train.data import build_collator, keyed_randomness
from tasks.evaluation import baseline_scores, evaluate_task
from tasks.features import Setup
from tasks.labels import label_config
from tasks.packed_model import packed
from tasks.samples import in_data
from tasks.table import TASKS, Task


def main(task_name: str) -> None:
    """Run the command line of a task; an error that the user can act on is one line."""
    task = TASKS[task_name]

    run_command_line(partial(run, task), options_of(task))


def options_of(task: Task) -> type[CommonOptions]:
    """Return the class of what a task's script can be told."""

    @dataclass(kw_only=True)
    class Options(CommonOptions, task.options):  # type: ignore[name-defined,misc]
        """Options of every script, and of the task."""

        file_format = "json, jsonl, csv or txt"

        def __post_init__(self) -> None:
            CommonOptions.__post_init__(self)
            task.options.__post_init__(self)

    return Options


def run(task: Task, options: CommonOptions) -> None:
    """Fine-tune and evaluate a model for ``task``."""
    prepare(options)
    rows = read_splits(options)
    name = options.model_name_or_path
    tokenizer = load_tokenizer(name, **task.tokenizer_options)
    classes = find_classes(task.labels_of, rows, options)
    model = load_model(name, task.auto_class, **label_config(classes))
    setup = Setup(tokenizer, options, classes, pair_label(model))
    data = {}
    for split, samples in rows.items():
        with in_data(name_of(split, options)):
            data[split] = task.encode(samples, setup)
    rows_of, collate_fn = dict[str, Any](data), task.collator(setup)
    if setup.options.pack:
        rows_of, collate_fn = packed(model, data, collate_fn, tokenizer, options)
    collate = build_collator(model, options, collate_fn)
    any_data = next(iter(rows_of.values()))

    def example(size: int) -> Any:
        with keyed_randomness(options.seed):
            return collate([any_data[i] for i in range(min(size, len(any_data)))])

    def evaluate(executable: Any) -> Scores:
        scores = evaluate_task(task, executable, rows_of["validation"], options, setup, collate_fn)
        if "train" in data:
            trivial = baseline_scores(
                task, model, data["train"], data["validation"], options, setup
            )
            scores |= {f"eval_baseline_{score}": value for score, value in trivial.items()}
        return scores

    say(", ".join(f"{len(samples)} sequences to {_USES[split]}" for split, samples in data.items()))
    job = Job(
        model,
        tokenizer,
        rows_of.get("train"),
        example=example,
        evaluate=evaluate,
        in_words=partial(in_words, task),
        collate_fn=collate_fn,
        ipu_config=read_ipu_config(options),
    )
    fine_tune(options, job)


_USES = {"train": "train on", "validation": "evaluate on"}


def in_words(task: Task, scores: Scores) -> str:
    """Return the task's main score as a line, beside that of the trivial baseline."""
    name = task.main_metric
    line = f"{name} {scores[f'eval_{name}']:.4g}"
    if f"eval_baseline_{name}" in scores:
        line += f" (trivial baseline {scores[f'eval_baseline_{name}']:.4g})"
    others = [
        key for key in scores if key.startswith("eval_") and f"eval_baseline_{key[5:]}" in scores
    ]
    rest = [f"{key[5:]} {scores[key]:.4g}" for key in others if key != f"eval_{name}"]
    return ", ".join([line, *rest]) + (
        f", on {scores['eval_samples']} sequences ({scores['eval_runtime']:.1f} s)"
    )
