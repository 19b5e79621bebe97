"""Functions whose results functools keeps, called between blocks and inside them."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import ipu_pipeline as ipp
from tests.capture.toys import Layer, Toy, batch, last, toy

CALLS: list[int] = []
PASSES = 0


@lru_cache(maxsize=4)
def table(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32).cos()


@cache
def weights(size: int) -> list[float]:
    CALLS.append(size)
    return [1 / (n + 1) for n in range(size)]


@cache
def noise(size: int) -> Tensor:
    return torch.randn(size)


class OfClass(Toy):
    @cache  # noqa: B019 - users do
    def own(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32).sin()

    @staticmethod
    @cache
    def shared(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.float32) / 8

    def forward(self, **inputs: Any) -> Any:
        size = inputs["x"].shape[-1]
        return last(self, self.layers[0](inputs["x"] + self.own(size) + self.shared(size)))


class Inside(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + table(x.shape[-1]))


def with_table(self: Toy, x: Tensor) -> dict[str, Tensor]:
    global PASSES
    PASSES += 1
    return last(self, self.layers[0](x + table(x.shape[-1])))


def with_plain_values(self: Toy, x: Tensor) -> dict[str, Tensor]:
    return last(self, self.layers[0](x * torch.tensor(weights(x.shape[-1]))))


def with_noise(self: Toy, x: Tensor) -> dict[str, Tensor]:
    return last(self, self.layers[0](x + noise(x.shape[-1])))


def without(self: Toy, x: Tensor) -> dict[str, Tensor]:
    return last(self, self.layers[0](x))


def forget() -> None:
    for function in (table, weights, noise, OfClass.own, OfClass.shared):
        function.cache_clear()
    CALLS.clear()


def losses(model: Toy, run: Any) -> list[float]:
    torch.manual_seed(3)
    return [float(run(batch(n))) for n in range(3)]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: toy(with_table),
        lambda: toy(with_plain_values),
        lambda: OfClass(without),
        lambda: toy(without, Inside),
    ],
)
def test_cached_results_are_those_of_plain_torch(make: Any, warm: bool) -> None:
    torch.manual_seed(0)
    model = make()
    forget()
    torch.manual_seed(3)
    expected = losses(model, lambda given: model(**given)["loss"].detach())
    expected_calls = list(CALLS)
    if not warm:
        forget()
    passes = PASSES
    plan = ipp.plan(model, batch(0), num_stages=2, microbatches=1)
    with ipp.compile(model, plan) as executable:
        found = losses(model, executable.forward_backward)
    assert found == pytest.approx(expected, rel=1e-6)
    assert PASSES - passes in (0, 3)
    again = expected_calls if warm else []  # the self-check has let functools keep it
    assert again == CALLS
    assert torch.equal(table(4), torch.arange(4.0).cos())  # no stand-in is left there


def test_a_cached_draw_between_blocks_is_refused() -> None:
    forget()
    with pytest.raises(
        ipp.errors.CaptureError, match=r"differs from the model|neither a parameter"
    ):
        ipp.plan(toy(with_noise), batch(0), num_stages=2, microbatches=1)
