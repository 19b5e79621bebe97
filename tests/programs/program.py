"""Small training programs as people write them, composed of features, and their truth.

A :class:`Program` says which features one program has. ``build`` makes its model, ``eager`` trains
it with plain torch and ``pipelined`` with a plan of ours; both return what a user can observe:
losses, parameters, buffers, what was logged, and what the model counted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp

WIDTH, WORDS, LENGTH, CLASSES, STEPS = 8, 12, 5, 3, 3
RATE = 0.1
LARGEST_NORM = 0.05
IGNORED = -100

# What Python reads: where the number comes from, and what it does.
READS = ("", "attribute", "config", "global", "closure", "counter", "random", "numpy", "tensor")
USES = ("embedding", "middle", "loss", "branch", "integer")
MODES = ("", "part in eval", "eval inside forward", "frozen statistics", "switched between steps")
BUFFERS = ("", "own", "batch norm", "spectral norm", "written at the end", "read at the start",
           "replaced", "moving weights")  # fmt: skip
SIDES = ("", "tuple", "attribute", "hook", "all hidden states")
LOGS = ("", "item", "detach", "count by value")
ENTRIES = ("", "weights", "axis 1", "number", "none", "text", "list", "array", "shared rows")
LENGTHS = ("", "change between steps")
LOSSES = ("sample mean", "token mean", "sum", "unit")
RECOMPUTES = (None, "all", "first layer")
GLOBAL = SimpleNamespace(scale=1.0)


class Features:
    """What a program or a script has; the default of every field is the plain choice."""

    def __str__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self.special().items()]
        return f"{type(self).__name__}({', '.join(said)})"

    def special(self) -> dict[str, Any]:
        """Return the fields that are not plain."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        plain = type(self)()
        return {name: value for name, value in found.items() if value != getattr(plain, name)}


@dataclass(frozen=True)
class Program(Features):
    """The features of one program; every field's first value is the plain one."""

    read: str = ""
    use: str = "embedding"
    mode: str = ""
    buffer: str = ""
    side: str = ""
    log: str = ""
    entry: str = ""
    loss: str = "sample mean"
    tied: bool = False
    clipped: bool = False
    lengths: str = ""
    recompute: str | None = None
    layers: int = 3
    microbatches: int = 2
    stages: int = 2
    schedule: str = "1f1b"

    @property
    def mixes(self) -> bool:
        """Whether what a sample gives to the loss may depend on the others of its microbatch."""
        return self.read == "tensor" or self.buffer in ("written at the end", "replaced")


# Every field that has choices, the plain one first.
FEATURES: dict[str, tuple[Any, ...]] = {
    "read": READS,
    "use": USES,
    "mode": MODES,
    "buffer": BUFFERS,
    "side": SIDES,
    "log": LOGS,
    "entry": ENTRIES,
    "loss": LOSSES,
    "lengths": LENGTHS,
    "recompute": RECOMPUTES,
    "schedule": ("1f1b", "gpipe"),
    "tied": (False, True),
    "clipped": (False, True),
}


class Layer(nn.Module):
    """A residual block with what the features ask for inside."""

    def __init__(self, program: Program, index: int) -> None:
        super().__init__()
        self.program = program
        self.linear = nn.Linear(WIDTH, WIDTH)
        if program.buffer == "spectral norm" and index == 1:
            self.linear = nn.utils.parametrizations.spectral_norm(self.linear)
        if program.buffer == "batch norm" or program.mode == "frozen statistics":
            self.norm = nn.BatchNorm1d(WIDTH)
        # Only modes that switch it off make a program that repeats itself in plain torch.
        inactive = program.mode in ("part in eval", "eval inside forward")
        self.dropout = nn.Dropout(0.5 if inactive and index == 0 else 0.0)
        self.aux: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.linear(self.dropout(x)))
        if hasattr(self, "norm"):
            y = self.norm(y.flatten(0, 1)).view_as(y)
        if self.program.side == "attribute":
            self.aux = y.pow(2).mean()
        return (x + y, y.mean()) if self.program.side == "tuple" else x + y


class Net(nn.Module):
    """Embedding, layers, head, loss; what is special is said by the program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.config = SimpleNamespace(scale=1.0)
        self.scale, self.calls, self.history = 1.0, 0, []
        self.box = [1.0]
        box = self.box
        self.closure = lambda: box[0]
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Layer(program, i) for i in range(program.layers)])
        self.head = nn.Linear(WIDTH, WORDS if program.tied else CLASSES, bias=False)
        if program.tied:
            self.head.weight = self.embed.weight
        self.register_buffer("running", torch.zeros(WIDTH))
        self.register_buffer("average", self.embed.weight.detach().clone())
        self.collected: list[Tensor] = []
        if program.side == "hook":
            for layer in self.layers:
                layer.linear.register_forward_hook(
                    lambda module, args, output: self.collected.append(output)
                )

    # ---- what changes while training ------------------------------------------------------

    def advance(self, step: int) -> None:
        """Change between steps what the program says that it reads."""
        value = 1.0 + step / 2
        self.scale = self.config.scale = GLOBAL.scale = self.box[0] = value
        if self.program.mode == "part in eval":
            self.layers[0].eval()
        if self.program.mode == "frozen statistics":
            self.layers[0].norm.eval()
        if self.program.mode == "switched between steps" and self.program.buffer == "batch norm":
            self.layers[0].norm.train(step % 2 == 0)

    def number(self, x: Tensor) -> Any:
        return {
            "": lambda: 1.0,
            "attribute": lambda: self.scale,
            "config": lambda: self.config.scale,
            "global": lambda: GLOBAL.scale,
            "closure": self.closure,
            "counter": lambda: float(self.calls),
            "random": random.random,
            "numpy": lambda: float(np.random.rand()),
            "tensor": lambda: float(x.detach().abs().max()),
        }[self.program.read]()

    def scaled(self, x: Tensor, place: str) -> Tensor:
        use, read = self.program.use, self.program.read
        if not read:
            return x
        if use == place:
            return x * self.number(x)
        if place == "middle" and use == "branch":
            return x + 1 if self.number(x) > 1.2 else x - 1
        if place == "middle" and use == "integer":
            return x + x[:, : 1 + int(self.number(x)) % LENGTH].mean(1, keepdim=True)
        return x

    # ---- one microbatch -------------------------------------------------------------------

    def forward(self, ids: Tensor, labels: Tensor, extra: Any = None) -> dict[str, Any]:
        program = self.program
        self.calls += 1
        self.collected.clear()
        if program.mode == "eval inside forward":
            self.layers[0].eval()
        x = self.embed(ids) + torch.arange(ids.shape[1]).unsqueeze(-1) / LENGTH
        x = self.scaled(x, "embedding")
        x = self.with_entry(x, extra)
        if program.buffer == "read at the start":
            x = x - self.running
        terms, hidden = [], []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if program.side == "tuple":
                x, term = x
                terms.append(term)
            hidden.append(x)
            if index == 0:
                x = self.scaled(x, "middle")
        x = self.buffered(x)
        logits = self.head(x)
        loss = self.scaled(self.criterion(logits, labels, extra), "loss")
        return {"loss": self.total(loss, self.side_terms(terms, hidden)), "logits": logits}

    def total(self, loss: Tensor, side: Any) -> Tensor:
        loss = loss + 0.1 * side
        self.logged(loss)
        return loss

    def with_entry(self, x: Tensor, extra: Any) -> Tensor:
        entry = self.program.entry
        if entry == "axis 1":
            return x + extra.sum(0).unsqueeze(-1)
        if entry == "number":
            return x * extra
        if entry == "list":
            return x * extra[0]
        if entry == "text":
            return x * 2 if extra == "double" else x
        if entry == "array":
            return x + torch.as_tensor(extra).sum()
        if entry == "shared rows":
            return x + (x @ extra.T) @ extra / len(extra)
        return x

    def buffered(self, x: Tensor) -> Tensor:
        buffer, mean = self.program.buffer, x.detach().mean((0, 1))
        if buffer in ("written at the end", "read at the start"):
            with torch.no_grad():
                self.running.mul_(0.9).add_(mean, alpha=0.1)
        if buffer == "replaced":
            self.running = 0.9 * self.running + 0.1 * mean
        if buffer == "moving weights":
            with torch.no_grad():
                self.average.lerp_(self.embed.weight, 0.1)
            return x + 0.1 * self.average.mean(0)
        if buffer in ("own", "replaced", "written at the end"):
            return x - self.running
        return x

    def side_terms(self, terms: list[Tensor], hidden: list[Tensor]) -> Any:
        side = self.program.side
        if side == "tuple":
            return torch.stack(terms).sum()
        if side == "attribute":
            return sum(layer.aux for layer in self.layers)
        if side == "hook":
            return sum(tensor.pow(2).mean() for tensor in self.collected)
        if side == "all hidden states":
            return sum(tensor.pow(2).mean() for tensor in hidden)
        return 0.0

    def criterion(self, logits: Tensor, labels: Tensor, extra: Any) -> Tensor:
        program = self.program
        if program.loss in ("token mean", "sum"):
            how = "mean" if program.loss == "token mean" else "sum"
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=how)
        pooled = logits.mean(1)
        if program.loss == "unit":
            pooled = functional.normalize(pooled, dim=-1)
        weight = extra if program.entry == "weights" else None
        each = functional.cross_entropy(
            pooled[:, :CLASSES], labels[:, 0].clamp(0), reduction="none"
        )
        if weight is not None:
            each = each * weight[labels[:, 0].clamp(0)]
        return each.mean()

    def logged(self, loss: Tensor) -> None:
        log = self.program.log
        if log == "item":
            self.history.append(loss.item())
        if log == "detach":
            self.history.append(loss.detach())
        if log == "count by value" and bool(loss > 1.0):
            self.history.append(1.0)


# ---- data and truth -----------------------------------------------------------------------


class PlainNet(Net):
    """Weighs the terms of a microbatch's loss as they count in the loss of the whole batch.

    Attributes:
        shares: Weight of the criterion, and of the terms beside it, which are means.
    """

    shares = 1.0, 1.0

    def total(self, loss: Tensor, side: Any) -> Tensor:
        super().total(loss, side)
        return loss * self.shares[0] + 0.1 * side * self.shares[1]


def build(program: Program, kind: type[Net] = Net) -> Net:
    """Return the model in its first state, everything drawn anew."""
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)
    GLOBAL.scale = 1.0
    return kind(program).train()


def batch_of(program: Program, step: int) -> dict[str, Any]:
    """Return the batch of one step: two samples a microbatch."""
    draw = torch.Generator().manual_seed(100 + step)
    size = 2 * program.microbatches
    length = LENGTH - 1 if program.lengths and step == 1 else LENGTH
    ids = torch.randint(0, WORDS, (size, length), generator=draw)
    labels = torch.randint(0, CLASSES, (size, length), generator=draw)
    if program.loss == "token mean":
        for row in range(size):
            labels[row, : row % (length - 1)] = IGNORED
    batch = {"ids": ids, "labels": labels}
    if program.entry:
        batch["extra"] = {
            "weights": torch.arange(1.0, CLASSES + 1),
            "axis 1": torch.rand(3, size, length, generator=draw),
            "number": 1.5 + step,
            "none": None,
            "text": "double" if step % 2 else "single",
            "list": [1.0 + step, 2.0],
            "array": np.ones(3, dtype=np.float32) * step,
            "shared rows": torch.rand(size, WIDTH, generator=draw),
        }[program.entry]
    return batch


BATCH_AXES: dict[str, dict[str, int | None]] = {
    "weights": {"extra": None},
    "axis 1": {"extra": 1},
    "shared rows": {"extra": None},
}


def part_of(program: Program, batch: dict[str, Any], index: int) -> dict[str, Any]:
    """Return one microbatch of ``batch``, as its author means it."""
    rows = slice(2 * index, 2 * index + 2)
    part = {"ids": batch["ids"][rows], "labels": batch["labels"][rows]}
    if "extra" in batch:
        extra = batch["extra"]
        part["extra"] = extra[:, rows] if program.entry == "axis 1" else extra
    return part


def share_of(program: Program, batch: dict[str, Any], part: dict[str, Any]) -> float:
    """Return the weight of a microbatch's criterion in that of the batch."""
    if program.loss == "sum":
        return 1.0
    if program.loss == "token mean":
        counts = [int((b["labels"] != IGNORED).sum()) for b in (part, batch)]
        return counts[0] / counts[1]
    return 1.0 / program.microbatches


def rate_of(program: Program) -> float:
    """Return the learning rate: with large gradients rounding would grow from step to step."""
    return RATE / 50 if program.loss == "sum" else RATE


@dataclass
class Outcome:
    """What a user observes after training."""

    losses: list[float]
    state: dict[str, Tensor]
    history: list[float]
    calls: int

    @classmethod
    def of(
        cls, model: Net, losses: list[float], state: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        found = model.state_dict() if state is None else state
        state = {name: value.clone() for name, value in found.items()}
        history = [float(value) for value in model.history]
        return cls(losses, state, history, model.calls)

    def difference(self, other: Outcome) -> str:
        """Return the first thing that differs, an empty text where nothing does."""
        for step, (a, b) in enumerate(zip(self.losses, other.losses, strict=True)):
            if not abs(a - b) <= 1e-5 * max(1.0, abs(a)):
                return f"loss of step {step}: {a} and {b}"
        for name, value in self.state.items():
            found = other.state[name]
            scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            if value.shape != found.shape or not float((value - found).abs().max()) <= 1e-5 * scale:
                return f"{name}: {value.flatten()[:4].tolist()} and {found.flatten()[:4].tolist()}"
        if len(self.history) != len(other.history):
            return f"logged {len(self.history)} and {len(other.history)} values"
        for a, b in zip(self.history, other.history, strict=True):
            if not abs(a - b) <= 1e-5 * max(1.0, abs(a)):
                return f"logged {a} and {b}"
        return "" if self.calls == other.calls else f"{self.calls} and {other.calls} calls"


def eager(program: Program, *, asked: bool = False) -> Outcome:
    """Train with plain torch: the microbatches one after another, then the update.

    ``asked``: Microbatches are weighed as a whole, by what their criterion counts.
    """
    model = build(program, PlainNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate_of(program))
    losses = []
    for step in range(STEPS):
        model.advance(step)
        batch, total = batch_of(program, step), 0.0
        optimizer.zero_grad()
        for index in range(program.microbatches):
            part = part_of(program, batch, index)
            share = share_of(program, batch, part)
            model.shares = share, share if asked else 1.0 / program.microbatches
            loss = model(**part)["loss"]
            loss.backward()
            total += float(loss.detach())
        if program.clipped:
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        losses.append(total)
    return Outcome.of(model, losses)


def weights_of(program: Program) -> Any:
    """Return the weights that the author of a program would ask for."""
    if program.loss == "sum":
        return [1.0] * program.microbatches
    counts = program.loss == "token mean"
    return (lambda inputs: (inputs["labels"] != IGNORED).sum()) if counts else "samples"


def pipelined(program: Program, *, asked: bool = False, target: str = "local") -> Outcome:
    """Train through a plan of ours; ``asked``: with weights of the microbatches' losses.

    Raises:
        PipelineError: The program is refused.
    """
    model = build(program)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate_of(program))
    model.advance(0)
    axes = BATCH_AXES.get(program.entry)
    options = {} if axes is None else {"batch_axes": axes}
    recompute = ["layers.0"] if program.recompute == "first layer" else program.recompute
    plan = ipp.plan(
        model,
        part_of(program, batch_of(program, 0), 0),
        machine="local",
        num_stages=program.stages,
        microbatches=program.microbatches,
        schedule=program.schedule,
        **options,
    )
    losses = []
    with ipp.compile(
        model,
        plan,
        target=target,
        optimizer=optimizer,
        recompute=recompute,
        max_grad_norm=LARGEST_NORM if program.clipped else None,
        loss_weights=weights_of(program) if asked else None,
    ) as executable:
        for step in range(STEPS):
            model.advance(step)
            losses.append(executable.train_step(batch_of(program, step)).loss)
        state = executable.state_dict()
    return Outcome.of(model, losses, state)
