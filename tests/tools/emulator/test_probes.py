"""One table of what the front end accepts and refuses; each line names its place in the contract.

The sections are those of POPTORCH_CONTRACT.md; "facts" is its last table.
"""

from __future__ import annotations

import builtins
import math
import pickle

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.tools.emulator import probes_api, probes_forward
from tests.tools.emulator.probes_api import World


class Square(torch.autograd.Function):
    @staticmethod
    def forward(_context, x):
        return x * x


NAMES = {
    "torch": torch,
    "functional": functional,
    "math": math,
    "numpy": numpy,
    "Square": Square,
}


class Expression(nn.Module):
    """Computes a text; what stands before the last semicolon are statements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.host = torch.linspace(-1.0, 1.0, 6).view(2, 3)
        self.host_index = torch.tensor([1, 0])
        *statements, last = text.split("; ")
        body = "".join(f"    {line}\n" for line in [*statements, f"return {last}"])
        names = {**NAMES, "host": self.host, "host_index": self.host_index}
        exec(f"def call(x, i, m):\n{body}", names)
        self.call = names["call"]

    def forward(self, x, i, m):
        return self.call(x, i, m)


def inputs():
    x = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -0.5]])
    return x, torch.tensor([1, 0]), x > 0


REFUSED = [
    pytest.param(text, message, id=f"{source}: {text}")
    for (source, message), texts in probes_forward.REFUSED.items()
    for text in texts
]
ACCEPTED = [
    pytest.param(text, id=f"{source}: {text}")
    for source, texts in probes_forward.ACCEPTED.items()
    for text in texts
]
TYPES = [pytest.param(text, value, id=f"{s}: {text}") for s, text, value in probes_forward.TYPES]
API = [
    pytest.param(text, error, id=f"{source}: {text}")
    for (source, error), texts in probes_api.PROBES.items()
    for text in texts
]


def test_there_are_enough_probes() -> None:
    assert len(REFUSED) + len(ACCEPTED) + len(TYPES) + len(API) >= 150


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused_in_forward(poptorch, text, message) -> None:
    executor = poptorch.inferenceModel(Expression(text))
    with pytest.raises(poptorch.Error, match=message) as caught:
        executor.compile(*inputs())
    assert caught.value.type == "poptorch_cpp_error"
    assert not executor.isCompiled()


@pytest.mark.parametrize("text", ACCEPTED)
def test_accepted_in_forward(poptorch, text) -> None:
    model = Expression(text)
    found = poptorch.inferenceModel(model)(*inputs())
    wanted = model(*inputs())
    assert probes_api.differences(found, wanted) == ""


@pytest.mark.parametrize(("text", "value"), TYPES)
def test_types_in_forward(poptorch, text, value) -> None:
    assert poptorch.inferenceModel(Expression(text))(*inputs()) == value


@pytest.mark.parametrize(("text", "error"), API)
def test_calls(poptorch, text, error, monkeypatch, tmp_path, caplog) -> None:
    world = World(poptorch, monkeypatch, tmp_path, caplog)
    if not error:
        assert world.run(text)
        return
    kinds, message = error.split(": ", 1)
    places = (builtins, pickle, poptorch)
    expected = [
        getattr(place, kind)
        for kind in kinds.split("|")
        for place in places
        if hasattr(place, kind)
    ]
    with pytest.raises(tuple(expected), match=message or "."):
        world.run(text)


def test_a_refusal_names_operation_and_line(poptorch) -> None:
    class Net(nn.Module):
        def forward(self, x):
            return x[x > 0]

    executor = poptorch.inferenceModel(Net())
    with pytest.raises(poptorch.Error, match=r"aten::index: .*test_probes.py:"):
        executor(torch.ones(2))
    line = Net.forward.__code__.co_firstlineno + 1
    with pytest.raises(poptorch.Error, match=f"test_probes.py:{line}\\)"):
        executor(torch.ones(2))


def test_the_program_is_what_was_recorded(poptorch) -> None:
    """Python of ``forward`` runs once: what it decides then stays."""

    class Net(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls if self.calls == 1 else x - self.calls

    model = Net()
    executor = poptorch.inferenceModel(model)
    assert [executor(torch.full((1,), value)).item() for value in (1.0, 2.0)] == [1.0, 2.0]
    assert model.calls == 1
