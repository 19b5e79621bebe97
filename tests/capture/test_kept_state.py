"""What a model keeps from batch to batch: found by capture, seen and put back by the self-check."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.capture.captured import capture
from ipu_pipeline.capture.check import check_capture
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.errors import CaptureError, PartitionError, PlanError
from ipu_pipeline.ir.graph import BlockGraph, SharedState
from tests.capture.toys import WIDTH, Layer, batch, last, toy
from tests.stateful import PROGRAMS, planned, state_of
from tests.stateful import batch as samples

REFUSALS = {
    "another shape": (
        lambda self, x: replace_table(self, self.layers[0](x), torch.ones(1, WIDTH)),
        r"Toy replaces 'table' \(\(4,\) torch.float32\) by a \(1, 4\) torch.float32 tensor",
    ),
    "written after autograd saved it": (
        lambda self, x: write_late(self, self.layers[0](x)),
        "Toy itself fails in its backward pass: one of the variables needed for gradient",
    ),
    "replaced by a block, read by another": (
        lambda self, x: last(self, self.layers[0](x * self.layers[0].seen)),
        r"a block of Toy replaces 'layers.0.seen' by another tensor, and 'the model itself' reads",
    ),
}


def replace_table(self: Any, h: Tensor, more: Tensor) -> dict[str, Tensor]:
    h = h + self.table
    self.table = self.table * 0.5 + h.detach().mean(0) * more
    return last(self, h)


def write_late(self: Any, h: Tensor) -> dict[str, Tensor]:
    loss = (self.layers[1](h) * self.table).sum()
    self.table.add_(1)
    return {"loss": loss}


class Replacing(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen * 0.5
        return self.linear(x)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    body, message = REFUSALS[name]
    model = toy(body, Replacing if "block" in name else Layer)
    model.table = torch.ones(WIDTH)
    with pytest.raises(CaptureError, match=message):
        capture(model, batch())


def test_shared_state_is_in_the_graph_and_in_the_plan() -> None:
    expected = SharedState("layers.0.kept", ("layers.0", "layers.2"), ("layers.0",))
    plan = planned(PROGRAMS["ReadsAnothersBuffer"](), 2)
    assert plan.graph.state == (expected,)
    raw = plan.graph.to_json()
    assert BlockGraph.from_json(raw, "x").state == (expected,)
    raw["state"][0]["readers"] = ["layers.9"]
    with pytest.raises(PlanError, match=r"x: something names block 'layers.9', which is unknown"):
        BlockGraph.from_json(raw, "x")
    raw["state"][0]["writers"] = []
    with pytest.raises(PlanError, match=r"nothing changes the state 'layers.0.kept'"):
        BlockGraph.from_json(raw, "x")


def test_statistics_of_a_norm_are_of_one_block() -> None:
    captured = capture(PROGRAMS["BatchNorm"](), samples(samples=2))
    assert captured.state == ()
    norms = [program.writes for program in captured.programs if program.writes]
    assert len(norms) == 4
    assert "layers.0.norm.running_mean" in norms[0]


class CountsBackward(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(self.note)
        return y * self.seen.clone()

    def note(self, gradient: Tensor) -> None:
        self.seen.copy_(self.seen * 0.5 + gradient.mean(0))


def test_state_that_a_backward_pass_changes_keeps_the_model_in_one_stage() -> None:
    model = toy(lambda self, x: last(self, self.layers[0](x)), CountsBackward)
    captured = capture(model, batch())
    assert [item.backward for item in captured.state] == [True, True]
    assert ipp.plan(model, batch(), microbatches=2).num_stages == 1
    with pytest.raises(
        PartitionError,
        match=r"the backward pass changes 'layers.0.seen', which the next microbatch reads",
    ):
        ipp.plan(model, batch(), microbatches=2, num_stages=2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_planning_leaves_everything_as_it_is(name: str) -> None:
    model = PROGRAMS[name]()
    before, rng = state_of(model), torch.get_rng_state()
    planned(model, 1)
    after = state_of(model)
    assert all(torch.equal(after[fqn], value) for fqn, value in before.items())
    assert torch.equal(rng, torch.get_rng_state())


def test_the_self_check_runs_with_dropout() -> None:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        x = functional.dropout(self.layers[0](x), 0.5, self.training)
        return last(self, x)

    class Dropping(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(x))

    model = toy(body, Dropping)
    captured = capture(model, batch())  # the masks are the same
    model.training = False  # that of the glue only
    with pytest.raises(CaptureError, match="differs from the model on other data"):
        check_capture(captured, batch())


def test_what_an_installed_library_keeps_is_no_state_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the queue of pytest-xdist, which an ``assert`` in a test's model leads to."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "library_with_lines.py").write_text(
        "LINES = []\ndef log(line):\n    LINES.append(line)\n"
    )
    (tmp_path / "users_own_code.py").write_text(
        "import library_with_lines as library\n"
        "NUMBERS = []\n"
        "def body(self, x):\n"
        "    library.log('forward')\n"
        "    NUMBERS.append(1)\n"
        "    return {'loss': self.layers[0](x).sum()}\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(tmp_path)
    users = importlib.import_module("users_own_code")
    state = PythonState(toy(users.body).modules())
    users.library.log("forward")
    assert not state.changed()
    users.NUMBERS.append(1)
    assert state.changed()
    state.restore()
    assert (users.library.LINES, users.NUMBERS) == (["forward"], [])
