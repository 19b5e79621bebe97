"""Sums of gradients whose parts are dense (projections) or sparse (lookups).

A lookup's gradient holds only the rows that were looked up. It is added in place into a dense
gradient, so that no second tensor as large as the table is made.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LookupLeaves:
    """Stand-ins of the tables that one microbatch looks up.

    A stand-in shares the table's memory but has a ``.grad`` of its own: there the lookups'
    gradient stays sparse. In the table's own, autograd would first add it to the dense gradient
    of a tied projection, which had to wait for it through the whole backward pass.
    """

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def of(self, table: nn.Parameter) -> Tensor:
        """Return the stand-in of ``table``, the same one every time; without gradients, itself."""
        if not (table.requires_grad and torch.is_grad_enabled()):
            return table
        if id(table) not in self._leaves:
            self._leaves[id(table)] = (table, table.detach().requires_grad_())
        return self._leaves[id(table)][1]

    def pairs(self) -> tuple[tuple[nn.Parameter, Tensor], ...]:
        """Return every table with its stand-in."""
        return tuple(self._leaves.values())


class GradientSum:
    """The sum of gradients of one parameter, its dense and its sparse part apart."""

    def __init__(self) -> None:
        self.dense: Tensor | None = None
        self.sparse: Tensor | None = None
        self._owned = False  # autograd may have given the first gradient to others too

    def add(self, gradient: Tensor) -> None:
        """Add one gradient."""
        if gradient.is_sparse:
            self.sparse = gradient if self.sparse is None else self.sparse + gradient
            if self.sparse._nnz() >= len(self.sparse):  # it would grow with every microbatch
                whole, self.sparse = self.sparse.to_dense(), None
                self.add(whole)
        elif self.dense is None:
            self.dense = gradient
        elif self._owned:
            self.dense += gradient
        else:
            self.dense = self.dense + gradient
            self._owned = True


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add ``gradient`` to ``parameter.grad``, which is dense afterwards.

    A new ``.grad`` has the parameter's strides, as autograd gives it: torch's fused optimizers
    read both as if they were one-dimensional.
    """
    if parameter.grad is not None:
        parameter.grad += gradient
    elif gradient.is_sparse:
        parameter.grad = torch.zeros_like(parameter).add_(gradient)
    elif gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad = gradient


@torch.no_grad()
def add_sums(parameter: nn.Parameter, sums: Iterable[GradientSum]) -> None:
    """Add ``sums`` to ``parameter.grad``: all dense parts in their order, then the sparse ones.

    The order is fixed, whatever the timing, so the last bit is too.
    """
    total = GradientSum()
    sums = tuple(sums)
    for part in (*(s.dense for s in sums), *(s.sparse for s in sums)):
        if part is not None:
            total.add(part)
    if total.dense is not None and total.sparse is not None and parameter.grad is None:
        parameter.grad = total.dense + total.sparse
        return
    for part in (total.dense, total.sparse):
        if part is not None:
            add_gradient(parameter, part)
