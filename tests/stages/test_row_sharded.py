"""Tables that several consecutive stages hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.planner.passes.annotations import SerializeEmbedding
from tests.later import in_turn
from tests.stages.models import (
    MICROBATCHES,
    assert_equal_gradients,
    built,
    eager,
    gradients,
    serialized,
)

pytestmark = pytest.mark.filterwarnings("ignore:the C.. kernels are not used")


def spread(plan: ipp.Plan, block: str, splits: Sequence[int]) -> ipp.Plan:
    """Put as many stages before the one of ``block`` (the first) as ``splits`` need."""
    home = plan.stages[0]
    assert block in home.blocks
    stages = []
    first = 0
    for index, count in enumerate(splits):
        slices = {block: (first, first + count)}
        first += count
        last = index == len(splits) - 1
        rest = {"recompute": (), "serialize": {}, "blocks": ()}
        stages.append(replace(home, table_slices=slices, **({} if last else rest)))
    factors = {**stages[-1].serialize, block: first}
    stages[-1] = replace(stages[-1], serialize=factors)
    return replace(plan, stages=(*stages, *plan.stages[1:]))


def compiled(model: nn.Module, plan: ipp.Plan, **options: Any) -> LocalExecutable:
    """Compile without the verifier: these plans have stages that hold nothing but rows."""
    from ipu_pipeline.stages.executable import ExecutionOptions

    return LocalExecutable(model, plan, None, ExecutionOptions(self_check=False, **options))


@pytest.mark.parametrize(
    ("name", "splits", "sequential"),
    in_turn(
        ("gpt2 (tied)", "bert-mlm (tied)", "t5 (tied)", "mt5 (untied)", "llama (untied)"),
        ((4, 2, 1), (2, 5)),
        (True, False),
    ),
)
def test_loss_gradients_and_outputs_stay(
    name: str, splits: tuple[int, ...], sequential: bool
) -> None:
    model, example, batch, blocks = built(name)
    expected_loss, expected = eager(model, batch)
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    plan = spread(serialized(plan, {blocks[-1]: 3}), blocks[0], splits)
    with compiled(model, plan, sequential=sequential, recompute="all") as executable:
        loss = executable.forward_backward(batch)
        found = gradients(model)
        result = executable.eval_step(batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(found, expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.outputs["logits"], model(**batch).logits)


class Glue(nn.Module):
    """A lookup that a test gives, then one layer."""

    def __init__(self, look_up: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.other = nn.Embedding(20, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.look_up = look_up

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.look_up(self, ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"loss": hidden.square().mean()}


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


class Valued(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (2 if bool((ids > 3).any()) else 1)


def shifted(model: Glue, ids: Tensor) -> Tensor:
    return model.embed(ids)


def computed(model: Glue, ids: Tensor) -> Tensor:
    return model.embed(model.other(ids).argmax(-1))


def glue(look_up: Any, embed: nn.Embedding | None = None) -> tuple[nn.Module, Any, ipp.Plan]:
    torch.manual_seed(0)
    model = Glue(look_up)
    model.embed = embed or model.embed
    batch = {"ids": torch.arange(8).reshape(4, 2)}
    plan = ipp.plan(model, batch, num_stages=1, microbatches=1)
    return model, batch, plan


def test_plans_of_the_pass_run() -> None:
    model, example, batch, _ = built("t5 (tied)")
    expected_loss, expected = eager(model, batch)
    plan = ipp.plan(model, example, num_stages=4, microbatches=MICROBATCHES)
    block = "decoder.embed_tokens"
    home = plan.stage_of[block]
    assert home > 0
    plan = SerializeEmbedding(factor=7, splits=(3, 4), blocks=(block,)).run(plan)
    assert plan.stages[home - 1].table_slices == {block: (0, 3)}
    with ipp.compile(model, plan, self_check=False) as executable:
        assert executable.forward_backward(batch) == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize(
    ("look_up", "embed", "message"),
    [
        (shifted, Shifted(30, 4), "must use it once, to look up one of its own inputs unchanged"),
        (shifted, Valued(20, 4), "what the block looks up depends on values"),
        (computed, None, r"another block computes the ids \(argmax\)"),
    ],
)
def test_what_cannot_be_spread_is_refused(look_up: Any, embed: Any, message: str) -> None:
    model, batch, plan = glue(look_up, embed)
    with (
        compiled(model, spread(plan, "embed", [1, 1])) as executable,
        pytest.raises(LoweringError, match=message),
    ):
        executable.forward_backward(batch)


def test_stages_without_rows_are_refused() -> None:
    model, batch, plan = glue(shifted)
    with (
        compiled(model, spread(plan, "embed", [11, 1])) as executable,
        pytest.raises(LoweringError, match="a stage would start at row 22; use fewer slices"),
    ):
        executable.forward_backward(batch)


def test_ids_outside_of_every_stage_are_refused() -> None:
    model, batch, plan = glue(shifted)
    with compiled(model, spread(plan, "embed", [1, 1])) as executable:
        executable.forward_backward(batch)
        with pytest.raises(StageError, match=r"ids from 12 to 20 are looked up.*which has 20 rows"):
            executable.forward_backward({"ids": torch.tensor([[12, 20]] * 4)})
