"""Functions with a backward pass of their own, where the device derives the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ipu_pipeline.backends.ipu.runtime.own_gradients import gradients_checked
from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from tests.backends.ipu.runtime.programs import Toy, batch, rehearsed, run


class _Device(TorchFunctionMode):
    """Derives gradients under ``torch.no_grad()``, too, as poptorch; counts what stops them."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # otherwise the end of the block would undo it
            return func(*args)
        self.stops += func is Tensor.detach and args[0].requires_grad
        with torch.enable_grad():
            return func(*args, **(kwargs or {}))


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


def test_what_is_computed_without_gradients_is_detached(poptorch: Any) -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        turned = x * m.weight
        with torch.no_grad():
            y = (x * m.weight).exp() + m.weight
            turned = turned.T
            z = torch.zeros(2, 4)
            z += m.weight
            later = x * 2
        later[0] += m.weight
        with torch.no_grad():
            y = y + later
        return {"loss": (y * m.weight + z + y + turned.T).sum()}

    model, inputs = Toy(forward).train(), batch()
    program = rehearsed(model, inputs)
    with _Device() as device:
        found = run(program, model, inputs)["loss"]
    assert device.stops > 0
    ours, theirs = (
        torch.autograd.grad(loss, model.weight) for loss in (found, model(**inputs)["loss"])
    )
    torch.testing.assert_close(ours, theirs)


def test_a_function_of_its_own_keeps_its_gradient() -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        return {"loss": Squared.apply(x * m.weight, 2.0).sum()}

    model = Toy(forward).train()
    program = rehearsed(model, batch())
    with _Device() as device:
        run(program, model, batch())
    assert device.stops == 0


def test_a_change_in_place_without_gradients_is_refused_in_training_only() -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        y = x * m.weight
        with torch.no_grad():
            y.mul_(2)
        return y

    model = Toy(forward)
    with pytest.raises(StaticGraphError, match=r"in place under torch.no_grad\(\)"):
        rehearsed(model.train(), batch())
    rehearsed(model.eval(), batch())


def test_places_found_without_gradients_are_accepted() -> None:
    def forward(m: Any, x: Tensor, **_: Any) -> Tensor:
        with torch.no_grad():
            first = (x * m.weight).topk(2).indices
        return (x * m.weight).gather(-1, first)

    rehearsed(Toy(forward).train(), batch())
