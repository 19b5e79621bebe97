"""What a process has of tensors that are cut among several; the default: all of each."""

from __future__ import annotations

import torch
from torch import Tensor


class Slices:
    """Which slices of a model's tensors are here. This one: nothing is cut.

    Attributes:
        index: Of this process's slices, from 0.
        size: How many processes share a tensor.
    """

    index: int = 0
    size: int = 1

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


UNCUT = Slices()
