"""The self-check keeps no gradients of the model, and finds those of a capture that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ipu_pipeline.capture import capture, check
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.linear import adding_to_grad
from tests.capture.toys import WIDTH, Layer, Toy, batch, last, toy


class ThirdIsAnother(torch.autograd.Function):
    """The identity; its gradient is another one in its third call, of the second run."""

    calls = 0
    wrong = 2.0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        del ctx
        ThirdIsAnother.calls += 1
        return gradient * (ThirdIsAnother.wrong if ThirdIsAnother.calls == 3 else 1.0)


class Summed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return ThirdIsAnother.apply(self.linear(x))


def runs_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[check._Run]:
    """Capture ``model``; return the runs of the self-check."""
    found: list[check._Run] = []
    of = check._Run.of

    def noted(self: check._Run, *args: object, **kwargs: bool) -> check._Run:
        found.append(self)
        return of(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(check._Run, "of", noted)
    monkeypatch.setattr(ThirdIsAnother, "calls", 0)
    capture(model, batch())
    return found


def made(layer: type[nn.Module] = Layer) -> Toy:
    return toy(lambda self, x: last(self, self.layers[0](x)), layer)


def test_two_runs_and_no_gradient_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    first, second = runs_of(model, monkeypatch)
    assert first.outcome.keys() == second.outcome.keys() == {"loss"}
    assert first.hashes == second.unlike == {}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_bits_are_compared_in_one_more_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThirdIsAnother, "wrong", 1 + 1e-6)
    *_, second, third = runs_of(made(Summed), monkeypatch)
    assert second.unlike
    assert third.ours == {}


def test_another_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match=r"Toy differs .* data: gradient of layers\.\d\.linear"):
        runs_of(made(Summed), monkeypatch)


def test_hashes_tell_values_and_shapes_apart() -> None:
    values = torch.arange(float(WIDTH * 2)).reshape(2, WIDTH)
    others = [values.T, values + 1e-7, values.reshape(-1), values.to(torch.bfloat16)]
    hashes = {check._hash(one) for one in (values, *others)}
    assert len(hashes) == 5
    assert check._hash(values.T) == check._hash(values.T.contiguous())
    assert check._hash(torch.ones(())) == check._hash(torch.ones(()))


def test_parameters_are_left_without_hooks_so_that_gradients_are_added_in_the_product() -> None:
    """A parameter that once had a hook keeps an empty one, and every step then adds apart."""
    if not extension.state().usable:
        pytest.skip("without the kernels torch adds gradients")
    model = made()
    capture(model, batch())
    added: list[torch.Size] = []

    class Additions(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.add_.Tensor:
                added.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    weight = model.layers[0].linear.weight
    weight.grad = torch.zeros_like(weight)
    product = torch.ops.ipu_pipeline.linear(torch.ones(3, WIDTH), weight)
    with adding_to_grad(), Additions():
        product.sum().backward()
    assert not added
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
