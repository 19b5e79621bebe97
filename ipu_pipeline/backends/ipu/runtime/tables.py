"""Tables that compute in slices, or whose rows are on several IPUs.

Until :func:`restore` their ``forward`` is another one. Sliced tables keep their parameters and
names. PopART has a variable on one IPU, so a spread table's rows are parameters of their own, views
of the memory of its weight, which is no parameter until then: who reads or writes it has the rows'.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Part(NamedTuple):
    """Rows of a table that one block has.

    Attributes:
        block: Its name.
        rows: From the first to before the second.
        slices: In which it computes in training, and in evaluation.
        begin: Begins the block; ``None``: the call of its module did.
        checkpoint: Its result is kept for the backward pass.
    """

    block: str
    rows: Tuple[int, int]
    slices: Tuple[int, int] = (1, 1)
    begin: Optional[Callable[[], None]] = None
    checkpoint: bool = False


class _CutTable:
    """What the two kinds of tables have in common."""

    parts: List[Part]
    names: List[str]
    training: bool

    @property
    def is_whole(self) -> bool:
        """Whether it computes as it is, in this mode."""
        return len(self.parts) == 1 and self.parts[0].slices[not self.training] == 1

    def weight_of(self, number: int) -> Tensor:
        """Begin the block of a part and return its rows."""
        begin = self.parts[number].begin
        if begin is not None:
            begin()
        found: Tensor = getattr(self, self.names[number])
        return found

    def kept(self, number: int, value: Tensor) -> Tensor:
        """Return what a part computed, on a checkpoint where it has one."""
        if not self.parts[number].checkpoint:
            return value
        found: Tensor = _poptorch().recomputationCheckpoint(value)
        return found


class _CutLinear(_CutTable):
    """``forward`` of an ``nn.Linear`` whose product runs in parts of the output channels."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.is_whole:
            return functional.linear(x, self.weight, self.bias)
        products = [self._product(number, x) for number in range(len(self.parts))]
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
        return y if self.bias is None else y + self.bias

    def _product(self, number: int, x: Tensor) -> Tensor:
        weight, factor = self.weight_of(number), self.parts[number].slices[not self.training]
        if factor == 1:
            return self.kept(number, functional.linear(x, weight))
        poptorch = _poptorch()
        mode = poptorch.MatMulSerializationMode.OutputChannels
        return self.kept(number, poptorch.serializedMatMul(x, weight.t(), mode, factor))


class _CutEmbedding(_CutTable):
    """``forward`` of an ``nn.Embedding`` that looks up one slice of the rows after the other."""

    weight: Tensor
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        if self.is_whole:
            return functional.embedding(ids, self.weight, self.padding_idx)
        total: Tensor | None = None
        for number, part in enumerate(self.parts):
            weight, factor = self.weight_of(number), part.slices[not self.training]
            rows = weight.shape[0] // factor
            for start in range(0, weight.shape[0], rows):
                first = part.rows[0] + start
                found = sliced_lookup(ids, weight[start : start + rows], first, self.padding_idx)
                total = found if total is None else total + found
            assert total is not None
            total = self.kept(number, total)
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


def find_table(module: nn.Module, name: str) -> nn.Embedding | nn.Linear:
    """Return the table of ``module``: its embedding or linear layer with the most rows.

    Raises:
        ValueError: There is none, or it has an option that slices cannot keep.
    """
    tables = [part for part in module.modules() if isinstance(part, (nn.Embedding, nn.Linear))]
    if not tables:
        raise ValueError(
            f"block {name!r} is serialized, but has no embedding and no linear layer; set its "
            "factor to 1"
        )
    table = max(tables, key=lambda part: part.weight.shape[0])
    if isinstance(table, nn.Embedding) and (
        table.max_norm or table.sparse or table.scale_grad_by_freq
    ):
        raise ValueError(
            f"the embedding of {name!r} has max_norm, sparse or scaled gradients, which slices "
            "cannot keep; set its factor to 1"
        )
    return table


def cut(
    table: nn.Embedding | nn.Linear,
    parts: List[Part],
    made: Dict[Tuple[int, int], nn.Parameter],
) -> None:
    """Make ``table`` compute in parts; :func:`restore` undoes it.

    Args:
        table: The layer.
        parts: In the order of the rows.
        made: Parameters of the rows that other layers with the same weight have; completed.

    Raises:
        ValueError: The parts are not the table's rows, or slices do not divide one.
    """
    weight = table.weight
    _check_parts(parts, len(weight))
    changed: Any = table
    changed.parts, changed.names = parts, ["weight"]
    changed.parameters_before = dict(table._parameters)
    if len(parts) > 1:
        del table._parameters["weight"]
        changed.names = ["weight_{}_{}".format(*part.rows) for part in parts]
        for name, part in zip(changed.names, parts):
            if part.rows not in made:
                view = weight.detach()[part.rows[0] : part.rows[1]]
                made[part.rows] = nn.Parameter(view, requires_grad=weight.requires_grad)
            table.register_parameter(name, made[part.rows])
    behaviour = _CutEmbedding if isinstance(table, nn.Embedding) else _CutLinear
    own = type(table)
    changed.__class__ = type("Cut" + own.__name__, (behaviour, own), {"original": own})


def restore(table: Any) -> None:
    """Give ``table`` its own class and parameters back."""
    table.__class__ = type(table).original
    table._parameters.clear()
    table._parameters.update(table.parameters_before)
    del table.parts, table.names, table.parameters_before


def _check_parts(parts: List[Part], rows: int) -> None:
    ends = [0, *(part.rows[1] for part in parts)]
    if [part.rows[0] for part in parts] != ends[:-1] or ends[-1] != rows:
        raise ValueError(
            f"the table of {parts[0].block!r} has {rows} rows, its blocks have "
            f"{', '.join('{} to {}'.format(*part.rows) for part in parts)}; every row needs one"
        )
    for part in parts:
        size = part.rows[1] - part.rows[0]
        for factor in part.slices:
            if size % factor:
                divisors = [n for n in range(2, 65) if size % n == 0]
                raise ValueError(
                    f"serialization factor {factor} of {part.block!r} does not divide its {size} "
                    f"rows; divisors up to 64: {divisors or 'none'}; choose one, or pad the table"
                )


def _poptorch() -> Any:
    return importlib.import_module("poptorch")
