"""What the code between blocks sets elsewhere than in its modules: put back, seen, or refused."""

from __future__ import annotations

import contextvars
import threading
import types
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import Layer, Toy, batch, last, toy


class Shared:
    count = 0


class Holder:
    def __init__(self, inner: Any = None) -> None:
        self.count = 0
        self.inner = inner

    def step(self, by: int = 1) -> int:
        self.count += by
        return self.count


def function() -> None: ...


OBJECT, LEAF = Holder(), Holder()
DEEP = {"a": [Holder({"b": Holder(LEAF)})]}
SCALE = contextvars.ContextVar("scale", default=1.0)


def read_globals(self: Toy, x: Tensor) -> dict[str, Tensor]:
    Shared.count += 1
    OBJECT.count += 10
    function.count += 100  # type: ignore[attr-defined]
    DEEP["a"][0].inner["b"].inner.count += 1000
    total = Shared.count + OBJECT.count + function.count + LEAF.count  # type: ignore[attr-defined]
    return last(self, self.layers[0](x) * total / 1000)


class OwnCount(Toy):
    count = 0
    steps = partial(Holder().step, 2), Holder().step

    def forward(self, **inputs: Any) -> Any:
        type(self).count += 1
        total = self.count + sum(step() for step in self.steps)
        return last(self, self.layers[0](inputs["x"]) * total)


def reset() -> None:
    Shared.count = OBJECT.count = LEAF.count = OwnCount.count = 0
    function.count = 0  # type: ignore[attr-defined]
    OwnCount.steps = partial(Holder().step, 2), Holder().step


def in_stages(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    half = {name: value[:1] for name, value in inputs.items()}
    plan = ipp.plan(model, half, num_stages=2, microbatches=2)
    return ipp.compile(model, plan, **options)


def plain(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    parts = zip(*(value.split(1) for value in inputs.values()), strict=True)
    losses = [model(**dict(zip(inputs, part, strict=True)))["loss"].item() for part in parts]
    return sum(losses) / len(losses)


def check_two_steps(model: nn.Module, reset: Callable[[], None]) -> None:
    """Compare two batches in stages with plain torch, both from the state that ``reset`` gives."""
    reset()
    expected = [plain(model, batch(n)) for n in range(2)]
    reset()
    with in_stages(model, batch(0)) as executable:
        found = [executable.forward_backward(batch(n)) for n in range(2)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [lambda: toy(read_globals), lambda: OwnCount(read_globals)])
def test_counters_move_once_per_microbatch(make: Callable[[], Toy]) -> None:
    torch.manual_seed(0)
    model = make()
    check_two_steps(model, reset)


class Reading(Layer):
    read: Callable[[Any], float]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * type(self).read(self)


def set_class(model: Toy, value: float) -> None:
    Shared.count = value  # type: ignore[assignment]


def set_variable(model: Toy, value: float) -> None:
    SCALE.set(value)


def set_attribute(model: Toy, value: float) -> None:
    model.layers[0].box.value = model.layers[1].box.value = value


@pytest.mark.parametrize(
    ("put", "read", "message"),
    [
        (set_class, lambda self: Shared.count, "differs from the model on other data: loss"),
        (set_variable, lambda self: SCALE.get(), "differs from the model on other data: loss"),
        (set_attribute, lambda self: self.box.value, "block of Toy fails where .* 'value'"),
    ],
)
def test_blocks_that_read_what_their_model_sets_in_every_pass_are_refused(
    put: Callable[[Toy, float], None], read: Callable[[Any], float], message: str
) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        put(self, 1.0 + self.calls / 4)
        return last(self, self.layers[0](x))

    model = toy(body, type("Reading", (Reading,), {"read": staticmethod(read)}))
    model.calls = 0
    for layer in model.layers:
        layer.box = SimpleNamespace()
    with pytest.raises(CaptureError, match=f"{message}.*what it sets .*as an argument"):
        in_stages(model, batch(0))


class OfThread(threading.local):
    scale = 1.0


OF_THREAD = OfThread()
SETTINGS = types.ModuleType("settings_of_the_user")
vars(SETTINGS).update(of_thread=threading.local(), scale=1.0, count=0)


@pytest.mark.parametrize(
    ("put", "read"),
    [
        (SCALE.set, lambda self: SCALE.get()),
        (partial(setattr, OF_THREAD, "scale"), lambda self: OF_THREAD.scale),
        (partial(setattr, SETTINGS.of_thread, "scale"), lambda self: SETTINGS.of_thread.scale),
        (partial(setattr, SETTINGS, "scale"), lambda self: SETTINGS.scale),
    ],
)
def test_blocks_see_what_the_caller_has_set(
    put: Callable[[float], object], read: Callable[[Any], float]
) -> None:
    kind = type("Reading", (Reading,), {"read": staticmethod(read)})
    model = toy(lambda self, x: last(self, self.layers[0](x)), kind)
    put(1.0)
    with in_stages(model, batch(0)) as executable:
        for scale in (1.0, 2.0, 0.5):
            put(scale)
            expected = plain(model, batch(1))
            assert executable.forward_backward(batch(1)) == pytest.approx(expected, rel=1e-6)


def counted_while_stages_run(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    OF_THREAD.scale += 0.25
    SETTINGS.count += 1
    read = h.mean().item()
    return last(self, h * (OF_THREAD.scale + SETTINGS.count / 8 + read))


def test_code_between_blocks_that_reads_values_counts_for_its_caller() -> None:
    def reset() -> None:
        OF_THREAD.scale, SETTINGS.count = 1.0, 0  # type: ignore[attr-defined]

    model = toy(counted_while_stages_run)
    check_two_steps(model, reset)
    assert (OF_THREAD.scale, SETTINGS.count) == (2.0, 4)  # type: ignore[attr-defined]
