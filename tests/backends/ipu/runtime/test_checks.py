"""What run.py finds out by running the model once on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.runtime.checks import BundleError, check_order


class _Model(nn.Module):
    """``positions`` is read, not called, as in Whisper of transformers 4."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(4, 2), nn.Embedding(3, 2)
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions.weight
        hidden = self.layer(hidden) + self.tokens(ids)
        return self.head(hidden)


def _blocks(**stages: int) -> list[dict[str, object]]:
    return [
        {"block": name, "module": name.split("__")[0], "stage": stage, "ipu": stage, "serialize": 1}
        for name, stage in stages.items()
    ]


def _check(blocks: list[dict[str, object]]) -> list[str]:
    model = _Model()
    modules = {str(b["module"]): getattr(model, str(b["module"])) for b in blocks}
    running = check_order(model, blocks, modules, {"ids": torch.zeros(1, 3, dtype=torch.long)})
    assert not any(module._forward_pre_hooks for module in modules.values())
    return [str(block["block"]) for block in running]


def test_a_module_that_is_only_read_goes_on_in_the_block_before_it() -> None:
    blocks = _blocks(tokens=0, positions=0, layer=1, tokens__again=2, head=2)
    assert _check(blocks) == ["tokens", "layer", "tokens__again", "head"]


def test_a_stage_in_which_nothing_runs() -> None:
    with pytest.raises(
        BundleError, match=r"'positions' does not run in the model's forward pass, and no other"
    ):
        _check(_blocks(tokens=0, positions=1, layer=2, tokens__again=3, head=3))


def test_a_second_call_in_an_earlier_stage() -> None:
    with pytest.raises(
        BundleError, match=r"'tokens' \(stage 0\) runs after 'layer' \(stage 1\); a later module"
    ):
        _check(_blocks(tokens=0, layer=1, head=1))
