"""What goes into a model and its blocks, what comes out, and how blocks are named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import WIDTH, Layer, assert_replays, batch, last, toy


def test_tuple_and_tensor_outputs() -> None:
    def as_tuple(self, x):
        h = self.layers[1](self.layers[0](x))
        return h.sum(), h, (h, h), None

    model = toy(as_tuple)
    assert list(capture(model, batch()).results) == ["loss"]
    named = ["loss", "output_1", "output_2[0]", "output_2[1]"]
    assert list(capture(model.eval(), batch()).results) == named
    tensor = toy(lambda self, x: self.layers[1](self.layers[0](x))).eval()
    assert list(capture(tensor, batch()).results) == ["output"]
    with pytest.raises(CaptureError, match="returned no loss for the batch"):
        capture(tensor.train(), batch())


def test_dataclass_results_of_blocks() -> None:
    @dataclass
    class Both:
        h: Tensor
        parts: list[Tensor]

    class Wide(Layer):
        def forward(self, x: Tensor) -> Both:
            h = self.linear(x)
            return Both(h, [h * 2, {"deep": h * 3}])

    def body(self, x):
        out = self.layers[0](x)
        return {"loss": self.layers[1](out.h + out.parts[0] + out.parts[1]["deep"]).h.sum()}

    model = toy(body, Wide)
    captured = capture(model, batch())
    assert_replays(model, captured, batch(seed=2))


def test_none_and_plain_values_in_the_batch() -> None:
    def body(self, x, mask=None, scale=1.0, flags=()):
        h = self.layers[0](x) * scale
        return last(self, h if mask is None else h * mask)

    model = toy(body)
    captured = capture(model, batch(mask=None, scale=2.0, flags=[1, 2]))
    assert captured.inputs == ("x",)
    found = captured.run(batch(seed=1))["loss"]
    assert torch.equal(found, model(**batch(seed=1, scale=2.0))["loss"])


def test_layer_called_again_gets_a_number() -> None:
    def body(self, x):
        for _ in range(3):
            x = self.layers[0](x)
        return last(self, x)

    captured = capture(toy(body), batch())
    assert [p.name for p in captured.programs] == [
        "layers.0", "layers.0#2", "layers.0#3", "layers.1",
    ]  # fmt: skip
    assert captured.graph.tied_groups == (("layers.0", "layers.0#2", "layers.0#3"),)


def test_model_without_repeated_lists_is_cut_at_its_children() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.body(x).mean()}

    net = Net()
    captured = capture(net, batch())
    assert [p.name for p in captured.programs] == ["body.0", "body.2"]
    assert_replays(net, captured, batch(seed=1))
