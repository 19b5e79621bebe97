"""Losses of models whose microbatches run one after another: weights are what the loss means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.backends.local.test_batch_losses import (
    IGNORED,
    SAMPLES,
    Model,
    check,
    counted_in_python,
    own_mask,
    planned,
    sum_over_samples,
    summed,
    token_mean,
    uneven_batch,
)
from tests.backends.local.test_mixed_samples import dice
from tests.later import in_turn


def squares(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return logits.flatten() @ logits.flatten()


def by_samples(part: dict[str, Tensor]) -> float:
    return len(part["ids"]) / SAMPLES


def by_labels(part: dict[str, Tensor]) -> float:
    counted = (uneven_batch()["labels"] != IGNORED).sum()
    return float((part["labels"] != IGNORED).sum() / counted)


def once(part: dict[str, Tensor]) -> float:
    return 1.0


# What a microbatch counts in the loss of its batch.
COUNTS: dict[Callable[..., Tensor], Callable[[dict[str, Tensor]], float]] = {
    summed: once,
    squares: once,
    token_mean: by_labels,
    own_mask: by_labels,
    sum_over_samples: by_samples,
    dice: by_samples,
}


class Centred(Model):
    """Subtracts a running mean that it replaces: what a sample gives depends on the others."""

    def __init__(self, loss: Callable[..., Tensor], *, beside: float) -> None:
        super().__init__(loss)
        self.register_buffer("center", torch.zeros(8))
        self.beside = beside
        self.seen: list[float] = []

    def forward(self, ids: Tensor, labels: Tensor, shares: Any = (1.0, 1.0)) -> dict[str, Tensor]:
        x, side = self.embed(ids), torch.zeros(())
        for layer in self.layers:
            x = layer(x)
            side = side + x.square().mean()
        self.center = 0.5 * self.center + 0.5 * x.detach().mean((0, 1))
        logits = self.head(x - self.center)
        loss = shares[0] * self.loss(self, logits, labels)
        loss = loss + self.beside * shares[1] * side if self.beside else loss
        self.seen.append(loss.item())
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(("loss", "beside"), in_turn(COUNTS, [0.0, 0.3]))
def test_terms_weigh_what_they_mean(
    loss: Callable[..., Tensor], beside: float, caplog: pytest.LogCaptureFixture
):
    model, batch = Centred(loss, beside=beside), uneven_batch()
    total = 0.0
    for start in range(0, SAMPLES, 2):
        part = {name: value[start : start + 2] for name, value in batch.items()}
        share = model(**part, shares=(COUNTS[loss](part), by_samples(part)))["loss"]
        share.backward()
        total += share.item()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    center = model.center.clone()
    model = Centred(loss, beside=beside)
    with (
        caplog.at_level(logging.WARNING),
        ipp.compile(model, planned(model, batch, 4)) as executable,
    ):
        assert executable.forward_backward(batch) == pytest.approx(total, rel=1e-5)
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(model.center, center)
    assert "the side loss" not in caplog.text  # which is what plain torch gives for microbatches


class Logged(Model):
    """Reads its loss in Python."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = super().forward(ids, labels)
        self.seen = found["loss"].item()
        return found


def test_what_python_counts_is_known_before_values_are_read():
    model, batch = Logged(counted_in_python), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


def divided_late(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) / max(1.0, logits.norm().item())


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_term_of_which_nothing_tells_whether_it_is_a_sum_is_refused(schedule: str):
    model, batch = Model(divided_late), uneven_batch()
    with (
        ipp.compile(model, planned(model, batch, 4, schedule=schedule)) as executable,
        pytest.raises(MixedSamplesError, match="nothing tells whether it is a sum") as caught,
    ):
        executable.forward_backward(batch)
    assert "its term 'cross_entropy'" in str(caught.value)
    assert "loss_weights" in str(caught.value)


def test_what_is_counted_while_values_are_kept_is_refused():
    model, batch = Centred(counted_in_python, beside=0.0), uneven_batch()
    with (
        ipp.compile(model, planned(model, batch, 4)) as executable,
        pytest.raises(MixedSamplesError, match="Python counts what it is divided by"),
    ):
        executable.forward_backward(batch)
