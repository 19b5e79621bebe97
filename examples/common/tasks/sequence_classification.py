"""A text, or a pair of texts, and its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ipu_pipeline.errors import DatasetError, shown
from ipu_pipeline.train.arguments import option
from tasks.features import EncodedDataset, Setup, TextOptions
from tasks.labels import class_name
from tasks.samples import Rows, require

PAIR_COLUMNS = ("sentence1", "sentence2")


@dataclass(kw_only=True)
class SequenceClassificationOptions(TextOptions):
    """Where the texts and the class are."""

    text_column_names: str | None = option(
        default=None,
        help="One or two columns, as in 'premise,hypothesis'; default: sentence1 and sentence2, "
        "else the first one or two with text.",
    )
    label_column_name: str = option(default="label", help="Column of the class.")


def encode(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise texts or pairs; ``labels`` is the number of the class.

    Raises:
        DatasetError: A column is missing or of the wrong kind.
        ValueError: A class is unknown.
    """
    encoded = _tokenised(rows, setup)
    names = labels_of(rows, setup.options)
    numbers = [setup.number_of(name, f"row {i}") for i, name in enumerate(names)]
    return EncodedDataset({**encoded, "labels": numbers})


def encode_numbers(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise texts or pairs; ``labels`` is a number to predict.

    Raises:
        DatasetError: A column is missing or of the wrong kind.
    """
    encoded = _tokenised(rows, setup)
    column, numbers = setup.options.label_column_name, []
    for i, row in enumerate(rows):
        value = require(row, column, (int, float, str), f"row {i}")
        try:
            numbers.append(float(value))
        except ValueError as error:
            raise DatasetError(
                f"row {i} has label {shown(value)}; this task predicts numbers"
            ) from error
    return EncodedDataset({**encoded, "labels": numbers})


def labels_of(rows: Rows, options: SequenceClassificationOptions) -> Iterator[str]:
    """Yield the class of every row.

    Raises:
        DatasetError: A row has none.
    """
    for i, row in enumerate(rows):
        where = f"row {i}"
        yield class_name(require(row, options.label_column_name, object, where), where)


def _tokenised(rows: Rows, setup: Setup) -> Any:
    columns = _text_columns(rows, setup.options)
    texts = [
        [require(row, name, str, f"row {i}") for i, row in enumerate(rows)] for name in columns
    ]
    return setup.tokenise(*texts)


def _text_columns(rows: Rows, options: SequenceClassificationOptions) -> list[str]:
    """Return the one or two columns that hold texts."""
    if options.text_column_names is not None:
        names = [name.strip() for name in options.text_column_names.split(",")]
        if len(names) > 2:
            raise DatasetError(
                f"text_column_names names {len(names)} columns, a model takes a text or a pair of "
                "texts; name one or two"
            )
        return names
    if all(name in rows[0] for name in PAIR_COLUMNS):
        return list(PAIR_COLUMNS)
    label = options.label_column_name
    found = [name for name, v in rows[0].items() if isinstance(v, str) and name != label]
    if not found:
        raise DatasetError(
            f"row 0 has no column with text (it has {shown(list(rows[0]))}); say which by "
            "--text_column_names"
        )
    return found[:2]
