"""Whole weights and whole checkpoints from ranks that each train a part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipu_pipeline.targets.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.targets.distributed.agreement import raise_together
from ipu_pipeline.targets.distributed.groups import Groups
from ipu_pipeline.targets.distributed.ownership import Ownership, OwnParameters


def collect_weights(model: nn.Module, ownership: Ownership, groups: Groups) -> None:
    """Fill the model of every rank with the weights and buffers of those who train them."""
    distinct = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    for tensor in distinct.values():
        groups.from_position(tensor, ownership.owner(tensor))


def save(
    path: str | Path,
    *,
    model: nn.Module,
    own: OwnParameters | None,
    ownership: Ownership | None,
    groups: Groups,
    global_step: int,
    extra: Mapping[str, Any] | None,
) -> Path:
    """Write one checkpoint of the unsplit model, by the first rank. Every rank calls this.

    Raises:
        CheckpointError: Something cannot be written as safetensors or JSON.
        OSError: The disk is full, or not writable. Earlier checkpoints are untouched.
    """
    if ownership is not None:
        collect_weights(model, ownership, groups)
    states = _optimizer_states(model, own, ownership, groups)
    error: Exception | None = None
    if groups.layout.rank == 0:
        try:
            with_all = None if own is None else _WholeOptimizer(own, model, states, ownership)
            try:
                write_checkpoint(
                    path,
                    model=model,
                    optimizer=None if own is None else own.optimizer,
                    global_step=global_step,
                    extra=extra,
                )
            finally:
                if with_all is not None:
                    with_all.undo()
        except Exception as problem:
            error = problem
    raise_together(groups, error)
    return Path(path)


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
    error: Exception | None = None
    step, extra = 0, {}
    if own is not None:
        own.restore()
    try:
        info = read_checkpoint(path, model=model, optimizer=None if own is None else own.optimizer)
        step, extra = info.global_step, info.extra
    except Exception as problem:
        error = problem
    if own is not None and ownership is not None:
        own.keep(ownership)
    raise_together(groups, error)
    return step, extra


def _optimizer_states(
    model: nn.Module, own: OwnParameters | None, ownership: Ownership | None, groups: Groups
) -> dict[str, dict[str, Any]]:
    """Return the whole optimizer state by parameter name, on the first rank."""
    if own is None or ownership is None:
        return {}
    mine = {
        name: _on_cpu(own.optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in own.optimizer.state and ownership.is_chief(parameter)
    }
    found: list[Any] | None = None
    if groups.layout.rank == 0:
        found = [None] * dist.get_world_size()
    groups.waiter.run(lambda: dist.gather_object(mine, found))
    return {name: state for part in found or [] for name, state in part.items()}


class _WholeOptimizer:
    """The optimizer with every parameter and all ranks' state, until :meth:`undo`."""

    def __init__(
        self,
        own: OwnParameters,
        model: nn.Module,
        states: Mapping[str, dict[str, Any]],
        ownership: Ownership | None,
    ) -> None:
        self._own, self._ownership = own, ownership
        own.restore()
        for name, parameter in model.named_parameters():
            if name in states and parameter not in own.optimizer.state:
                own.optimizer.state[parameter] = states[name]

    def undo(self) -> None:
        """Keep only what this process holds."""
        if self._ownership is not None:
            self._own.keep(self._ownership)


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}


def own_parameters(model: nn.Module, ownership: Ownership) -> list[torch.nn.Parameter]:
    """Return the trainable parameters that this process holds, each once."""
    return [p for p in model.parameters() if p.requires_grad and ownership.is_held(p)]
