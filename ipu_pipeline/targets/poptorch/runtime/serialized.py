"""Tables computed in slices, without changing what the model is: the module keeps its parameters,
its hooks and its names; only its ``forward`` is another one until :func:`restore`.
"""

import importlib

from torch import nn
from torch.nn import functional


class _SlicedLinear:
    """``forward`` of an ``nn.Linear`` whose product runs in slices of the output channels."""

    def forward(self, x):
        poptorch = importlib.import_module("poptorch")
        y = poptorch.serializedMatMul(
            x,
            self.weight.t(),
            poptorch.MatMulSerializationMode.OutputChannels,
            self.serialization_factor,
        )
        return y if self.bias is None else y + self.bias


class _SlicedEmbedding:
    """``forward`` of an ``nn.Embedding`` that looks up one slice of the rows after the other."""

    def forward(self, ids):
        rows = self.num_embeddings // self.serialization_factor
        total = None
        for number in range(self.serialization_factor):
            first = number * rows
            part = sliced_lookup(ids, self.weight[first : first + rows], first, self.padding_idx)
            total = part if total is None else total + part
        return total


def sliced_lookup(ids, rows, first, padding_idx=None):
    """Return the rows of ``ids`` that lie in ``rows`` (those from ``first`` on), zeros elsewhere."""
    inside = ((ids >= first) & (ids < first + rows.shape[0])).to(rows.dtype)
    local = (ids - first).clamp(0, rows.shape[0] - 1)
    padding = None if padding_idx is None else padding_idx - first
    if padding is not None and not 0 <= padding < rows.shape[0]:
        padding = None
    return functional.embedding(local, rows, padding) * inside.unsqueeze(-1)


def find_table(module, factor, name):
    """Return the table of ``module``: its embedding or linear layer with the most rows.

    Raises:
        ValueError: There is none, it has an option that slices cannot keep, or ``factor`` does
            not divide its rows.
    """
    tables = [part for part in module.modules() if isinstance(part, (nn.Embedding, nn.Linear))]
    if not tables:
        raise ValueError(
            "block {!r} is serialized by {}, but has no embedding and no linear layer; set its "
            "factor to 1".format(name, factor)
        )
    table = max(tables, key=lambda part: part.weight.shape[0])
    rows = table.weight.shape[0]
    if rows % factor:
        divisors = [n for n in range(2, 65) if rows % n == 0]
        raise ValueError(
            "serialization factor {} of {!r} does not divide its {} rows; divisors up to 64: {}; "
            "choose one, or pad the table".format(factor, name, rows, divisors or "none")
        )
    if isinstance(table, nn.Embedding) and (table.max_norm or table.sparse):
        raise ValueError(
            "the embedding of {!r} has max_norm or sparse gradients, which slices cannot keep; set "
            "its factor to 1".format(name)
        )
    return table


def serialize(table, factor):
    """Make ``table`` (from :func:`find_table`) compute in ``factor`` slices; undo: :func:`restore`."""
    own = type(table)
    behaviour = _SlicedEmbedding if isinstance(table, nn.Embedding) else _SlicedLinear
    table.serialization_factor = factor
    table.__class__ = type("Serialized" + own.__name__, (behaviour, own), {"original": own})


def restore(table):
    """Give ``table`` its own class back."""
    table.__class__ = type(table).original
    del table.serialization_factor
