"""A beginning and several endings, one of which is right; columns as in SWAG.

Zellers et al., SWAG, EMNLP 2018. Axes: ``N`` samples, ``C`` choices, ``L`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from ipu_pipeline.errors import DatasetError, shown
from ipu_pipeline.train.arguments import option
from tasks.features import EncodedDataset, Setup, TextOptions
from tasks.samples import Row, Rows, require

CONTEXT, START, ENDING = "sent1", "sent2", "ending"


@dataclass(kw_only=True)
class MultipleChoiceOptions(TextOptions):
    """Where the number of the right ending is."""

    label_column_name: str = option(
        default="label", help="Column of the right ending's number, from 0 on."
    )


def encode(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise a pair (context, start + ending) per choice: ``input_ids`` has axes ``NCL``.

    Raises:
        DatasetError: A column is missing or of the wrong kind, the rows differ in their number of
            choices, or no choice has the number of the label.
    """
    choices = _num_choices(rows)
    contexts, endings, labels = [], [], []
    for i, row in enumerate(rows):
        where = f"row {i}"
        context, start = require(row, CONTEXT, str, where), require(row, START, str, where)
        for choice in range(choices):
            ending = require(row, f"{ENDING}{choice}", str, where)
            contexts.append(context)
            endings.append(f"{start} {ending}".strip())
        labels.append(_right(row, setup.options.label_column_name, choices, where))
    encoded = setup.tokenise(contexts, endings)
    columns = {name: _grouped(column, choices) for name, column in encoded.items()}
    return EncodedDataset({**columns, "labels": labels})


def _num_choices(rows: Rows) -> int:
    """Return the number of choices, which all rows have in common."""

    def choices_of(row: Row) -> int:
        return len(list(takewhile(lambda i: f"{ENDING}{i}" in row, count())))

    numbers = {choices_of(row) for row in rows}
    if len(numbers) > 1 or min(numbers) < 2:
        found = ", ".join(map(str, sorted(numbers)))
        raise DatasetError(
            f"the rows have {found} choices; every one needs the same number of columns "
            f"{ENDING}0, {ENDING}1, ..., at least 2"
        )
    return numbers.pop()


def _right(row: Row, column: str, choices: int, where: str) -> int:
    value = require(row, column, (int, str), where)
    text = str(value)
    if not text.isdecimal() or len(text) > 9 or int(text) >= choices:
        raise DatasetError(
            f"{where}: {column!r} is {shown(value)}; it has to be a number from 0 to {choices - 1}"
        )
    return int(value)


def _grouped(column: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(column[i : i + size]) for i in range(0, len(column), size)]
