"""LayerDrop and masks of numpy: drawn before the step, equal to what the model would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from ipu_pipeline.backends.ipu.runtime.static_graph import StaticProgram


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def draw_mask(shape: tuple[int, int], mask: Tensor | None = None) -> Any:
    """Mask some steps of each row, as SpecAugment does: fewer of a shorter row."""
    made = np.zeros(shape, dtype=bool)
    lengths = [shape[1]] * shape[0] if mask is None else mask.sum(-1).detach().tolist()
    for row, length in enumerate(lengths):
        span = int(0.5 * length + np.random.rand(1).item())
        made[row, np.random.choice(np.arange(int(length)), span, replace=False)] = True
    return made


class _Layer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.tanh(self.linear(x)),)


class _Dropped(nn.Module):
    """Layers that are dropped, after masked steps.

    Args:
        draw: Compares a number with a probability.
        masked: Whether steps are masked, by a mask that depends on an input.
    """

    def __init__(self, draw: Any, *, masked: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(4) for _ in range(3))
        self.embed = nn.Parameter(torch.ones(4))
        self.draw, self.masked = draw, masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.clone()
        if self.masked:
            steps = draw_mask(tuple(x.shape[:2]), mask.flip(-1) == 1)
            x[torch.tensor(steps, device=x.device, dtype=torch.bool)] = self.embed
        for layer in self.layers:
            skipped = self.training and self.draw(0.5)
            if not skipped:
                x = layer(x)[0]
        return x


DRAWS = {
    "numpy": lambda p: np.random.uniform(0, 1) < p,
    "numpy-plain": lambda p: np.random.random() <= p,
    "random": lambda p: random.uniform(0, 1) < p,
    "torch": lambda p: torch.rand([]) < p,
    "other-way": lambda p: p > random.random(),
    "kept": lambda p: not random.random() >= p,
}


def _parts(count: int) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(6) < torch.tensor([[6 - seed % 3], [4]])).long()
        made.append({"x": x, "mask": mask})
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_the_host_are_those_of_the_model(name: str, masked: bool) -> None:
    model = _Dropped(DRAWS[name], masked=masked)
    parts = _parts(4)
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    _seed(3)
    expected = [model(**part) for part in parts]
    program = StaticProgram(model)
    program.rehearse(parts[0])
    _seed(3)
    given = program.inputs(joined, 4)
    drawn = [key for key in given if key not in joined]
    assert len(drawn) == 3 + masked
    for index, wanted in enumerate(expected):
        part = {k: v[index * len(v) // 4 : (index + 1) * len(v) // 4] for k, v in given.items()}
        assert torch.equal(program.run(model.forward, (), part), wanted)
    if masked is False and name in ("numpy", "random"):
        assert len({tuple(given[key].tolist()) for key in drawn}) > 1  # something was drawn


def test_nothing_is_drawn_for_what_is_never_dropped() -> None:
    model = _Dropped(lambda p: random.random() < 0.0, masked=False)
    program = StaticProgram(model)
    part = _parts(1)[0]
    program.rehearse(part)
    assert set(program.inputs(part, 1)) == {"x", "mask"}


class _Body(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.body = body

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.body(self, x, mask)


REFUSED = [
    (lambda m, x, _: x * np.random.rand(1).item(), "draws random numbers with numpy or random"),
    (lambda m, x, _: x * random.gauss(0, 1), "draws random numbers with numpy or random"),
    (lambda m, x, _: x * (random.random() + 1), "computes with a number drawn on the host"),
    (lambda m, x, _: x if random.random() < 0.5 else -x, "calls no layer next that can be dropped"),
    (
        lambda m, x, _: x if random.random() < 0.5 else m.layer(x),
        "drops a Linear whose output has another shape",
    ),
    (
        lambda m, x, _: draw_mask((2, 6), m.layer(x)[..., 0] > 0),
        "draw_mask draws with a tensor that only the device has",
    ),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_other_draws_are_refused(body: Any, message: str) -> None:
    with pytest.raises(StaticGraphError, match=message):
        StaticProgram(_Body(body)).rehearse(_parts(1)[0])


def test_draws_need_their_input() -> None:
    model = _Dropped(DRAWS["random"], masked=False)
    part = _parts(1)[0]
    with pytest.raises(StaticGraphError, match=r"the program has no input for them; rehearse"):
        StaticProgram(model).run(model.forward, (), part)
