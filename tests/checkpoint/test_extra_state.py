"""What modules' ``get_extra_state`` returns is kept, as JSON, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ipu_pipeline.backends.cluster.checkpoints import _refuse_extra_state
from ipu_pipeline.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.errors import CheckpointError


class Counted(nn.Linear):
    """A linear layer with a state of its own."""

    def __init__(self, state: Any) -> None:
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def model(state: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), Counted(state))


def write(path: Path, state: Any) -> nn.Module:
    found = model(state)
    write_checkpoint(path, model=found, optimizer=None, global_step=1)
    return found


@pytest.mark.parametrize("state", [{"steps": 3, "scales": [0.5, None]}, torch.arange(3)])
def test_it_comes_back(tmp_path: Path, state: Any):
    saved = write(tmp_path / "c", state)
    other = model(torch.zeros(1) if isinstance(state, torch.Tensor) else None)
    read_checkpoint(tmp_path / "c", model=other, optimizer=None)
    assert torch.equal(other[1].weight, saved[1].weight)
    same = torch.equal if isinstance(state, torch.Tensor) else lambda a, b: a == b
    assert same(other[1].state, state)


@pytest.mark.parametrize("state", [{1: 2}, (1, 2), {"a": {1}}, {"t": torch.ones(1)}])
def test_what_json_cannot_keep_is_refused(tmp_path: Path, state: Any):
    with pytest.raises(CheckpointError, match=r"1\._extra_state of Sequential cannot be kept in a"):
        write(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


def test_several_processes_refuse_it():
    with pytest.raises(CheckpointError, match=r"1\._extra_state \(get_extra_state\) is no tensor"):
        _refuse_extra_state(model({"steps": 3}))
    _refuse_extra_state(model(torch.ones(1)))
