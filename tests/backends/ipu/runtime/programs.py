"""Runs a function of a small module as a program, the way the runtime does, and as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.runtime.static_graph import StaticProgram

if TYPE_CHECKING:
    Body = Callable[..., Any]
else:
    Body = Any  # Python 3.8 subscripts no Callable of collections.abc


class Toy(nn.Module):
    """A parameter, a buffer, a plain tensor; ``forward`` is the given body."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.linspace(-1.0, 2.0, 4))
        self.register_buffer("table", torch.arange(12.0).view(6, 2))
        self.plain = torch.arange(4.0)
        self.scale = 0.5

    def forward(self, **inputs: Tensor) -> Any:
        return self.body(self, **inputs)


def batch() -> dict[str, Tensor]:
    """Return rows of four floats, of ids and of a mask; the last two rows are padded."""
    return {
        "x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
        "ids": torch.tensor([[1, 0, 3, 5], [2, 2, 4, 1]]),
        "mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    }


def own(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs that may be written to."""
    return {name: value.clone() for name, value in inputs.items()}


def rehearsed(model: nn.Module, inputs: dict[str, Tensor]) -> StaticProgram:
    """Return the program of a model, built with ``inputs``."""
    program = StaticProgram(model)
    program.rehearse(own(inputs))
    return program


def run(program: StaticProgram, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Run a program on one microbatch."""
    return program.run(model.forward, (), program.inputs(own(inputs), 1))
