"""What the loss of a batch is divided by: a count of the batch, whatever is computed from it."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.backends.local.test_batch_losses import (
    IGNORED,
    Model,
    check,
    own_mask,
    per_label,
    per_label_sum,
    planned,
    token_mean,
    truth,
    uneven_batch,
)
from tests.later import every_second


def at_least_one(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    counted = (labels != IGNORED).sum()
    return per_label_sum(logits, labels) / torch.maximum(counted, torch.tensor(1))


def one_where_none(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    counted = (labels != IGNORED).sum()
    return per_label_sum(logits, labels) / torch.where(counted > 0, counted, 1)


def square_root(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return per_label_sum(logits, labels) / (labels != IGNORED).sum().clamp(min=1).sqrt()


def bounded_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != IGNORED).float()
    return (per_label(logits, labels) * mask).mean() / mask.mean().clamp(min=0.4)


@pytest.mark.parametrize("loss", [at_least_one, one_where_none, square_root, bounded_mean])
def test_a_divisor_is_computed_from_the_count_of_the_batch(loss: Callable[..., Tensor]):
    """Also of batches with fewer labels than the first: one in a microbatch, or none."""
    model, batch = Model(loss), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        for rows in (slice(0, 0), slice(0, 2), slice(2, 7)):
            labels = batch["labels"].clone()
            labels[rows] = IGNORED
            check(model, {**batch, "labels": labels}, executable)


@pytest.mark.parametrize("labelled", [(1, 1), (1, 0)])
def test_a_first_batch_with_few_labels_tells_a_mean_from_a_sum(labelled: tuple[int, ...]):
    model, batch = Model(own_mask), uneven_batch()
    batch["labels"][:2] = IGNORED
    for row, number in enumerate(labelled):
        batch["labels"][row, :number] = batch["ids"][row, :number]
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


def test_a_count_that_python_may_have_raised_is_compared_every_time():
    def loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        return per_label_sum(logits, labels) / max(1, int((labels != IGNORED).sum()))

    def two_terms(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        return loss(model, logits, labels) + logits.square().mean()

    batch = uneven_batch()
    none = batch["labels"].clone()
    none[:2] = IGNORED
    for function, message in (
        (loss, "as the weighted sum"),
        (two_terms, "may have raised it to 1"),
    ):
        model = Model(function)
        with ipp.compile(model, planned(model, batch, 4)) as executable:
            check(model, batch, executable)
            with pytest.raises(MixedSamplesError, match=message):
                executable.forward_backward({**batch, "labels": none})


def test_what_divides_some_microbatches_only_is_refused():
    def loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        counted = (labels != IGNORED).sum().float()
        return per_label_sum(logits, labels) / max(counted, torch.tensor(1.0))

    model, batch = Model(loss), uneven_batch()
    none = batch["labels"].clone()
    none[:2] = IGNORED
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)
        with pytest.raises(MixedSamplesError, match="is known for some microbatches only"):
            executable.forward_backward({**batch, "labels": none})


def count(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def few(labels: Tensor) -> Tensor:
    return (labels > 4).sum()


def divided(by: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    return lambda model, logits, labels: per_label_sum(logits, labels) / by(labels)


# What Python or torch makes of counts: exact, or refused for one or another batch.
DIVISORS: dict[str, Callable[[Tensor], Any]] = {
    "one less": lambda labels: count(labels) - 1,
    "at least five": lambda labels: count(labels).clamp(min=5),
    "at least five, by Python": lambda labels: max(int(count(labels)), 5),
    "at most twelve, by Python": lambda labels: min(int(count(labels)), 12),
    "of other labels": few,
    "the largest label": lambda labels: (labels == labels.max()).sum(),
    "a quotient of counts": lambda labels: ((labels != IGNORED) / count(labels).clamp(min=1)).sum(),
    "two sums in a stack": lambda labels: torch.stack([count(labels), few(labels)]).sum() + 1,
    "two counts": lambda labels: count(labels).clamp(min=1) * few(labels).clamp(min=1),
    "columns with labels": lambda labels: (labels != IGNORED).any(0).sum().clamp(min=1),
}
REWEIGHTED: dict[str, Callable[..., Tensor]] = {
    "divided twice": lambda model, logits, labels: (
        per_label_sum(logits, labels) / count(labels).clamp(min=1) / few(labels).clamp(min=1)
    ),
    "times a number": lambda model, logits, labels: (
        token_mean(model, logits, labels) * count(labels).sqrt()
    ),
    "weights with a sum of 1": lambda model, logits, labels: (
        per_label(logits, labels) * ((labels != IGNORED) / count(labels).clamp(min=1))
    ).sum(),
    "two terms": lambda model, logits, labels: (
        token_mean(model, logits, labels)
        + (logits.square().mean(-1) * (labels > 4)).sum() / max(int(few(labels)), 3)
    ),
}
EXACT = {"at least five", "two sums in a stack"}


@pytest.mark.parametrize("name", every_second([*DIVISORS, *REWEIGHTED]))
def test_no_batch_is_weighed_as_another_one_was(name: str):
    """Whatever batches came before: plain torch's loss and gradients, or an error."""
    by = DIVISORS.get(name)
    model, first = Model(REWEIGHTED[name] if by is None else divided(by)), uneven_batch()
    full = first["ids"].clone()
    one_each, one_only = (torch.full_like(full, IGNORED) for _ in range(2))
    one_each[::2, 0] = full[::2, 0]
    one_only[0, 0] = 5
    mixed = full.clone()
    mixed[:2], mixed[3, 1:] = IGNORED, IGNORED
    refused = 0
    with ipp.compile(model, planned(model, first, 4)) as executable:
        for labels in (one_each, first["labels"], mixed, one_only, full):
            batch = {**first, "labels": labels}
            if not isfinite(truth(model, batch)[0]):
                continue
            try:
                check(model, batch, executable)
            except MixedSamplesError:
                refused += 1
    assert (refused == 0) == (name in EXACT)
