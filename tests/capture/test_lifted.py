"""Functions under ``torch.vmap``: one call that takes what they read from around themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional

from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import Layer, assert_replays, assert_trains_in_stages, batch, last, toy

TABLE = torch.arange(4.0)


def mask_from_a_closure(self: Any, x: Tensor) -> dict[str, Tensor]:
    positive = x > 0

    def allowed(row: Tensor, column: Tensor) -> Tensor:
        return positive[row, column] & (row <= column)

    numbers = [torch.arange(size) for size in x.shape]
    with TransformGetItemToIndex():
        mask = torch.vmap(torch.vmap(allowed, in_dims=(None, 0)), in_dims=(0, None))(*numbers)
    return last(self, self.layers[0](x) * mask)


def closure_over_a_block(self: Any, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    return last(self, torch.vmap(lambda row: torch.cat([row * 2, h[0][1:2]])[: len(row)] + h[1])(x))


def closure_over_a_parameter(self: Any, x: Tensor) -> dict[str, Tensor]:
    def scaled(row: Tensor) -> Tensor:
        weight = torch.stack([self.layers[0].linear.weight, torch.ones(4, 4)])
        return functional.linear(row, weight.sum(0))

    return last(self, self.layers[0](x) + torch.vmap(scaled)(x))


def without_gradients(self: Any, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    with torch.no_grad():
        other = torch.vmap(lambda row: row * h.mean())(x)
    return last(self, h + other)


def keyword_argument(self: Any, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    return last(self, torch.vmap(lambda row, *, by: row * by["scale"])(h, by={"scale": h.mean(0)}))


BODIES = (
    mask_from_a_closure,
    closure_over_a_block,
    closure_over_a_parameter,
    without_gradients,
    keyword_argument,
)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_replayed(body: Any) -> None:
    model = toy(body)
    captured = capture(model, batch())
    assert_replays(model, captured, batch(seed=5))


@pytest.mark.parametrize("body", [mask_from_a_closure, closure_over_a_parameter])
def test_in_stages(body: Any) -> None:
    assert_trains_in_stages(toy(body), batch(seed=6))


def test_random_numbers_under_vmap_are_drawn_in_one_place() -> None:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        noisy = torch.vmap(lambda row: row + torch.rand_like(row), randomness="different")(x)
        return last(self, self.layers[0](noisy))

    captured = capture(toy(body), batch())
    targets = [str(n.target) for n in captured.programs[0].module.graph.nodes]
    assert any("vmap" in target for target in targets)


def test_tensor_of_a_closure_that_the_model_keeps() -> None:
    table = torch.arange(4.0)
    model = toy(lambda self, x: last(self, torch.vmap(lambda row: row * table)(self.layers[0](x))))
    assert_replays(model, capture(model, batch()), batch(seed=5))


def test_tensor_from_nowhere_in_a_closure() -> None:
    model = toy(lambda self, x: last(self, torch.vmap(lambda row: row * TABLE)(self.layers[0](x))))
    with pytest.raises(CaptureError, match=r"uses a \(4,\) torch.float32 tensor that is neither"):
        capture(model, batch())


def test_vmap_inside_a_block_is_the_blocks_own_business() -> None:
    class Mapped(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.linear)(x)

    model = toy(lambda self, x: last(self, self.layers[0](x)), Mapped)
    captured = capture(model, batch())
    assert_replays(model, captured, batch(seed=5))
    kinds: set[type[nn.Module]] = {type(m) for p in captured.programs for m in p.module.modules()}
    assert Mapped in kinds
