"""A view replaces what a call of the model returns, for a while; outputs survive being renamed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ipu_pipeline.train.forward_view import flatten, unflatten, viewed


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


def test_the_view_may_call_the_model_and_is_gone_afterwards() -> None:
    model = Doubler()
    with viewed(model, lambda inputs: model(**inputs) + 1):
        assert model(x=3) == 7
        assert model(x=4) == 9
    assert model(x=3) == 6
    assert "forward" not in vars(model)


def test_a_forward_of_the_instance_comes_back_also_after_an_error() -> None:
    model = Doubler()
    model.forward = own = lambda x: 5 * x

    def broken(inputs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), viewed(model, broken):
        model(x=1)
    assert model.forward is own
    assert model(x=1) == 5


a, b, c = (torch.full((1,), float(i)) for i in range(3))


@pytest.mark.parametrize(
    ("outputs", "with_loss", "expected"),
    [
        ({"loss": a, "logits": b, "cache": object()}, True, {"logits": b}),
        ({"z": a, "hidden": (b, c), "last": c}, False, {"z": a, "hidden": (b, c), "last": c}),
        ({"deep": ((a, b), (c,)), "named": {"x": a}}, False,
         {"deep": ((a, b), (c,)), "named": {"x": a}}),
        ((a, b, (c,)), True, {"1": b, "2": (c,)}),
        ((a, b), False, {"0": a, "1": b}),
        (a, False, {"0": a}),
    ],
)  # fmt: skip
def test_outputs_are_put_back_together_from_any_order(outputs, with_loss, expected) -> None:
    named = flatten(outputs, with_loss=with_loss)
    assert all(isinstance(tensor, torch.Tensor) for tensor in named.values())
    found = unflatten(dict(reversed(list(named.items()))))
    assert list(found) == list(expected)
    assert str(found) == str(expected)


def test_many_members_keep_their_order() -> None:
    tensors = tuple(torch.tensor([i]) for i in range(12))
    assert unflatten(flatten({"hidden": tensors}, with_loss=False)) == {"hidden": tensors}
