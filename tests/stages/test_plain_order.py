"""Blocks that draw numbers in Python, and user code that runs a forward pass twice: as plain torch.

What blocks share between microbatches keeps the order of plain torch, or is refused.
"""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.passes import RankPasses
from ipu_pipeline.errors import CaptureError, LoweringError, PlanError

WIDTH, SAMPLES, MICROBATCHES = 4, 8, 4
SHARED = np.random.default_rng(0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Skipped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else super().forward(x)


class Scaled(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.generator = SHARED

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.generator.random() + np.random.rand())


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Tensor) -> Tensor:
        ctx.count = count
        return x * (1 + count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.count.add_(0.1)
        return gradient, None


class CountsBackward(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Counting.apply(x, self.count))


class Checkpointed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


class Model(nn.Module):
    def __init__(self, layer: type[Layer], *, draws: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([layer() for _ in range(3)])
        self.draws = draws

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        scale = random.random() if self.draws else 1.0
        return {"loss": x.square().mean() * scale}


def planned(model: nn.Module, stages: int, **options: Any) -> Any:
    torch.manual_seed(1)
    batch = {"x": torch.randn(SAMPLES, WIDTH)}
    micro = {"x": batch["x"][: SAMPLES // MICROBATCHES]}
    return batch, ipp.plan(
        model.train(), micro, num_stages=stages, microbatches=MICROBATCHES, **options
    )


def seeded() -> None:
    random.seed(3)
    np.random.seed(3)
    SHARED.bit_generator.state = np.random.default_rng(5).bit_generator.state


@pytest.mark.parametrize(
    ("layer", "stages", "options", "recompute"),
    [
        (Skipped, 1, {}, None),
        (Skipped, 3, {}, None),
        (Skipped, 2, {"schedule": "gpipe"}, "all"),
        (Scaled, 3, {}, None),
        (Scaled, 2, {}, "all"),
        (CountsBackward, 1, {"schedule": "gpipe"}, None),
    ],
)
def test_blocks_keep_the_order_of_plain_torch(
    layer: type[Layer], stages: int, options: dict[str, Any], recompute: str | None
) -> None:
    model = Model(layer)
    batch, plan = planned(model, stages, **options)
    plain = copy.deepcopy(model)
    for module in plain.modules():  # a copy has a generator of its own
        if hasattr(module, "generator"):
            module.generator = SHARED
    seeded()
    expected = 0.0
    for part in batch["x"].split(SAMPLES // MICROBATCHES):
        loss = plain(part)["loss"] / MICROBATCHES
        loss.backward()
        expected += loss.item()
    after = random.random(), np.random.rand(), SHARED.random()
    seeded()
    with ipp.compile(model, plan, recompute=recompute) as executable:
        assert executable.forward_backward(batch) == pytest.approx(expected, rel=1e-6)
    assert (random.random(), np.random.rand(), SHARED.random()) == after
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_generator_of_blocks_and_glue_is_refused() -> None:
    message = "block 'layers.2' and the code between the blocks of Model draw from one generator"
    with pytest.raises(CaptureError, match=message):
        planned(Model(Skipped, draws=True), 2)


def test_a_generator_of_torch_that_nobody_draws_from_is_not_in_the_way() -> None:
    model = Model(Skipped)
    model.kept = torch.Generator().manual_seed(3)
    _, plan = planned(model, 2)
    assert plan.num_stages == 2


@pytest.mark.parametrize(("stages", "schedule"), [(2, "1f1b"), (1, "gpipe")])
def test_processes_refuse_an_order_of_their_own(stages: int, schedule: str) -> None:
    job = SimpleNamespace(
        _plan=SimpleNamespace(num_stages=stages, replicas=1, schedule=schedule),
        _options=SimpleNamespace(schedule=None),
        _model=Model(Skipped),
    )
    with pytest.raises(LoweringError, match="blocks of Model draw from generators of Python or nu"):
        RankPasses._refuse_other_order(job, MICROBATCHES)  # type: ignore[arg-type]
    job._plan = SimpleNamespace(num_stages=1, replicas=1, schedule="1f1b")
    RankPasses._refuse_other_order(job, MICROBATCHES)  # type: ignore[arg-type]


def test_a_reentrant_checkpoint_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"calls torch\.utils\.checkpoint with use_reentrant=T"):
        planned(Model(Checkpointed), 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_parts_in_torchscript_are_run_as_they_are() -> None:
    model = Model(Layer)
    model.layers[1] = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    batch, plan = planned(model, 2)
    with ipp.compile(model, plan) as executable:
        assert executable.forward_backward(batch) == pytest.approx(model(**batch)["loss"].item())


class Shuffled(Model):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in reversed(self.layers) if self.draws else self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def test_another_order_of_blocks_than_that_of_the_plan_is_refused() -> None:
    model = Shuffled(Layer)
    batch, plan = planned(model, 2)
    model.draws = True
    message = "needs what block 'layers.* computes: the code between the blocks of Shuffled calls"
    with ipp.compile(model, plan) as executable, pytest.raises(PlanError, match=message):
        executable.forward_backward(batch)


class Iterating(Model):
    def __init__(self) -> None:
        super().__init__(Layer)
        self.weights = iter([0.5, 1.0, 2.0] * 20)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x)["loss"] * next(self.weights)}


def test_an_iterator_that_cannot_be_put_back_is_named() -> None:
    with pytest.raises(CaptureError, match=r"it keeps an iterator \(weights\), which cannot be"):
        planned(Iterating(), 2)


class Penalised(Model):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        start = x.detach().requires_grad_()
        loss = super().forward(start)["loss"]
        (gradient,) = torch.autograd.grad(loss, start, create_graph=True)
        return {"loss": loss + gradient.square().mean()}


def test_a_gradient_through_blocks_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"takes a gradient \(torch\.autograd\.grad in block "):
        planned(Penalised(Layer), 2)
