"""Which position of the pipeline holds which parameter and buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.targets.distributed.layout import Layout
from ipu_pipeline.targets.local.stage import Stage


@dataclass(frozen=True)
class Ownership:
    """Who holds what. What no stage uses belongs to the first position.

    Attributes:
        holders: Positions that use a parameter or buffer, ascending, by its ``id``; the first
            is its owner.
        position: Of this process.
    """

    holders: Mapping[int, tuple[int, ...]]
    position: int

    def owner(self, tensor: Tensor) -> int:
        """Return the position whose copy counts."""
        return self.holders.get(id(tensor), (0,))[0]

    def is_held(self, tensor: Tensor) -> bool:
        """Whether this process trains ``tensor``."""
        return self.position in self.holders.get(id(tensor), (0,))

    def shared(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the positions that hold ``tensor``, if there are several."""
        found = self.holders.get(id(tensor), (0,))
        return found if len(found) > 1 else ()


def find_ownership(stages: Sequence[Stage], layout: Layout) -> Ownership:
    """Return who holds what under a split."""
    positions: dict[int, set[int]] = {}
    for stage in stages:
        tensors: list[Tensor] = [share.table.parameter for share in stage.shares]
        for program in stage.programs:
            tensors += [*program.module.parameters(), *program.module.buffers()]
        for tensor in tensors:
            positions.setdefault(id(tensor), set()).add(layout.position_of(stage.index))
    return Ownership(
        {key: tuple(sorted(found)) for key, found in positions.items()}, layout.position
    )


class OwnParameters:
    """The user's optimizer, cut down to the parameters that this process holds.

    Args:
        optimizer: Over ``model.parameters()``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._all: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]

    def keep(self, ownership: Ownership) -> None:
        """Drop every parameter that is not held here, with its state."""
        for group, members in zip(self.optimizer.param_groups, self._all, strict=True):
            group["params"] = [p for p in members if ownership.is_held(p)]
            for parameter in members:
                if not ownership.is_held(parameter):
                    self.optimizer.state.pop(parameter, None)

    def restore(self) -> None:
        """Put all parameters back, without state."""
        for group, members in zip(self.optimizer.param_groups, self._all, strict=True):
            group["params"] = list(members)

    def groups(self) -> list[dict[str, Any]]:
        """Return the groups with all parameters, held here or not."""
        pairs = zip(self.optimizer.param_groups, self._all, strict=True)
        return [{**group, "params": list(members)} for group, members in pairs]

    def names_with_state(self, model: nn.Module) -> list[str]:
        """Return the parameters whose optimizer state is here."""
        return [name for name, p in model.named_parameters() if self.optimizer.state.get(p)]
