"""The model's own code on ranks: threads, in whose models the weights of others are NaN."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.cluster.inference import refuse
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.placed import PlacedTensor, RankProgram
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.executable import ExecutionOptions
from tests.backends.cluster.jobs import built
from tools.coverage.rank_threads import on_threads

LENGTHS = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "gpt2-lm": {"num_beams": 3, "num_return_sequences": 2},
    "t5": {"num_beams": 2},
    "mixtral": {},
}


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "input_features")
    return {name: batch[name] for name in names if name in batch}


@pytest.mark.parametrize("name", WAYS)
def test_tokens_and_scores_are_those_of_the_model_alone(name: str) -> None:
    """Beams, an encoder that runs once, and experts whose tokens are counted."""
    model, plan, batch = built(name, num_stages=4)
    options = {**LENGTHS, **WAYS[name], "return_dict_in_generate": True, "output_scores": True}

    def call(own: Any) -> Any:
        return own.generate(**_inputs(batch), do_sample=False, **options)

    before = [len(module._forward_hooks) for module in model.modules()]
    expected = call(copy.deepcopy(model).eval())
    for found in on_threads(model, plan, call):
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert "past_key_values" not in found
    assert [len(module._forward_hooks) for module in model.modules()] == before


class _Nowhere:
    """The first of two ranks; what it sends is lost."""

    layout = Layout(0, 1, 2, 2, (0, 1))
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def start_send(self, wire: torch.Tensor, position: int) -> Any:
        self.sent.append(wire)
        return lambda: None

    def receive(self, wire: torch.Tensor, position: int) -> None:
        raise AssertionError("nothing comes")


def _program() -> tuple[RankProgram, torch.Tensor, torch.Tensor]:
    """Return a program, a weight that is here and one that is not."""
    own, other = torch.ones(4, 4), torch.ones(4, 4)
    return RankProgram(_Nowhere(), {own: 1, other: 2}), own, other


def test_what_is_not_here_has_a_shape_only() -> None:
    program, own, other = _program()
    with program:
        here, there = torch.ones(2, 4) @ own, torch.ones(2, 4) @ other
        both = there + here
        half = there.view(torch.tensor(1), torch.div(8, 2, rounding_mode="trunc"), -1)
        assert half.where(half > 0, 1.0).shape == (1, 4, 2)  # numbers that all know are sizes
        assert there[torch.tensor([True, False])].shape == (1, 4)
        assert there[:, : own.sum().long() // 8].shape == (2, 2)  # an end of a slice goes to all
        assert (there + other.sum()).reshape(-1).shape == (8,)
        view = own[:2]
        program.send(view, 1)  # as a hook does, while torch's functions are watched
        assert there.shape == (2, 4)
        assert there.device == torch.device("cpu")
    assert not here.value.is_meta
    assert there.value.is_meta
    assert type(view.value) is torch.Tensor
    assert [type(wire) for wire in program._links.sent] == [torch.Tensor] * len(program._links.sent)
    assert (here.positions, there.positions, both.positions) == (3, 2, 2)


def test_what_all_have_got_stays_everywhere_where_memory_is_held() -> None:
    program, own, other = _program()
    with program:
        table = torch.zeros(2, 4)
        table[:1] = own[:1]  # its memory is held here from now on
        given = table.float()
        program.send(given, 1)
        same, pair = given.float(), given.split(1)  # as norms do: nothing is copied
        placed = [torch.zeros(2, 4) + same, torch.zeros(1, 4) + pair[0]]
        there = same * other[0]
    assert all(type(one) is not PlacedTensor or one.positions == 3 for one in placed)
    assert there.positions == 2
    assert not program._links.sent[1:]


def test_what_cannot_be_followed_is_refused() -> None:
    program, own, other = _program()
    with program:
        there = torch.ones(2, 4) @ other
        with pytest.raises(LoweringError, match="unsqueeze_ changes the shape of a tensor in pla"):
            there.unsqueeze_(0)
        with pytest.raises(LoweringError, match=r"add changes the shape .* or writes into one th"):
            torch.add(there, 1, out=torch.ones(2, 4))
        with torch._C.DisableTorchFunction(), pytest.raises(LoweringError, match="is not seen; u"):
            torch.add(there, 1)
        here = torch.ones(2, 4) @ own
        row = here[0]
        program.send(here, 1)
        with pytest.raises(LoweringError, match="another one shares its memory, and stages of"):
            here.add_(1)
        del row
        here.add_(1)
    with pytest.raises(LoweringError, match="was called on a tensor that one stage holds, after"):
        there + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 2}, r"the plan has tp 2, and generate and forward run each operation on whole wei"),
        ({"table": True}, r"the plan spreads the table of block over stages, and generate and for"),
    ],
)
def test_plans_whose_weights_are_cut_are_refused(
    make_plan: Any, changes: Any, message: str
) -> None:
    plan = make_plan(2)
    if "table" in changes:
        stages = [replace(stage, table_slices=("block",)) for stage in plan.stages]
        plan = replace(plan, stages=tuple(stages))
    layout = Layout(0, 1, 2, 2, (0, 1), changes.get("tp", 1))
    with pytest.raises(LoweringError, match=message):
        refuse(plan, ExecutionOptions(), layout, [{}])
