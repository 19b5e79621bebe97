"""Small models that keep something from batch to batch, one way each, and plain training."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp

WIDTH, CLASSES, SAMPLES, MICROBATCHES = 6, 3, 8, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("kept", torch.ones(WIDTH))
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Four layers, a head and a loss; subclasses do one thing more."""

    layer: type[nn.Module] = Layer

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([self.layer() for _ in range(4)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("kept", torch.ones(WIDTH))
        self.attribute = torch.zeros(WIDTH)

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, h: Tensor) -> Tensor:
        return h

    def end(self, logits: Tensor, loss: Tensor) -> Tensor:
        return loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.after(x))
        return {"loss": self.end(logits, functional.cross_entropy(logits, labels))}


PROGRAMS: dict[str, type[Net]] = {}


def program(found: type[Net]) -> type[Net]:
    PROGRAMS[found.__name__] = found
    return found


def layers(forward: Callable[[Any, Tensor], Tensor], name: str) -> None:
    layer = type(f"{name}Layer", (Layer,), {"forward": forward})
    PROGRAMS[name] = type(name, (Net,), {"layer": layer})


@torch.no_grad()
def average(kept: Tensor, value: Tensor) -> None:
    kept.mul_(0.9).add_(value, alpha=0.1)


def _scaled(self: Any, x: Tensor) -> Tensor:
    """Written, then read by an operation that saves it for the backward pass."""
    y = self.linear(x)
    average(self.kept, y.abs().mean(0))
    return x + torch.tanh(y) / self.kept


def _replacing(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    self.calls += 1
    self.seen.append(1)
    self.kept = self.kept * 0.9 + 0.1 * y.detach().abs().mean(0)
    return x + torch.tanh(y) / self.kept / self.calls * len(self.seen)


def _renewing(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    self.kept = self.kept * 0.9 + 0.1 * y.detach().abs().mean(0)
    return x + torch.tanh(y) / self.kept


def _seldom(self: Any, x: Tensor) -> Tensor:
    """Nothing is written while the model is captured."""
    y = torch.tanh(self.linear(x))
    self.calls += 1
    if self.calls % 3 == 0:
        average(self.kept, y.mean(0))
    return x + y / self.kept.clone()


def _clipped(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.linear.weight.clamp_(-0.2, 0.2)
    return x + torch.tanh(self.linear(x))


def _counting(self: Any, x: Tensor) -> Tensor:
    """In a tensor that is no buffer, and in an object."""
    self.counted += 1
    self.counter.calls += 1
    return x + torch.tanh(self.linear(x)) / self.counted.clone() * self.counter.calls


class Counting(Layer):
    forward = _counting

    def __init__(self) -> None:
        super().__init__()
        self.counted = torch.zeros(())
        self.counter = SimpleNamespace(calls=0)


PROGRAMS["Counting"] = type("Counting", (Net,), {"layer": Counting})
layers(_scaled, "Scaled")
layers(_replacing, "Replacing")
layers(_renewing, "Renewing")
layers(_seldom, "Seldom")
layers(_clipped, "Clipped")


class Normalised(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.linear(x)))


class Spectral(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


PROGRAMS["BatchNorm"] = type("BatchNorm", (Net,), {"layer": Normalised})
PROGRAMS["SpectralNorm"] = type("SpectralNorm", (Net,), {"layer": Spectral})


@program
class FirstReadsLastWrites(Net):
    def before(self, x: Tensor) -> Tensor:
        return x - self.kept

    def end(self, logits: Tensor, loss: Tensor) -> Tensor:
        average(self.kept, logits.mean())
        return loss


@program
class LossByItsMean(Net):
    def end(self, logits: Tensor, loss: Tensor) -> Tensor:
        average(self.kept, loss.detach())
        return loss / self.kept.mean()


@program
class GlueReplaces(Net):
    def after(self, h: Tensor) -> Tensor:
        h = h - self.kept - self.attribute
        self.kept = self.kept * 0.9 + 0.1 * h.detach().mean(0)
        self.attribute = self.attribute * 0.5 + h.detach().mean(0)
        return h


@program
class Queue(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(5, WIDTH))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def after(self, h: Tensor) -> Tensor:
        seen = self.queue.clone().mean(0)
        rows = (self.place + torch.arange(len(h))) % len(self.queue)
        with torch.no_grad():
            self.queue[rows] = h.detach()
            self.place.add_(len(h))
        return h + seen


@program
class MomentumHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(WIDTH, CLASSES).requires_grad_(False)

    def after(self, h: Tensor) -> Tensor:
        for kept, trained in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            kept.data = kept.data * 0.9 + trained.data * 0.1
        return h + self.teacher(h).mean(-1, keepdim=True)


@program
class ReadsAnothersBuffer(Net):
    class layer(Layer):
        def forward(self, x: Tensor) -> Tensor:
            if self.seen:
                x = x - self.seen[0].kept
            average(self.kept, x.mean(0))
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].seen = (self.layers[0],)


@program
class OneNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = self.norm(layer(x))
        return {"loss": functional.cross_entropy(self.head(x), labels)}


def batch(seed: int = 0, samples: int = SAMPLES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    return {"x": x[:samples], "labels": labels[:samples]}


def planned(model: nn.Module, num_stages: int | None, **options: Any) -> ipp.Plan:
    example = batch(samples=SAMPLES // MICROBATCHES)
    return ipp.plan(model, example, num_stages=num_stages, microbatches=MICROBATCHES, **options)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a training changes: parameters, buffers, plain attributes of modules."""
    found: dict[str, Any] = {n: t.detach().clone() for n, t in model.named_parameters()}
    found |= {n: t.detach().clone() for n, t in model.named_buffers()}
    for fqn, module in model.named_modules():
        for name in ("calls", "attribute", "counted"):
            if name in vars(module):
                value = vars(module)[name]
                found[f"{fqn}.{name}"] = torch.as_tensor(value).clone()
        found[f"{fqn}.seen"] = torch.tensor(len(vars(module).get("seen", ())))
    return found


def trained_plainly(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, Any]]:
    """Train without stages, microbatch by microbatch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    size = SAMPLES // MICROBATCHES
    for step in range(steps):
        whole, total = batch(step), 0.0
        for first in range(0, SAMPLES, size):
            part = {name: value[first : first + size] for name, value in whole.items()}
            loss = model(**part)["loss"] / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, state_of(model)


def trained(
    model: nn.Module, plan: ipp.Plan, steps: int = 3, **options: Any
) -> tuple[list[float], dict[str, Any]]:
    """Train as planned."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ipp.compile(model, plan, optimizer=optimizer, **options) as executable:
        losses = [executable.train_step(batch(step)).loss for step in range(steps)]
        executable.state_dict()
    return losses, state_of(model)


def assert_alike(found: tuple[list[float], Any], expected: tuple[list[float], Any]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
