"""What a process has of tensors that are cut among several; the default: all of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Slices:
    """Which slices of a model's tensors are here. This one: nothing is cut.

    Attributes:
        index: Of this process's slices, from 0.
        size: How many processes share a tensor.
    """

    index: int = 0
    size: int = 1

    def cut(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Cut the model's parameters, and what an optimizer keeps of them, where they are whole."""

    def install(self) -> None:
        """Let the model's modules run on slices."""

    def undo(self, optimizer: torch.optim.Optimizer | None, *, gather: bool) -> None:
        """Give the modules their own code back, and parameters and states their whole values.

        Without ``gather`` these stay slices, and the modules refuse to run.
        """

    @property
    def cuts(self) -> bool:
        """Whether any tensor of the job is cut."""
        return self.size > 1

    def writes(self, of: Tensor) -> bool:
        """Whether this process may write a tensor of which several have a part."""
        del of
        return True

    @contextmanager
    def whole_stand_ins(self) -> Iterator[None]:
        """Within it, what cannot run on slices has its whole shape, with values without meaning."""
        yield

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of whole tensors; all that share them call this."""
        return model.state_dict()

    def is_cut(self, tensor: Tensor) -> bool:
        """Whether a slice of a parameter is here, and not all of it."""
        del tensor
        return False

    def shape(self, tensor: Tensor) -> torch.Size:
        """Return the shape of a parameter or buffer as a whole."""
        return tensor.shape

    def part(self, of: Tensor, whole: Tensor) -> Tensor:
        """Return this process's slice of ``whole``, which is, or belongs to, the parameter ``of``.

        What is not of the parameter's shape (a step's number) is nothing to cut.
        """
        del of
        return whole

    def whole(self, of: Tensor, part: Tensor) -> Tensor:
        """Return all of what is, or belongs to, the parameter ``of``; all sharers call this."""
        del of
        return part

    def placeholder(self, of: Tensor) -> Tensor:
        """Return what transformers reads this process's slice of a parameter for."""
        return of

    def read(self, value: Tensor) -> Tensor:
        """Return this process's slice of what was read for a placeholder."""
        return value


UNCUT = Slices()
