"""Values that a model's own code reads between its blocks, and tensors that it keeps there."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from tests.capture.toys import WIDTH, Layer, Toy, assert_same, toy
from tests.stages.test_glue import halves, inputs, machine_of

STEPS = 3
Body = Callable[..., dict[str, Tensor]]
LOG: list[str] = []


def rest(self: Toy, h: Tensor) -> dict[str, Tensor]:
    return {"loss": self.layers[1](h).square().mean(), "hidden": h}


def logs_a_part(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    part = 0.1 * h.abs().mean()
    self.kept.append(part.item())
    out = rest(self, h)
    out["loss"] = out["loss"] + part
    self.kept.append({"total": float(out["loss"].detach()), "size": h.shape[0]})
    return out


def keeps_detached_losses(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    self.kept.append(out["loss"].detach())
    self.recent.append((out["loss"].detach(), "loss"))
    return out


def scales_by_the_largest(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    h = h / float(h.detach().abs().max())
    return rest(self, h * math.sqrt(h.detach().norm()) + torch.full((WIDTH,), h.sum().item()))


def branches(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if h.mean() > 0:
        self.kept.append("above")
        h = h.relu() * 2
    else:
        self.calls += 1
        h = h.tanh()
    return rest(self, h)


def counts(self: Toy, x: Tensor) -> dict[str, Tensor]:
    chosen = int((x > 0).sum())
    found = int((self.layers[0](x) > 0).sum())
    self.calls += chosen + found
    h = self.layers[0](x) * chosen / (1 + found)
    return rest(self, h)


def asserts(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    assert torch.isfinite(h).all()
    assert not torch.equal(h, x)
    return rest(self, h)


def prints(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    LOG.append(f"{out['loss']:.4f}")
    LOG.append(repr(out["loss"].detach()))
    self.kept.append(out["loss"].tolist())
    return out


def keeps_a_hidden_state(self: Toy, x: Tensor) -> dict[str, Tensor]:
    self.last = self.layers[0](x)
    self.cache["given"] = x
    self.cache["both"] = [self.last.detach(), self.last.detach().mean()]
    return rest(self, self.last)


def uses_what_it_kept(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    if self.last is not None:
        h = h + 0.1 * self.last
    self.last = h.detach()
    return rest(self, h)


def goes_through_numpy(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    array = h.detach().numpy()
    self.kept.append(float(np.median(array)))
    mask = torch.from_numpy((array > np.median(array)).astype(np.float32))
    return rest(self, h * mask + torch.tensor(array.max(0)))


def every_third(self: Toy, x: Tensor) -> dict[str, Tensor]:
    out = rest(self, self.layers[0](x))
    self.calls += 1
    if self.calls % 3 == 0:
        self.kept.append(out["loss"].item())
    return out


def reads_out_of_order(self: Toy, x: Tensor) -> dict[str, Tensor]:
    a = self.layers[0](x)
    out = rest(self, a)
    self.kept.append(out["loss"].item())
    scale = a.abs().max().item()
    self.kept.append(scale)
    out["loss"] = out["loss"] * scale
    return out


def moves_a_position(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    place = int(self.place)
    self.queue[place] = h.detach().mean()
    self.place[0] = (place + 1) % WIDTH
    return rest(self, h * self.queue)


def switches_modes(self: Toy, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[0](x)
    self.layers[0].train(bool(h.mean() > 0))
    return rest(self, h)


PROGRAMS: dict[str, Body] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__annotations__", {}).get("x") == "Tensor"
}


def built(body: Body) -> Toy:
    LOG.clear()
    model = toy(body, Layer)
    model.kept, model.recent, model.cache = [], deque(maxlen=2), {}
    model.calls, model.last = 0, None
    model.register_buffer("queue", torch.ones(WIDTH))
    model.register_buffer("place", torch.zeros(1, dtype=torch.long))
    return model.train()


def observed(model: Toy) -> Any:
    """What a user can look at afterwards."""
    own = {name: getattr(model, name) for name in ("kept", "recent", "cache", "calls", "last")}
    return values(
        [own, LOG, [module.training for module in model.modules()], dict(model.named_buffers())]
    )


def values(found: Any) -> Any:
    if isinstance(found, Tensor):
        return (
            "tensor",
            found.requires_grad,
            [round(v, 5) for v in found.detach().flatten().tolist()],
        )
    if isinstance(found, dict):
        return {key: values(value) for key, value in found.items()}
    if isinstance(found, list | tuple | deque):
        return [type(found).__name__, *map(values, found)]
    return round(found, 5) if isinstance(found, float) else found


def update(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None


def eager(body: Body) -> tuple[Toy, list[float], Any]:
    model, losses = built(body), []
    for step in range(STEPS):
        total = 0.0
        for part in halves(inputs(step)):
            loss = model(**part)["loss"] / 2
            loss.backward()
            total += float(loss.detach())
        update(model)
        losses.append(total)
    return model, losses, observed(model)


def assert_as_eager(body: Body, stages: int = 2, **options: Any) -> Toy:
    expected, losses, seen = eager(body)
    model, found = built(body), []
    plan = ipp.plan(
        model, halves(inputs(0))[0], machine=machine_of(stages), num_stages=stages, microbatches=2
    )
    with ipp.compile(model, plan, **options) as executable:
        for step in range(STEPS):
            found.append(executable.forward_backward(inputs(step)))
            update(model)
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert observed(model) == seen
    return model


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_tensors(name: str) -> None:
    assert_as_eager(PROGRAMS[name])
