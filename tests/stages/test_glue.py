"""What Python reads between the blocks is what it is in this step, not what it was at capture."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.machine import Device, Link, Machine
from tests.capture.toys import WIDTH, Toy, assert_same, toy
from tests.later import in_turn

STEPS, SAMPLES = 4, 4
GLOBAL = SimpleNamespace(weight=1.0, calls=0)
COUNT = 0


def machine_of(count: int) -> Machine:
    devices = [Device(f"d{i}", 10**9, {"float32": 1e9}, 1e9) for i in range(count)]
    return Machine("toy", tuple(devices), Link(1e9))


MACHINE = machine_of(2)


def inputs(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"x": torch.randn(SAMPLES, WIDTH, generator=draw)}


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    cut = SAMPLES // 2
    return [
        {n: v[first : first + cut] if isinstance(v, Tensor) else v for n, v in batch.items()}
        for first in (0, cut)
    ]


def trained(
    make: Callable[[], nn.Module],
    advance: Callable[[Any, int], None],
    step_of: Callable[[nn.Module], Callable[[dict[str, Any]], Any]],
) -> tuple[nn.Module, list[float]]:
    """Return the model and the losses of a few SGD steps."""
    global COUNT
    random.seed(1)
    np.random.seed(2)
    GLOBAL.weight, GLOBAL.calls, COUNT = 1.0, 0, 0
    model = make().train()
    advance(model, 0)
    step = step_of(model)
    losses = []
    for number in range(STEPS):
        advance(model, number)
        losses.append(step(inputs(number)))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
    return model, losses


def eager(model: nn.Module) -> Callable[[dict[str, Any]], float]:
    def step(batch: dict[str, Any]) -> float:
        losses = [model(**part)["loss"] for part in halves(batch)]
        for loss in losses:
            (loss / 2).backward()
        return sum(float(loss.detach()) for loss in losses) / 2

    return step


def pipelined(model: nn.Module) -> Callable[[dict[str, Any]], float]:
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    assert plan.num_stages == 2
    return ipp.compile(model, plan).forward_backward


def assert_alike(
    make: Callable[[], nn.Module], advance: Callable[[Any, int], None] = lambda *_: None
) -> nn.Module:
    """Losses, weights and what Python kept are those of plain torch; return the model."""
    expected, losses = trained(make, advance, eager)
    kept = [{n: v for n, v in vars(m).items() if plain(v)} for m in expected.modules()]
    counted = GLOBAL.calls, COUNT, random.random(), np.random.rand()
    found, ours = trained(make, advance, pipelined)
    assert ours == pytest.approx(losses, rel=1e-6)
    assert_same(dict(found.named_parameters()), dict(expected.named_parameters()))
    assert [{n: v for n, v in vars(m).items() if plain(v)} for m in found.modules()] == kept
    assert (GLOBAL.calls, COUNT, random.random(), np.random.rand()) == counted
    return found


def plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | list | type(None))


def reading(read: Callable[[Toy], Any], use: Callable[..., Tensor]) -> Callable[[], Toy]:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = use(self.layers[0](x), read(self))
        return {"loss": self.layers[1](h).square().mean()}

    def make() -> Toy:
        model = toy(body)
        model.weight, model.calls, model.config = 1.0, 0, SimpleNamespace(weight=1.0)
        model.table = torch.ones(WIDTH)
        return model

    return make


BOX = [1.0]


def advance(model: Any, step: int) -> None:
    model.weight = model.config.weight = GLOBAL.weight = BOX[0] = 1.0 + step / 2


def count(self: Toy) -> int:
    self.calls += 1
    return self.calls


def count_globally(self: Toy) -> int:
    global COUNT
    COUNT += 1
    GLOBAL.calls += 2
    return COUNT + GLOBAL.calls


READS = {
    "attribute": lambda self: self.weight,
    "config": lambda self: self.config.weight,
    "closure": (lambda box: lambda self: box[0])(BOX),
    "global": lambda self: GLOBAL.weight,
    "counter": count,
    "global counter": count_globally,
    "random": lambda self: random.random(),
    "numpy": lambda self: np.random.beta(0.4, 0.4),
    "numpy number": lambda self: np.float32(self.weight),
}
USES = {
    "factor": lambda h, value: h * value,
    "right": lambda h, value: 1.0 / (h.abs() + value),
    "tensor": lambda h, value: h + torch.tensor([value] * WIDTH),
    "argument": lambda h, value: functional.leaky_relu(h, value),
    "in place": lambda h, value: h.clone().mul_(value),
    "without gradients": lambda h, value: h + (h.detach() * value).clamp(max=value),
}


@pytest.mark.parametrize(("read", "use"), in_turn(READS, USES))
def test_numbers(read: str, use: str) -> None:
    assert_alike(reading(READS[read], USES[use]), advance)


def test_a_number_becomes_an_input_of_the_same_capture() -> None:
    model = reading(READS["attribute"], USES["factor"])().train()
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        for model.weight in (1.0, 2.0, 3.0):
            executable.forward_backward(inputs(0))
        (variants,) = executable._cache._shapes._values.values()
        (variant,) = variants.found
        assert variant.captured.glue.hosts == {"host_0": 1.0}
        assert executable._cache.captures == 0  # the plan's own was all that was needed


def switching(condition: Callable[[Toy], bool]) -> Callable[[], Toy]:
    return reading(condition, lambda h, yes: h.relu() if yes else h.tanh() * 2)


SWITCHES = {
    "attribute": lambda self: self.weight > 1.2,
    "random": lambda self: random.random() < 0.5,
    "counter": lambda self: count(self) % 3 == 0,
}


@pytest.mark.parametrize("read", SWITCHES)
def test_branches_are_captures_that_are_kept(read: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ipu_pipeline"):
        assert_alike(switching(SWITCHES[read]), advance)
    messages = [record.getMessage() for record in caplog.records]
    (said,) = [text for text in messages if text.startswith("captured again")]
    assert "captured again, as capture 1: the code of 'Toy' calls Tensor." in said
    assert "instead of Tensor." in said


def test_whole_numbers_that_are_sizes_are_captures() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        h = h + h[:, : 1 + count(self) % 3].mean(1, keepdim=True)
        return {"loss": self.layers[1](h).square().mean()}

    def make() -> Toy:
        model = toy(body)
        model.calls = 0
        return model

    assert_alike(make)


def test_whole_numbers_for_a_block_become_inputs_in_the_end() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, step: int = 1) -> Tensor:
            return self.linear(x) / step

    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers[1](self.layers[0](x, count(self))).square().mean()}

    def make() -> Toy:
        model = toy(body, Tempered)
        model.calls = 0
        return model

    assert_alike(make)


def test_a_tensor_that_is_another_one_is_another_capture() -> None:
    def replace(model: Any, step: int) -> None:
        if step % 2:
            model.table = torch.full((WIDTH,), 1.0 + step)
        else:
            model.table.add_(1)  # in place: no reason for one

    assert_alike(reading(lambda self: self.table, lambda h, table: h * table), replace)


def test_a_layer_that_is_another_one() -> None:
    def swap(model: Any, step: int) -> None:
        if step == 2:
            model.layers[0].linear = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
            nn.init.constant_(model.layers[0].linear.weight, 0.5)
            nn.init.constant_(model.layers[0].linear.bias, 0.5)

    assert_alike(toy_of_layers, swap)


def toy_of_layers() -> Toy:
    return toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).square().mean()})


def test_two_kinds_of_loss_by_turns() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        self.history.append(self.weight)
        h = self.layers[1](self.layers[0](x))
        if self.weight in (1.0, 2.0):
            return {"loss": h.abs().mean() * self.weight}
        return {"loss": functional.smooth_l1_loss(h, x, beta=self.weight)}

    def make() -> Toy:
        model = toy(body)
        model.history, model.weight, model.config = [], 1.0, SimpleNamespace()
        return model

    assert assert_alike(make, advance).history == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.5, 2.5]


def test_the_clock_is_read_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def later(model: Any, step: int) -> None:
        now[0] = 100.0 + step

    assert_alike(reading(lambda self: time.monotonic() - 99.0, USES["factor"]), later)


def test_outputs_that_a_switch_adds() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        out = {"loss": self.layers[1](h).square().mean()}
        return out | {"hidden": h} if self.all else out

    model = toy(body)
    model.all = False
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        for model.all in (False, True, False):
            outputs = executable.eval_step(inputs(0)).outputs
            assert list(outputs) == (["hidden"] if model.all else [])
        expected = model.eval()(**inputs(0))["loss"].detach()
        assert executable.eval_step(inputs(0)).loss == pytest.approx(float(expected))


def test_code_that_never_does_the_same_is_refused() -> None:
    model = toy_of_layers()
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    turn = iter(range(100)).__next__
    model.body = lambda self, x: {
        "loss": self.layers[1](self.layers[0](x.relu() if turn() % 2 else x.tanh())).mean()
    }
    with ipp.compile(model, plan, self_check=False) as executable, pytest.raises(
        CaptureError, match=r"'Toy' .* does something else in every run, .* keep what"
    ):  # fmt: skip
        executable.forward_backward(inputs(0))


def test_more_different_things_than_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    model = reading(lambda self: int(self.weight), lambda h, n: h.repeat(1, n)[:, :WIDTH])()
    model.train()
    plan = ipp.plan(model, halves(inputs(0))[0], machine=MACHINE, num_stages=2, microbatches=2)
    with ipp.compile(model, plan, self_check=False) as executable:
        executable._cache.max_shapes = 2
        for model.weight in (1, 2, 3, 4, 1):
            executable.forward_backward(inputs(0))
        (variants,) = executable._cache._shapes._values.values()
        assert len(variants.found) == 2
    said = [
        r.getMessage() for r in caplog.records if "more than 2 different things" in r.getMessage()
    ]
    assert len(said) == 1
    assert "calls Tensor.repeat with 3 instead of 2" in said[0]
