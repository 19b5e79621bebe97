"""Which position of the pipeline holds which parameter and buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.stages.stage import Stage


class Place(NamedTuple):
    """A process: which pipeline, and where in it. Places sort as ranks do."""

    replica: int
    position: int


@dataclass(frozen=True)
class Ownership:
    """Who holds what. What no stage uses belongs to the first position.

    Attributes:
        holders: Positions that use a parameter or buffer, ascending, by its ``id``; the first
            is its owner.
        here: This process.
        updaters: The one process that keeps the optimizer state of a parameter and updates it,
            by ``id``; empty: every holder in every replica does (``sharding.py``).
    """

    holders: Mapping[int, tuple[int, ...]]
    here: Place
    updaters: Mapping[int, Place] = field(default_factory=dict)

    def owner(self, tensor: Tensor) -> int:
        """Return the position whose copy counts."""
        return self.holders.get(id(tensor), (0,))[0]

    def is_held(self, tensor: Tensor) -> bool:
        """Whether this process trains ``tensor``."""
        return self.here.position in self.holders.get(id(tensor), (0,))

    def is_updated(self, tensor: Tensor) -> bool:
        """Whether this process keeps the optimizer state of ``tensor`` and updates it."""
        return self.is_chief(tensor) if self.updaters else self.is_held(tensor)

    def is_chief(self, tensor: Tensor) -> bool:
        """Whether this process alone counts where ``tensor`` must count once in the whole job."""
        return self.here == self.updaters.get(id(tensor), Place(0, self.owner(tensor)))

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
        {key: tuple(sorted(found)) for key, found in positions.items()},
        Place(layout.replica, layout.position),
    )


class OwnParameters:
    """The user's optimizer, cut down to the parameters that this process updates.

    Args:
        optimizer: Over ``model.parameters()``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._all: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        self._ids = {id(parameter) for members in self._all for parameter in members}

    def keep(self, ownership: Ownership) -> None:
        """Drop every parameter that is not updated here, with its state."""
        for group, members in zip(self.optimizer.param_groups, self._all, strict=True):
            group["params"] = [p for p in members if ownership.is_updated(p)]
            for parameter in members:
                if not ownership.is_updated(parameter):
                    self.optimizer.state.pop(parameter, None)

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether the user's optimizer has ``parameter``, and it is not frozen."""
        return id(parameter) in self._ids and parameter.requires_grad

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
