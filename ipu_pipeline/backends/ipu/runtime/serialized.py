"""Tables computed in slices, without changing what the model is.

The module keeps its parameters, its hooks and its names; only its ``forward`` is another one until
:func:`restore`.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class _SlicedLinear:
    """``forward`` of an ``nn.Linear`` whose product runs in slices of the output channels."""

    weight: Tensor
    bias: Tensor | None
    serialization_factor: int

    def forward(self, x: Tensor) -> Tensor:
        poptorch = importlib.import_module("poptorch")
        y: Tensor = poptorch.serializedMatMul(
            x,
            self.weight.t(),
            poptorch.MatMulSerializationMode.OutputChannels,
            self.serialization_factor,
        )
        return y if self.bias is None else y + self.bias


class _SlicedEmbedding:
    """``forward`` of an ``nn.Embedding`` that looks up one slice of the rows after the other."""

    weight: Tensor
    num_embeddings: int
    padding_idx: int | None
    serialization_factor: int

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.num_embeddings // self.serialization_factor
        total: Tensor | None = None
        for number in range(self.serialization_factor):
            first = number * rows
            part = sliced_lookup(ids, self.weight[first : first + rows], first, self.padding_idx)
            total = part if total is None else total + part
        assert total is not None
        return total


def sliced_lookup(ids: Tensor, rows: Tensor, first: int, padding_idx: int | None = None) -> Tensor:
    """Look up ``ids`` in ``rows``, the table's rows from ``first`` on; zeros for other ids."""
    inside = ((ids >= first) & (ids < first + rows.shape[0])).to(rows.dtype)
    local = (ids - first).clamp(0, rows.shape[0] - 1)
    padding = None if padding_idx is None else padding_idx - first
    if padding is not None and not 0 <= padding < rows.shape[0]:
        padding = None
    return functional.embedding(local, rows, padding) * inside.unsqueeze(-1)


def find_table(module: nn.Module, factor: int, name: str) -> nn.Embedding | nn.Linear:
    """Return the table of ``module``: its embedding or linear layer with the most rows.

    Raises:
        ValueError: There is none, it has an option that slices cannot keep, or ``factor`` does
            not divide its rows.
    """
    tables = [part for part in module.modules() if isinstance(part, (nn.Embedding, nn.Linear))]
    if not tables:
        raise ValueError(
            f"block {name!r} is serialized by {factor}, but has no embedding and no linear layer; "
            "set its factor to 1"
        )
    table = max(tables, key=lambda part: part.weight.shape[0])
    rows = table.weight.shape[0]
    if rows % factor:
        divisors = [n for n in range(2, 65) if rows % n == 0]
        raise ValueError(
            f"serialization factor {factor} of {name!r} does not divide its {rows} rows; divisors "
            f"up to 64: {divisors or 'none'}; choose one, or pad the table"
        )
    if isinstance(table, nn.Embedding) and (table.max_norm or table.sparse):
        raise ValueError(
            f"the embedding of {name!r} has max_norm or sparse gradients, which slices cannot "
            "keep; set its factor to 1"
        )
    return table


def serialize(table: nn.Embedding | nn.Linear, factor: int) -> None:
    """Make ``table`` compute in ``factor`` slices; :func:`restore` undoes it."""
    own = type(table)
    behaviour = _SlicedEmbedding if isinstance(table, nn.Embedding) else _SlicedLinear
    changed: Any = table
    changed.serialization_factor = factor
    changed.__class__ = type("Serialized" + own.__name__, (behaviour, own), {"original": own})


def restore(table: Any) -> None:
    """Give ``table`` its own class back."""
    table.__class__ = type(table).original
    del table.serialization_factor
