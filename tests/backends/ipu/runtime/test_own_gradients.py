"""Functions with a backward pass of their own, where the device derives the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ipu_pipeline.backends.ipu.runtime.own_gradients import gradients_checked
from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from tests.backends.ipu.runtime.programs import Toy, batch, rehearsed


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return (x * x).mul_(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * ctx.factor * x * gradient, None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_gradient_that_is_the_derived_one_is_accepted() -> None:
    model = Toy(lambda m, x, **_: Squared.apply(x * m.weight, 3.0))
    rehearsed(model.train(), batch())
    own = torch.autograd.Function.__dict__["apply"]
    with gradients_checked():
        assert torch.autograd.Function.__dict__["apply"] is not own
    assert torch.autograd.Function.__dict__["apply"] is own


def test_another_gradient_is_refused_in_training_only() -> None:
    model = Toy(lambda m, x, **_: StraightThrough.apply(x * m.weight))
    with pytest.raises(StaticGraphError, match="StraightThrough computes a gradient of its own"):
        rehearsed(model.train(), batch())
    rehearsed(model.eval(), batch())


def test_a_function_of_whole_numbers_has_no_gradient() -> None:
    """Torch's own indexing of masks is one, applied under vmap."""

    class Next(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x + 1

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            """Keep nothing."""

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            """Have none."""

    with gradients_checked():
        assert torch.vmap(Next.apply)(torch.arange(2)).tolist() == [1, 2]


def test_trained_weights_without_gradients_are_refused_in_training_only() -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            y = x * m.weight
        return y + m.weight

    model = Toy(forward)
    with pytest.raises(StaticGraphError, match=r"from trained weights under torch.no_grad\(\)"):
        rehearsed(model.train(), batch())
    rehearsed(model.eval(), batch())
    model.weight.requires_grad_(False)
    rehearsed(model.train(), batch())


def test_places_found_without_gradients_are_accepted() -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            first = (x * m.weight).topk(2).indices
        return (x * m.weight).gather(-1, first)

    rehearsed(Toy(forward).train(), batch())
