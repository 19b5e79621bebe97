r"""Fine-tune a Transformers model on a task of GLUE, split over pipeline stages.

    python examples/text-classification/run_glue.py --model_name_or_path minilm \
        --num_stages 2 --task_name sst2 --train_file out/demo_sst2/train.csv \
        --validation_file out/demo_sst2/validation.csv --do_train --do_eval --output_dir out/glue

Without files the task is read from the hub. Options are spelled as in transformers' own
run_glue.py; ``--help`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

import ctrl_c  # noqa: F401 - from here on
from script_data import read_splits
from script_options import run_command_line
from text_run import TextClassOptions, accuracy, classify_texts
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef
from transformers import Trainer

from ipu_pipeline.train.arguments import option

HUB = "nyu-mll/glue"
# Columns of every task, and the score that says most.
TASKS = {
    "cola": ("sentence", "matthews_correlation"),
    "mnli": ("premise,hypothesis", "accuracy"),
    "mrpc": ("sentence1,sentence2", "f1"),
    "qnli": ("question,sentence", "accuracy"),
    "qqp": ("question1,question2", "f1"),
    "rte": ("sentence1,sentence2", "accuracy"),
    "sst2": ("sentence", "accuracy"),
    "stsb": ("sentence1,sentence2", "spearmanr"),
    "wnli": ("sentence1,sentence2", "accuracy"),
}
POSITIVE = ("1", "equivalent", "duplicate", "acceptable")


@dataclass(kw_only=True)
class Options(TextClassOptions):
    """Everything that the script can be told."""

    task_name: str = option(help=f"One of {', '.join(TASKS)}.")

    def __post_init__(self) -> None:
        if self.task_name not in TASKS:
            raise ValueError(f"task_name {self.task_name!r} is none of {', '.join(TASKS)}")
        if self.dataset_name is None and self.train_file is None and self.validation_file is None:
            self.dataset_name, self.dataset_config_name = HUB, self.task_name
        if self.text_column_names is None:
            self.text_column_names = TASKS[self.task_name][0]
        super().__post_init__()


def run(options: Options) -> Trainer:
    """Train and evaluate a model on the task."""
    score = SCORES.get(TASKS[options.task_name][1], accuracy)
    return classify_texts(
        options,
        partial(read_splits, options),
        score,
        TASKS[options.task_name][1],
        numbers=options.task_name == "stsb",
    )


def f1(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Return the accuracy, and F1 of the class that is looked for."""
    positive = next(k for k, name in enumerate(classes) if name in POSITIVE)
    found = binary_f1_score((predicted == positive).int(), (labels == positive).int())
    return {**accuracy(predicted, labels), "f1": float(found)}


def matthews(predicted: Tensor, labels: Tensor, _: tuple[str, ...]) -> dict[str, float]:
    """Return Matthews' correlation of two classes."""
    return {"matthews_correlation": float(binary_matthews_corrcoef(predicted, labels))}


def correlations(predicted: Tensor, labels: Tensor, _: tuple[str, ...]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of numbers."""
    return {
        "pearson": float(pearson_corrcoef(predicted, labels)),
        "spearmanr": float(spearman_corrcoef(predicted, labels)),
    }


SCORES = {"f1": f1, "matthews_correlation": matthews, "spearmanr": correlations}

if __name__ == "__main__":
    run_command_line(run, Options)
