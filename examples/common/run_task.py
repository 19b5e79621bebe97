"""One flow for every task of the table in ``examples/common/tasks/table.py``.

Read the data, choose the classes, load the model, encode, then plan, train and evaluate; the
trivial baseline is scored on the same batches as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ctrl_c  # noqa: F401 - from here on
from demo_model import load_model, load_tokenizer, source_of
from fine_tuning import Job, Scores, fine_tune, prepare
from plan_report import say
from script_options import CommonOptions, run_command_line
from script_run import read_ipu_config, split_of

from ipu_pipeline.capture.example_batch import pair_label
from ipu_pipeline.capture.from_config import load_config
from ipu_pipeline.train.data import build_collator, keyed_randomness
from tasks.evaluation import baseline_scores, evaluate_task
from tasks.features import Setup
from tasks.labels import choose_classes, label_config
from tasks.packing import packed
from tasks.samples import Rows, in_data, load_hub_rows, read_rows
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
    classes = find_classes(task, rows, options)
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


def read_splits(options: CommonOptions) -> dict[str, Rows]:
    """Return the samples of every split that is needed.

    Raises:
        DatasetError: The data cannot be read, or a split is missing.
    """
    hub: Mapping[str, Rows] = {}
    if options.dataset_name is not None:
        hub = load_hub_rows(options.dataset_name, options.dataset_config_name)
    rows: dict[str, Rows] = {}
    for split in options.splits:
        path, limit = options.source(split)
        found = read_rows(path) if path is not None else split_of(hub, split, options)
        rows[split] = found[:limit]
    return rows


def find_classes(task: Task, rows: Mapping[str, Rows], options: CommonOptions) -> tuple[str, ...]:
    """Return the classes of the data as the model numbers them; empty for tasks without any."""
    labels_of = task.labels_of
    if labels_of is None:
        return ()
    labels = {}
    for split, samples in rows.items():
        with in_data(name_of(split, options)):
            labels[split] = list(labels_of(samples, options))
    config = load_config(source_of(options.model_name_or_path))
    return choose_classes(labels, config.label2id)


def name_of(split: str, options: CommonOptions) -> str:
    """Return the file or data set of a split, for messages."""
    path, _ = options.source(split)
    return str(path) if path is not None else f"{options.dataset_name}[{split}]"


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
