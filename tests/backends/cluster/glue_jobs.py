"""What the processes of ``test_glue.py`` do; results are plain data."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ipu_pipeline as ipp
from tests.capture.toys import Toy
from tests.stages.test_glue import halves, inputs, machine_of
from tests.stages.test_modes import Modal

STEPS = 3


def reads_and_switches(self: Toy, x: Tensor) -> dict[str, Tensor]:
    self.calls += 1
    h = self.layers[0](x) * (self.weight / self.calls)
    h = h + random.random()
    self.layers[0].eval()
    if self.weight > 1.2:
        h = h.relu()
    return {"loss": self.layers[1](h).square().mean()}


def model() -> Any:
    torch.manual_seed(0)
    random.seed(3)
    made: Any = Toy(reads_and_switches, Modal).train()
    made.calls, made.weight = 0, 1.0
    return made


def trained(*, replicas: int = 1, odd: int = -1) -> dict[str, Any]:
    """Train, also with another random state on rank ``odd``; return what a user sees."""
    own = model()
    plan = ipp.plan(
        own, halves(inputs(0))[0], machine=machine_of(2 * replicas), num_stages=2,
        microbatches=2 // replicas, replicas=replicas, schedule="gpipe",
    )  # fmt: skip
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    made = ipp.compile(own, plan, target="distributed", optimizer=optimizer)
    if dist.get_rank() == odd:
        random.random()
    try:
        losses = [train(made, own, step) for step in range(STEPS)]
    except ipp.errors.StageError as error:
        made.close()
        return {"error": str(error)}
    modes = [module.training for module in own.modules()]
    state = {name: value.numpy().copy() for name, value in made.state_dict().items()}
    made.close()
    return {"losses": losses, "calls": own.calls, "modes": modes, "state": state}


def hooked() -> str:
    """Train with a dict that hooks fill and nobody empties; return why that is refused."""
    kept: dict[int, Tensor] = {}

    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[1](self.layers[0](x))
        return {"loss": h.square().mean() + sum(t.mean() for t in kept.values())}

    own: Any = Toy(body)
    for number, layer in enumerate(own.layers):
        layer.register_forward_hook(lambda _, __, out, n=number: kept.__setitem__(n, out))
    plan = ipp.plan(own, halves(inputs(0))[0], num_stages=2, microbatches=2)
    made = ipp.compile(own, plan, target="distributed")
    try:
        for step in range(STEPS):
            made.forward_backward(inputs(step))
    except (ValueError, ipp.errors.PipelineError) as error:
        return str(error)
    finally:
        made.close()
    return ""


def train(made: Any, own: Any, step: int) -> float:
    own.weight = 1.0 + step / 5
    loss: float = made.train_step(inputs(step)).loss
    return loss


torch.set_num_threads(1)
