"""Samples per second of training on packed rows and on padded ones: ``-m benchmarks.packing``.

The demo data of three tasks, one process with two stages on the local target. In every round each
way takes one step, in turn: rows of several samples (``--pack``), samples padded to
``max_seq_length`` (what the scripts do without it), and samples padded to the longest of the
data, which is known only afterwards. A step has as many rows for all, so that a packed one trains
on more samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ipu_pipeline as ipp

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "question-answering"), str(EXAMPLES / "common")]

import make_demo_data  # noqa: E402
import make_task_data  # noqa: E402
from demo_model import load_model, load_tokenizer  # noqa: E402
from transformers import default_data_collator  # noqa: E402

from tasks.features import Setup  # noqa: E402
from tasks.labels import choose_classes, label_config  # noqa: E402
from tasks.packed_model import packed  # noqa: E402
from tasks.question_answering import build_features, read_squad  # noqa: E402
from tasks.samples import read_rows  # noqa: E402
from tasks.table import TASKS  # noqa: E402

MICROBATCHES = 2
# The scripts' own lengths, and the name of the demo data.
LENGTHS = {"sequence-classification": (128, "classification"), "pretraining": (128, "pretraining"),
           "question-answering": (384, "")}  # fmt: skip
Step = Callable[[], int]


def material(task: str, folder: Path, samples: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return model, samples, their collator, tokenizer and options of a task."""
    tokenizer, (length, demo) = load_tokenizer("minilm"), LENGTHS[task]
    if not demo:
        make_demo_data.main(folder, 1, samples, 1)
        options = argparse.Namespace(max_seq_length=length)
        examples = read_squad(folder / "train.json")
        data: Any = build_features(examples, tokenizer, max_seq_length=length)
        return load_model("minilm", "AutoModelForQuestionAnswering"), data, default_data_collator, (
            tokenizer), options  # fmt: skip
    make_task_data.main(demo, folder, 1, samples, 1)
    rows = read_rows(next(folder.glob("train.*")))
    row = TASKS[task]
    options = row.options(max_seq_length=length)
    labels = {"train": [*row.labels_of(rows, options)]} if row.labels_of else {}
    classes = choose_classes(labels, {}) if labels else ()
    model = load_model("minilm", row.auto_class, **label_config(classes))
    setup = Setup(tokenizer, options, classes, "next_sentence_label")
    return model, row.encode(rows, setup), row.collator(setup), tokenizer, options


def cutting(data: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what leaves out the columns in which all samples of the data are padded."""
    longest = max(int(sum(data[n]["attention_mask"])) for n in range(len(data)))

    def cut(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        size = batch["input_ids"].shape
        return {n: v[:, :longest] if v.shape == size else v for n, v in batch.items()}

    return cut


def stepping(model: Any, data: Any, collate: Any, rows: int, form: Any = dict) -> Step:
    """Return what makes a training step on the next rows and returns how many samples it had."""
    batches = iter(range(10**9))

    def batch(turn: int) -> tuple[dict[str, Tensor], int]:
        chosen = [data[(turn * rows + n) % len(data)] for n in range(rows)]
        count = sum(len(one) for one in chosen) if isinstance(chosen[0], list) else rows
        return form(collate(chosen)), count

    first, _ = batch(0)
    part = {name: column[: rows // MICROBATCHES] for name, column in first.items()}
    plan = ipp.plan(model, part, num_stages=2, microbatches=MICROBATCHES)
    executable = ipp.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()))

    def step() -> int:
        inputs, count = batch(next(batches))
        executable.train_step(inputs)
        return count

    return step


def rates(task: str, rows: int, rounds: int, samples: int) -> dict[str, Any]:
    """Return the samples per second of every way."""
    with tempfile.TemporaryDirectory() as folder:
        model, data, collate, tokenizer, options = material(task, Path(folder), samples)
    fresh = copy.deepcopy(model)
    rows_of, of_rows = packed(fresh, {"t": data}, collate, tokenizer, options)
    order = torch.randperm(len(rows_of["t"]), generator=torch.Generator().manual_seed(0)).tolist()
    ways = {
        "packed": stepping(fresh, [rows_of["t"][n] for n in order], of_rows, rows),
        "padded": stepping(copy.deepcopy(model), data, collate, rows),
        "padded to the longest": stepping(copy.deepcopy(model), data, collate, rows, cutting(data)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, step in ways.items():
            begin_s = time.perf_counter()
            count = step()
            if turn:  # the first one warms up
                found[name].append(count / (time.perf_counter() - begin_s))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "samples_per_row": len(data) / len(rows_of["t"]),
        **{f"{name}, samples/s": value for name, value in medians.items()},
        "against padded": statistics.median(
            a / b for a, b in zip(found["packed"], found["padded"], strict=True)
        ),
        "against padded to the longest": statistics.median(
            a / b for a, b in zip(found["packed"], found["padded to the longest"], strict=True)
        ),
    }


def main() -> None:
    """Print the rates of every task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=[*LENGTHS], default=[*LENGTHS])
    parser.add_argument("--rows", type=int, default=8, help="Of a step, in two microbatches.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=400)
    given = parser.parse_args()
    for task in given.tasks:
        print(json.dumps({"task": task} | rates(task, given.rows, given.rounds, given.samples)))


if __name__ == "__main__":
    main()
