"""Classes of texts over transformers' trainer: what the scripts for GLUE and XNLI share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from demo_model import load_model, load_tokenizer
from fine_tuning import prepare
from script_data import find_classes, name_of
from torch import Tensor
from trainer_run import TrainerJob, TrainerOptions, run_trainer
from transformers import DataCollatorWithPadding, Trainer

from ipu_pipeline.train.arguments import option
from tasks import sequence_classification
from tasks.features import EncodedDataset, Setup
from tasks.labels import label_config
from tasks.samples import Rows, in_data

# Predictions and labels of all samples, and the classes, to scores.
Score = Callable[[Tensor, Tensor, tuple[str, ...]], dict[str, float]]


@dataclass(kw_only=True)
class TokenizerOptions:
    """Where the tokenizer is."""

    tokenizer_name: str | None = option(
        default=None, help="Hub name or folder of the tokenizer; default: the model's."
    )


@dataclass(kw_only=True)
class TextClassOptions(
    TrainerOptions, TokenizerOptions, sequence_classification.SequenceClassificationOptions
):
    """What a script for classes of texts can be told."""

    def __post_init__(self) -> None:
        TrainerOptions.__post_init__(self)
        sequence_classification.SequenceClassificationOptions.__post_init__(self)


def classify_texts(
    options: TextClassOptions,
    read: Callable[[], Mapping[str, Rows]],
    score: Score,
    main_metric: str,
    *,
    numbers: bool = False,
) -> Trainer:
    """Train and evaluate a classifier of texts or pairs of texts.

    Args:
        options: The command line.
        read: Returns the samples of every split.
        score: Compares the classes, or numbers, of all samples with the labels.
        main_metric: The score that says most.
        numbers: Whether numbers are predicted in place of classes.
    """
    prepare(options)
    rows = read()
    labels_of = None if numbers else sequence_classification.labels_of
    classes = find_classes(labels_of, rows, options)
    name = options.model_name_or_path
    tokenizer = load_tokenizer(options.tokenizer_name or name)
    config = {"num_labels": 1} if numbers else label_config(classes)
    model = load_model(name, "AutoModelForSequenceClassification", **config)
    encode = sequence_classification.encode_numbers if numbers else sequence_classification.encode
    setup = Setup(tokenizer, options, classes)
    data: dict[str, EncodedDataset] = {}
    for split, samples in rows.items():
        with in_data(name_of(split, options)):
            data[split] = encode(samples, setup)

    def compute_metrics(found: Any) -> dict[str, float]:
        logits = torch.from_numpy(found.predictions)
        predicted = logits.squeeze(-1) if numbers else logits.argmax(-1)
        return score(predicted, torch.from_numpy(found.label_ids), classes)

    collate = DataCollatorWithPadding(tokenizer)
    job = TrainerJob(model, tokenizer, data, collate, compute_metrics, main_metric=main_metric)
    return run_trainer(options, job)


def accuracy(predicted: Tensor, labels: Tensor, _: tuple[str, ...] = ()) -> dict[str, float]:
    """Return the share of right classes."""
    return {"accuracy": float((predicted == labels).float().mean())}
