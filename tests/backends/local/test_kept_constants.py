"""Tensors that a model keeps in partial functions, closures and objects are constants of the graph.

What is put in their place, or into them, between two steps counts in the second one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from tests.capture.toys import WIDTH, Layer


class Criterion:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, weight=self.weight)


def in_a_partial(weight: Tensor) -> Callable[..., Tensor]:
    return partial(functional.cross_entropy, weight=weight, label_smoothing=0.1)


def in_a_closure(weight: Tensor) -> Callable[..., Tensor]:
    return lambda logits, labels: functional.cross_entropy(logits, labels, weight=weight)


def in_a_default(weight: Tensor) -> Callable[..., Tensor]:
    def loss(logits: Tensor, labels: Tensor, weight: Tensor = weight) -> Tensor:
        return functional.cross_entropy(logits, labels, weight=weight)

    return loss


def in_a_method(weight: Tensor) -> Callable[..., Tensor]:
    return Criterion(weight).__call__


class Model(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": self.loss(x, labels)}


@pytest.mark.parametrize("kept", [in_a_partial, in_a_closure, in_a_default, in_a_method, Criterion])
def test_a_weight_that_is_kept_outside_buffers(kept: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    weights = [torch.rand(WIDTH), torch.rand(WIDTH)]
    ours = Model(kept(weights[0]))
    plain = copy.deepcopy(ours)
    plain.loss = kept(weights[0])  # deepcopy copies the weight of some of these only
    batch = {"x": torch.randn(4, WIDTH), "labels": torch.tensor([1, 2, 3, 1])}
    example = {name: value[:2] for name, value in batch.items()}
    plan = ipp.plan(ours, example, num_stages=2, microbatches=2)

    def same(executable: Any) -> None:
        expected = plain(**batch)["loss"].item()
        assert executable.forward_backward(batch) == pytest.approx(expected, rel=1e-5)

    with ipp.compile(ours, plan) as executable:
        same(executable)
        weights[0].mul_(torch.tensor([3.0, 1.0] * (WIDTH // 2)))
        same(executable)
        ours.loss = plain.loss = kept(weights[1])
        same(executable)
