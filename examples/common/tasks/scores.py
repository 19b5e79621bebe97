"""From a batch's outputs to what is kept of every sample, to scores; and trivial baselines.

Keeping logits would take gigabytes (tokens x vocabulary), so a batch is measured at once: what
stays is a few numbers per sample or token. A baseline gives outputs as a model does, and goes
through the same functions.

Axes: ``B`` samples, ``L`` tokens, ``K`` classes or choices, ``V`` vocabulary, ``M`` hidden tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ipu_pipeline.capture.example_batch import IGNORED_LABEL, PAIR_LABELS
from tasks.entities import score_entities
from tasks.features import EncodedDataset, Setup

Tensors = Mapping[str, Tensor]
Predict = Callable[[Tensors], Tensors]
Scores = dict[str, float]
# Each model names the logits of hidden tokens as it likes: alone, and beside those of a pair.
_TOKEN_LOGITS = ("prediction_logits", "logits")
_PAIR_LOGITS = ("seq_relationship_logits", "sop_logits")


# ---------------------------------------------------------------- classes


def measure_classes(outputs: Tensors, batch: Tensors) -> Tensors:
    """Return the most likely class of every sample, choice or token."""
    return {"predictions": outputs["logits"].argmax(dim=-1), "labels": batch["labels"]}


def class_scores(measured: Tensors, setup: Setup) -> Scores:
    """Return the accuracy, and F1 as the mean over the classes that occur."""
    predictions, labels = measured["predictions"], measured["labels"]
    f1 = [
        _f1(predictions == k, labels == k) for k in range(len(setup.labels)) if _occurs(k, labels)
    ]
    return {"accuracy": _mean(predictions == labels), "f1": sum(f1) / len(f1)}


def choice_scores(measured: Tensors, _: Setup) -> Scores:
    """Return the accuracy."""
    return {"accuracy": _mean(measured["predictions"] == measured["labels"])}


def entity_scores(measured: Tensors, setup: Setup) -> Scores:
    """Return precision, recall and F1 by entity, and the accuracy by word."""
    predicted, expected = [], []
    for guess, gold in zip(measured["predictions"], measured["labels"], strict=True):
        counted = gold != IGNORED_LABEL
        predicted.append([setup.labels[k] for k in guess[counted].tolist()])
        expected.append([setup.labels[k] for k in gold[counted].tolist()])
    scores = score_entities(predicted, expected)
    counted = measured["labels"] != IGNORED_LABEL
    right = measured["predictions"][counted] == measured["labels"][counted]
    return {
        "precision": scores.precision,
        "recall": scores.recall,
        "f1": scores.f1,
        "accuracy": _mean(right),
    }


def most_frequent_class(train: EncodedDataset, setup: Setup) -> Predict:
    """Always answer the class that is most frequent in the training data."""
    counts_K = _counts(torch.tensor(train.columns["labels"]), len(setup.labels))
    return lambda batch: {"logits": _repeated(counts_K, len(batch["labels"]))}


def most_frequent_choice(train: EncodedDataset, _: Setup) -> Predict:
    """Always answer the position at which the right choice is most often."""
    choices = len(train.columns["input_ids"][0])
    counts_K = _counts(torch.tensor(train.columns["labels"]), choices)
    return lambda batch: {"logits": _repeated(counts_K, len(batch["labels"]))}


def most_frequent_tag(train: EncodedDataset, setup: Setup) -> Predict:
    """Give every word the class that its first token most often has in the training data.

    A token that was never seen gets the class that is most frequent of all.
    """
    classes, vocabulary = len(setup.labels), len(setup.tokenizer)
    tokens, labels = _flat(train.columns["input_ids"]), _flat(train.columns["labels"])
    kept = labels != IGNORED_LABEL
    flat = tokens[kept] * classes + labels[kept]
    counts_VK = torch.bincount(flat, minlength=vocabulary * classes).view(vocabulary, classes)
    overall_K = counts_VK.sum(dim=0)
    table_VK = counts_VK + overall_K / (overall_K.sum() + 1)  # below 1: decides ties and unseen
    return lambda batch: {"logits": table_VK[batch["input_ids"]]}


# ---------------------------------------------------------------- hidden tokens


def measure_hidden(outputs: Tensors, batch: Tensors) -> Tensors:
    """Return how many tokens of every sample were hidden, guessed, and how surprising they were.

    ``surprise`` is the summed negative log-likelihood, in nats.
    """
    logits_BLV = next(outputs[name] for name in _TOKEN_LOGITS if name in outputs)
    labels_BL = batch["labels"]
    rows_M, columns_M = torch.nonzero(labels_BL != IGNORED_LABEL, as_tuple=True)
    chosen_MV = logits_BLV[rows_M, columns_M].float()
    wanted_M = labels_BL[rows_M, columns_M]
    surprise_M = cross_entropy(chosen_MV, wanted_M, reduction="none")
    right_M = (chosen_MV.argmax(dim=-1) == wanted_M).float()
    zeros_B = torch.zeros(len(labels_BL))
    return {
        "hidden": zeros_B.index_add(0, rows_M, torch.ones_like(right_M)),
        "guessed": zeros_B.index_add(0, rows_M, right_M),
        "surprise": zeros_B.index_add(0, rows_M, surprise_M),
    }


def hidden_scores(measured: Tensors, _: Setup) -> Scores:
    """Return perplexity (e to the mean surprise) and accuracy over all hidden tokens."""
    total = measured["hidden"].double().sum().item()
    surprise = measured["surprise"].double().sum().item() / total
    return {
        "perplexity": math.exp(min(surprise, 700.0)),  # e to the 710 is not a float any more
        "accuracy": measured["guessed"].double().sum().item() / total,
    }


def most_frequent_token(train: EncodedDataset, setup: Setup) -> Predict:
    """Guess every hidden token by how often tokens occur in the training data, plus one."""
    tokens, attended = _flat(train.columns["input_ids"]), _flat(train.columns["attention_mask"])
    special = torch.tensor(sorted(setup.tokenizer.all_special_ids))
    text = tokens[(attended == 1) & ~torch.isin(tokens, special)]
    counts_V = torch.bincount(text, minlength=len(setup.tokenizer)) + 1
    shares_V = (counts_V / counts_V.sum()).log()
    return lambda batch: {"logits": shares_V.expand(*batch["labels"].shape, len(shares_V))}


# ---------------------------------------------------------------- pairs of segments


def measure_pairs(outputs: Tensors, batch: Tensors) -> Tensors:
    """Measure hidden tokens, and whether the second segment follows the first."""
    logits_BK = next(outputs[name] for name in _PAIR_LOGITS if name in outputs)
    labels_B = next(batch[name] for name in PAIR_LABELS if name in batch)
    pairs = measure_classes({"logits": logits_BK}, {"labels": labels_B})
    return {**measure_hidden(outputs, batch), **pairs}


def pair_scores(measured: Tensors, setup: Setup) -> Scores:
    """Return the scores of hidden tokens, and the accuracy about pairs."""
    right = _mean(measured["predictions"] == measured["labels"])
    return {**hidden_scores(measured, setup), "pair_accuracy": right}


def most_frequent_pair(train: EncodedDataset, setup: Setup) -> Predict:
    """Guess tokens by their frequency, and pairs by the more frequent label."""
    assert setup.pair_label is not None  # the encoder refuses models without it
    tokens = most_frequent_token(train, setup)
    counts_K = _counts(torch.tensor(train.columns[setup.pair_label]), 2)
    return lambda batch: {
        "prediction_logits": tokens(batch)["logits"],
        "seq_relationship_logits": _repeated(counts_K, len(batch["labels"])),
    }


# ---------------------------------------------------------------- counting


def _counts(labels: Tensor, size: int) -> Tensor:
    return one_hot(labels, size).sum(dim=0)


def _repeated(values_K: Tensor, rows: int) -> Tensor:
    return values_K.expand(rows, len(values_K))


def _flat(column: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([value for row in column for value in row])


def _occurs(k: int, labels: Tensor) -> bool:
    return bool((labels == k).any())


def _f1(predicted: Tensor, true: Tensor) -> float:
    return 2 * (predicted & true).sum().item() / (predicted.sum() + true.sum()).item()


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
