"""Every patch of torch and transformers still fits the installed versions."""

from __future__ import annotations

import pytest
from torch import nn

from ipu_pipeline.capture.patches import PATCHES, Patch
from tests.tiny_models import TINY


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_its_target_is_what_it_was_written_for(patch: Patch) -> None:
    assert not patch.broken()
    assert patch.reason
    assert patch.version.split()[0] in ("torch", "transformers")


def test_a_changed_target_is_named() -> None:
    def changed(first: int, third: int) -> int:
        return first + third

    patch = Patch("torch.x", "it does so", "torch 2.13", lambda: changed, ("first", "second"))
    assert patch.broken() == (
        "torch.x takes first, third, not first, second; written for torch 2.13: it does so"
    )
    gone = Patch("torch.y", "it does so", "torch 2.13", lambda: nn.Module.no_such_name)
    assert gone.broken().startswith("torch.y is gone (")
    number = Patch("torch.z", "it does so", "torch 2.13", lambda: 3)
    assert number.broken().startswith("torch.z cannot be called")


def test_patches_are_undone() -> None:
    from ipu_pipeline.capture import capture

    before = [patch.find() for patch in PATCHES]
    assert capture(*TINY["mixtral"].build(device="meta")).graph.blocks
    assert all(patch.find() is old for patch, old in zip(PATCHES, before, strict=True))
