"""What the code between the blocks may do, and is replayed."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import (
    WIDTH,
    Layer,
    assert_replays,
    assert_trains_in_stages,
    batch,
    last,
    toy,
)

Pair = namedtuple("Pair", "first second")


def set_item_on_a_view(self, x):
    h = self.layers[0](x) * 1
    view = h[:, 1:]
    view[:, 0] = 7.0
    return last(self, h)


def write_after_read(self, x):
    h = self.layers[0](x) * 1
    before = h * 2
    h.zero_()
    return last(self, h + before)


def set_item_from_a_later_block(self, x):
    h = self.layers[0](x) * 1
    g = self.layers[1](x)
    h[:, 0] = g[:, 0]
    return {"loss": (h * g).square().mean()}


def set_item_read_by_a_third_block(self, x):
    h = self.layers[0](x) * 1
    g = self.layers[1](x)
    h[:, 0] = g[:, 0]
    return last(self, h)


def write_to_an_input_value_after_a_block_read_it(self, x):
    t = x * 1
    h = self.layers[0](x) + t
    t.zero_()
    return last(self, h - t)


def numpy_number(self, x):
    h = self.layers[0](x) * np.sqrt(WIDTH)
    return last(self, h * np.float32(2) + np.int64(3))


def shifted_labels(self, x, labels):
    shifted = labels.new_zeros(labels.shape)
    shifted[..., 1:] = labels[..., :-1].clone()
    shifted[..., 0] = 3
    shifted.masked_fill_(shifted == -100, 0)
    return {"loss": functional.cross_entropy(self.layers[1](self.layers[0](x)), shifted)}


def writes_to_its_input(self, x, labels):
    labels[labels == 2] = -100
    return {"loss": functional.cross_entropy(self.layers[1](self.layers[0](x)), labels)}


def no_grad_region(self, x):
    h = self.layers[0](x)
    with torch.no_grad():
        scale = h.abs().mean()
    return last(self, h / scale)


def no_grad_block(self, x):
    with torch.no_grad():
        h = self.layers[0](x)
    return last(self, h)


def enable_grad_in_no_grad(self, x):
    with torch.no_grad():
        mean = x.mean()
        with torch.enable_grad():
            h = self.layers[0](x) * mean
    return last(self, h)


def autocast_region(self, x):
    h = self.layers[0](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h @ h.T
    return {"loss": (h.float() @ self.layers[1](x)).square().mean()}


class Double(torch.autograd.Function):
    """Its backward pass is wrong on purpose, to see that it is used."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 10


def autograd_function(self, x):
    return last(self, Double.apply(self.layers[0](x)))


def reversed_power_and_iteration(self, x):
    rows = [2**row for row in self.layers[0](x)]
    return last(self, torch.stack(rows) ** 2)


def attributes_of_tensors(self, x):
    return last(self, self.layers[0](x).T.T.mT.mT.real)


def out_argument(self, x):
    with torch.no_grad():
        total = torch.empty(2, WIDTH)
        torch.add(x, 1, out=total)
    return last(self, self.layers[0](x) + total)


def named_results(self, x):
    values, indices = self.layers[0](x).max(1)
    pair = Pair(values, indices)
    return last(self, self.layers[0](x) * pair.first[:, None] + pair.second[:, None])


def requires_grad_assigned(self, x):
    view = x[:, None]
    view.requires_grad = True
    return last(self, self.layers[0](view[:, 0]))


BODIES = [
    numpy_number,
    set_item_on_a_view,
    set_item_read_by_a_third_block,
    write_to_an_input_value_after_a_block_read_it, write_after_read,
    set_item_from_a_later_block, no_grad_region,
    no_grad_block, enable_grad_in_no_grad, autocast_region, autograd_function,
    reversed_power_and_iteration, attributes_of_tensors, out_argument, named_results,
    requires_grad_assigned,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_replayed(body) -> None:
    model = toy(body)
    captured = capture(model, batch())
    assert_replays(model, captured, batch(seed=5))


@pytest.mark.parametrize("body", [shifted_labels, writes_to_its_input])
def test_in_place_work_on_labels_is_replayed_and_leaves_the_callers_batch(body) -> None:
    model = toy(body)
    example = batch(labels=torch.tensor([1, 2]))
    captured = capture(model, example)
    other = batch(seed=5, labels=torch.tensor([2, 3]))
    assert_replays(model, captured, other)
    captured.run(other)
    assert example["labels"].tolist() == [1, 2]
    assert other["labels"].tolist() == [2, 3]


def test_frozen_block_under_no_grad_still_lists_its_parameters() -> None:
    graph = capture(toy(no_grad_block), batch()).graph
    assert graph["layers.0"].parameters == ("layers.0.linear.weight", "layers.0.linear.bias")
    assert not graph.tensor_by_name[graph["layers.0"].outputs[0]].requires_grad


def test_autocast_switched_off_by_the_model_stays_off_under_the_callers_autocast() -> None:
    def body(self, x):
        h = self.layers[0](x)
        with torch.autocast("cpu", enabled=False):
            h = h.float() @ h.float().T
        return {"loss": h.square().mean() + 0 * self.layers[1](x).sum()}

    model = toy(body)
    captured = capture(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_replays(model, captured, batch(seed=3))


def test_buffer_written_by_the_glue_is_written_on_replay() -> None:
    def body(self, x):
        self.steps.add_(1)
        return last(self, self.layers[0](x))

    model = toy(body)
    model.register_buffer("steps", torch.zeros(()))
    captured = capture(model, batch())
    assert float(model.steps) == 0
    captured.run(batch())
    captured.run(batch())
    assert float(model.steps) == 2


def test_buffer_of_a_block_read_by_the_glue_stays_non_persistent() -> None:
    class WithBuffer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((WIDTH,), 2.0), persistent=False)

    model = toy(lambda self, x: last(self, self.layers[0](x) * self.layers[0].scale), WithBuffer)
    before = list(model.state_dict())
    captured = capture(model, batch())
    assert list(model.state_dict()) == before
    assert model.layers[0]._non_persistent_buffers_set == {"scale"}
    assert_replays(model, captured, batch(seed=4))


def test_labels_that_are_the_input_ids_at_capture_may_differ_later() -> None:
    def body(self, x, ids, labels):
        return last(self, self.layers[0](x) * ids[:, None] + labels[:, None])

    model = toy(body)
    same = torch.tensor([1, 2])
    captured = capture(model, batch(ids=same, labels=same))
    assert_replays(model, captured, batch(ids=same, labels=torch.tensor([5, 7])))


def test_random_module_without_parameters_is_placed_and_not_recomputed() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    def body(self, x):
        return last(self, self.layers[0](self.noise(x)))

    model = toy(body)
    model.noise = Noise()
    captured = capture(model, batch())
    nodes = [(node.op, node.target) for node in captured.programs[0].module.graph.nodes]
    assert ("call_module", "noise") in nodes


@pytest.mark.parametrize("own", [True, False])
def test_module_as_an_argument_of_another_one(own: bool) -> None:
    class Scaled(Layer):
        def forward(self, x: Tensor, other: nn.Module) -> Tensor:
            return self.linear(x) * other.weight.sum()

    other = nn.Linear(WIDTH, WIDTH)

    def body(self, x):
        h = self.layers[0](x, self.other if own else other)
        return {"loss": self.layers[1](h, other=self.other).square().mean()}

    model = toy(body, Scaled)
    model.other = nn.Linear(WIDTH, WIDTH)
    if not own:
        with pytest.raises(CaptureError, match="passes a Linear object from one block to the"):
            capture(model, batch())
        return
    captured = capture(model, batch())
    assert all("other.weight" in block.parameters for block in captured.graph.blocks[:2])
    assert_replays(model, captured, batch(seed=5))
    assert_trains_in_stages(model, batch(seed=6))
