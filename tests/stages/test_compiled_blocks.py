"""Blocks through torch.compile: the numbers of eager ones, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.stages import block_runs, stage
from tests.tiny_models import TINY

# What dynamo and inductor do while they are imported and compile is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, and leave out the kernels."""
    monkeypatch.setattr(block_runs, "_BACKEND", "aot_eager")


def curve(name: str, stages: int, **options: Any) -> list[float]:
    model, example = TINY[name].build(dropout=False)
    plan = ipp.plan(model, example, num_stages=stages, microbatches=2)
    batch = TINY[name].batch(batch_size=4, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ipp.compile(model, plan, optimizer=optimizer, **options) as executable:
        losses = [executable.train_step(batch).loss for _ in range(2)]
        evaluated = executable.eval_step(batch).loss
        assert evaluated is not None
        return [*losses, evaluated]


# Measured with inductor: 2e-8 of the loss; sums of float32 in another order.
@pytest.mark.acceptance
def test_losses_are_those_of_eager_blocks() -> None:
    expected = curve("llama", 2, recompute="all")
    found = curve("llama", 2, recompute="all", compile_blocks=True)
    assert found == pytest.approx(expected, rel=1e-5)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dropout":
            return nn.functional.dropout(self.linear(x), 0.1, self.training)
        if self.kind == "noise":
            return self.linear(x) + torch.randn_like(x)
        if self.kind == "print":
            print(float(x.detach().sum()))  # no compiler keeps it in one graph
        if self.kind == "count":
            self.calls += 1
        return self.linear(x).relu()


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block("plain"), Block(kind)])

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"loss": nn.functional.mse_loss(x, labels)}


def run(kind: str, *, compiled: bool = True, recompute: list[str] | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    model = Model(kind)
    batch = {"x": torch.randn(4, 4), "labels": torch.randn(4, 4)}
    plan = ipp.plan(model, batch, num_stages=2, microbatches=2)
    with ipp.compile(model, plan, compile_blocks=compiled, recompute=recompute) as executable:
        executable.forward_backward(batch)
        outputs = executable.eval_step(batch)
    assert outputs.loss is not None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*gradients, torch.tensor(outputs.loss)]


@pytest.mark.usefixtures("without_inductor")
def test_gradients_are_those_of_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def noted(program: Any, inputs: Any, *, recompute: bool) -> Any:
        ran.append(program.name)
        return block_runs.run_compiled(program, inputs, recompute=recompute)

    monkeypatch.setattr(stage, "run_compiled", noted)
    expected = run("plain", compiled=False)
    assert not ran
    found = run("plain", recompute=["blocks.1"])
    assert {"blocks.0", "blocks.1"} <= set(ran)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dropout", r"block 'blocks\.1' cannot be compiled: it draws random numbers \(dropout\)"),
        ("noise", r"it draws random numbers \(randn_like\), which would no longer be keyed"),
        ("print", r"block 'blocks\.1' cannot be compiled: .*; leave compile_blocks out"),
    ],
)
def test_what_cannot_be_compiled_whole_is_refused(kind: str, message: str) -> None:
    with pytest.raises((StageError, LoweringError), match=message):
        run(kind)


@pytest.mark.usefixtures("without_inductor")
def test_a_block_that_changes_its_buffer_is_refused_or_runs_as_it_is() -> None:
    expected, found = run("count", compiled=False), run("count")
    assert all(map(torch.equal, found, expected))
    unseen = SimpleNamespace(name="b", module=Block("count"), modes=())  # when it was captured
    with pytest.raises(LoweringError, match="block 'b' changes calls when it runs"):
        block_runs.run_compiled(unseen, (torch.ones(2, 4),), recompute=False)  # type: ignore[arg-type]
