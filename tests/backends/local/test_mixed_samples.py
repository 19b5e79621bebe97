"""Losses that mix samples: refused, computed once under gpipe, or side losses of microbatches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.errors import StageError
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.backends.local.test_batch_losses import (
    IGNORED,
    SAMPLES,
    WORDS,
    Model,
    check,
    counted_in_python,
    per_label,
    planned,
    sample_mean,
    summed,
    uneven_batch,
)
from tests.later import every_second


def median(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return logits.square().mean((1, 2)).median()


def deviation_beside_a_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return sample_mean(model, logits, labels) + 0.01 * logits.mean(1).std(0, correction=0).mean()


def dice(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    found, wanted = logits[..., 0].sigmoid(), (labels > 4).float()
    return 1 - (2 * (found * wanted).sum() + 1) / (found.sum() + wanted.sum() + 1)


def contrast(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    pooled = functional.normalize(logits.mean(1), dim=-1)
    return functional.cross_entropy(4 * pooled @ pooled.T, torch.arange(len(labels)))


def masked_contrast(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    pooled = functional.normalize(logits.mean(1), dim=-1)
    mask = (labels > 2).float().mean(1)
    each = functional.cross_entropy(
        4 * pooled @ pooled.T, torch.arange(len(labels)), reduction="none"
    )
    return (each * mask).sum() / mask.sum()


def ranks(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    scores = logits.mean((1, 2))
    return (scores.sort().values * torch.linspace(0, 1, len(scores))).mean()


def hardest(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return per_label(logits, labels).mean(1).topk(min(2, len(labels))).values.mean()


def correlation(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    found, wanted = logits.mean((1, 2)), labels.float().mean(1)
    found, wanted = found - found.mean(), wanted - wanted.mean()
    return 1 - (found * wanted).sum() / (found.norm() * wanted.norm())


def load_balance(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    chosen = functional.one_hot(logits.argmax(-1), WORDS).float().mean((0, 1))
    return sample_mean(model, logits, labels) + (logits.softmax(-1).mean((0, 1)) * chosen).sum()


def scaled_by_the_largest(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return sample_mean(model, logits / logits.abs().max(), labels)


def counted_from_ten(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) / max(10, int((labels != IGNORED).sum()))


MIXING = {
    median: "median", deviation_beside_a_mean: r"its term 'mean_\d' of two", dice: "sigmoid, sum",
    contrast: "cross_entropy", masked_contrast: "cross_entropy", ranks: "sort",
    hardest: "topk", correlation: "norm", load_balance: r"its term 'sum_\d' of two",
    scaled_by_the_largest: "cross_entropy", counted_from_ten: "div",
}  # fmt: skip


@pytest.mark.parametrize("loss", every_second(MIXING))
def test_a_loss_that_microbatches_do_not_give_is_refused_and_evaluated_whole(
    loss: Callable[..., Tensor],
):
    model, batch = Model(loss), uneven_batch()
    plan = planned(model, batch, 4)
    with ipp.compile(model, plan) as executable:
        with pytest.raises(MixedSamplesError, match="is not that of its microbatches") as caught:
            executable.forward_backward(batch)
        assert re.search(MIXING[loss], str(caught.value))
        expected = model.eval()(**batch)
        found = executable.eval_step(batch)
        assert found.loss == pytest.approx(expected["loss"].item(), rel=1e-6)
        assert torch.allclose(found.outputs["logits"], expected["logits"], atol=1e-6)
    model.train()
    with ipp.compile(model, plan, loss_weights="samples") as executable:  # the remedy
        parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in range(0, SAMPLES, 2)]
        mean = sum(model(**part)["loss"].item() for part in parts) / 4
        assert executable.forward_backward(batch) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("loss", [contrast, dice, load_balance, scaled_by_the_largest, hardest])
def test_a_loss_that_mixes_samples_is_computed_once_where_all_forward_passes_come_first(
    loss: Callable[..., Tensor],
):
    model, batch = Model(loss), uneven_batch()
    model.head.weight = model.embed.weight  # of a stage, and of the loss apart
    short = {name: value[:7] for name, value in batch.items()}
    with ipp.compile(model, planned(model, batch, 4, schedule="gpipe")) as executable:
        for part in (batch, batch, short):
            check(model, part, executable)


def test_what_mixes_samples_before_the_last_block_is_refused_with_gpipe_too():
    class Centred(Model):
        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            x = self.layers[0](self.embed(ids))
            logits = self.head(self.layers[1](x - x.mean(0)))
            return {"loss": self.loss(self, logits, labels), "logits": logits}

    model, batch = Centred(sample_mean), uneven_batch()
    with (
        ipp.compile(model, planned(model, batch, 4, schedule="gpipe")) as executable,
        pytest.raises(StageError, match=r"of 8 samples at .*computed once for all of them, either"),
    ):
        executable.forward_backward(batch)


def mean_without_nan(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return per_label(logits, labels).masked_fill(labels == IGNORED, float("nan")).nanmean()


def times_an_inverse(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) * (1 / int((labels != IGNORED).sum()))


@pytest.mark.parametrize("loss", [counted_in_python, mean_without_nan, times_an_inverse])
def test_as_many_labels_in_every_microbatch_hide_nothing(loss: Callable[..., Tensor]):
    model, even, uneven = Model(loss), uneven_batch(), uneven_batch()
    even["labels"] = even["ids"]
    with ipp.compile(model, planned(model, even, 4)) as executable:
        if loss is counted_in_python:
            check(model, even, executable)
            check(model, uneven, executable)
            return
        with pytest.raises(MixedSamplesError, match=r"not where one has fewer|of 8 samples at"):
            executable.forward_backward(even)


class Noisy(Model):
    """Draws in evaluation, too."""

    def forward(self, ids: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        logits = self.head(self.layers[0](self.embed(ids)))
        return {
            "loss": self.loss(self, logits + torch.randn_like(logits), labels),
            "logits": logits,
        }


def test_a_loss_that_cannot_be_compared_is_refused_unless_it_is_known_to_add_up():
    batch = uneven_batch()
    for loss, is_known in ((summed, True), (hardest, False)):
        model = Noisy(loss)
        with ipp.compile(model, planned(model, batch, 4)) as executable:
            if is_known:
                assert executable.forward_backward(batch) > 0
                continue
            with pytest.raises(MixedSamplesError, match="draws random numbers in evaluation, too"):
                executable.forward_backward(batch)


class Routed(Model):
    """Every layer leaves a choice among experts behind, which the loss wants to be even."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, choices = self.embed(ids), []
        for layer in self.layers:
            x = layer(x)
            choices.append(x.softmax(-1))
        chosen = torch.cat([choice.mean((0, 1)) for choice in choices])
        logits = self.head(x)
        loss = self.loss(self, logits, labels) + chosen.square().sum()
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_side_loss_that_mixes_samples_is_that_of_every_microbatch(
    schedule: str, caplog: pytest.LogCaptureFixture
):
    model, batch = Routed(sample_mean), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4, schedule=schedule)) as executable:
        parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in range(0, SAMPLES, 2)]
        mean = sum(model(**part)["loss"].item() for part in parts) / 4
        assert executable.forward_backward(batch) == pytest.approx(mean, rel=1e-6)
    assert "mixes samples, as load balancing does" in caplog.text
