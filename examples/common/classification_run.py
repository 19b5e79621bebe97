"""Classes of pictures and of sounds: what both scripts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo_model import load_model, load_processor
from fine_tuning import prepare
from script_data import find_classes, media_data, name_of, read_splits
from trainer_run import TrainerJob, TrainerOptions, run_trainer
from transformers import Trainer, default_data_collator

from ipu_pipeline.train.arguments import option
from tasks.labels import class_name, label_config, number_of
from tasks.samples import Row, Rows, in_data, require


@dataclass(kw_only=True)
class ClassOptions(TrainerOptions):
    """Where the class is."""

    label_column_name: str = option(default="label", help="Column of the class.")


def classify(
    options: ClassOptions,
    auto_class: str,
    auto_processor: str,
    features: Callable[[Row, Path, Any], dict[str, Any]],
) -> Trainer:
    """Train and evaluate a classifier; the score is the accuracy.

    Args:
        options: The command line.
        auto_class: Name of transformers' auto class of the model.
        auto_processor: The same of what makes tensors.
        features: Makes the features of a row, but the label, of it, the folder of its file and
            what makes tensors.
    """
    prepare(options)
    rows = read_splits(options)
    classes = find_classes(_labels_of, rows, options)
    for split, samples in rows.items():
        with in_data(name_of(split, options)):  # now: features are made when they are needed
            for i, label in enumerate(_labels_of(samples, options)):
                number_of(label, classes, f"row {i}")
    name = options.model_name_or_path
    model = load_model(name, auto_class, **label_config(classes))
    processor = load_processor(name, auto_processor)

    def labelled(row: Row, folder: Path) -> dict[str, Any]:
        (label,) = _labels_of([row], options)
        return {**features(row, folder, processor), "labels": number_of(label, classes, "it")}

    data = media_data(options, rows, labelled)
    job = TrainerJob(
        model, processor, data, default_data_collator, accuracy, main_metric="accuracy"
    )
    return run_trainer(options, job)


def accuracy(found: Any) -> dict[str, float]:
    """Return the share of right predictions."""
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def _labels_of(rows: Rows, options: ClassOptions) -> Iterator[str]:
    for i, row in enumerate(rows):
        yield class_name(require(row, options.label_column_name, object, f"row {i}"), f"row {i}")
