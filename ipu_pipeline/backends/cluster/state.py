"""Whole weights and checkpoints for ranks that each train a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipu_pipeline.backends.cluster.agreement import raise_together
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.ownership import Ownership, OwnParameters
from ipu_pipeline.checkpoint import read_checkpoint, restore_previous


def collect_weights(model: nn.Module, ownership: Ownership, groups: Groups) -> None:
    """Fill the model of every rank with the weights and buffers of those who train them."""
    distinct = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    for tensor in distinct.values():
        groups.from_position(tensor, ownership.owner(tensor))


def load(
    path: str | Path,
    *,
    model: nn.Module,
    own: OwnParameters | None,
    ownership: Ownership | None,
    groups: Groups,
) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint on every rank; each keeps the optimizer state of its own parameters.

    Returns:
        Steps tried when it was written, and its ``extra``.

    Raises:
        CheckpointError: On any rank: damaged, incomplete, newer, or of another model.
    """
    _repair(path, groups)
    error: Exception | None = None
    step, extra = 0, {}
    if own is not None:
        own.restore()
    try:
        optimizer = None if own is None else own.optimizer
        info = read_checkpoint(path, model=model, optimizer=optimizer, repair=False)
        step, extra = info.global_step, info.extra
    except Exception as problem:
        error = problem
    if own is not None and ownership is not None:
        own.keep(ownership)
    raise_together(groups, error)
    return step, extra


def own_parameters(model: nn.Module, ownership: Ownership) -> list[torch.nn.Parameter]:
    """Return the trainable parameters that this process holds, each once."""
    return [p for p in model.parameters() if p.requires_grad and ownership.is_held(p)]


def _repair(path: str | Path, groups: Groups) -> None:
    """Finish a replacement that was cut off, by one rank before any reads."""
    error: Exception | None = None
    try:
        if groups.layout.rank == 0:
            restore_previous(Path(path))
    except OSError as problem:
        error = problem
    raise_together(groups, error)
