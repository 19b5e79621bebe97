"""Methods that read values to place text and images run whole, on the values of every batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from tests.capture.toys import WIDTH, Layer


class Placed(nn.Module):
    """Adds to every token its place among those that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def get_rope_index(self, mask: Tensor) -> Tensor:
        places = torch.zeros(mask.shape)
        for row, kept in enumerate(mask):
            places[row, kept.bool()] = torch.arange(float(sum(kept.tolist())))
        return places

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        places = self.get_rope_index(mask)
        h = self.layers[0](x + places.unsqueeze(-1))
        return {"loss": self.layers[1](h).square().mean(), "h": h}


def test_padding_may_change_from_batch_to_batch():
    torch.manual_seed(0)
    model = Placed()
    plain = copy.deepcopy(model)
    x = torch.randn(4, 5, WIDTH)
    masks = [torch.arange(5) < torch.tensor([[5], [3], [4], [1 + n]]) for n in range(3)]
    plan = ipp.plan(model, {"x": x[:2], "mask": masks[0][:2]}, num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        for mask in masks:
            batch = {"x": x, "mask": mask}
            expected = plain(**batch)["loss"].item()
            assert executable.forward_backward(batch) == pytest.approx(expected, rel=1e-6)
        assert executable._cache.captures <= 3
