"""A list of words and a class for each of them, such as the names in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from ipu_pipeline.errors import DatasetError, shown
from ipu_pipeline.train.arguments import option
from tasks.features import EncodedDataset, Setup, TextOptions
from tasks.labels import class_name
from tasks.samples import Row, Rows, require

DEFAULT_COLUMNS = ("tokens", "ner_tags")


@dataclass(kw_only=True)
class TokenClassificationOptions(TextOptions):
    """Where the words and their classes are."""

    text_column_name: str | None = option(
        default=None, help="Column of the words; default: tokens, else the first column."
    )
    label_column_name: str | None = option(
        default=None, help="Column of the classes; default: ner_tags, else the second column."
    )


def encode(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise words; ``labels`` has a word's class at its first token, -100 everywhere else.

    Raises:
        DatasetError: A column is missing or of the wrong kind, or words and classes differ in
            number.
        ValueError: A class is unknown.
    """
    words = list(_words(rows, setup.options))
    encoded = setup.tokenise(words, is_split_into_words=True)
    labels = []
    for i, row in enumerate(rows):
        tags = _tags(row, setup.options, f"row {i}")
        if len(tags) != len(words[i]):
            raise DatasetError(
                f"row {i} has {len(words[i])} words and {len(tags)} labels; give every word one"
            )
        numbers = [setup.number_of(tag, f"row {i}") for tag in tags]
        labels.append(_at_word_starts(encoded.word_ids(i), numbers))
    return EncodedDataset({**encoded, "labels": labels})


def labels_of(rows: Rows, options: TokenClassificationOptions) -> Iterator[str]:
    """Yield the class of every word.

    Raises:
        DatasetError: A row has no list of classes.
    """
    for i, row in enumerate(rows):
        yield from _tags(row, options, f"row {i}")


def _at_word_starts(word_ids: Sequence[int | None], numbers: Sequence[int]) -> list[int]:
    """Spread the classes of words over tokens."""
    labels, previous = [], None
    for word in word_ids:
        starts = word is not None and word != previous
        labels.append(numbers[word] if starts and word is not None else IGNORED_LABEL)
        previous = word
    return labels


def _words(rows: Rows, options: TokenClassificationOptions) -> Iterator[list[str]]:
    for i, row in enumerate(rows):
        words = require(row, _column(row, options.text_column_name, 0), list, f"row {i}")
        if not words or not all(isinstance(word, str) for word in words):
            raise DatasetError(
                f"row {i} is not a list of words, but {shown(words)}; remove or split it"
            )
        yield words


def _tags(row: Row, options: TokenClassificationOptions, where: str) -> list[str]:
    column = _column(row, options.label_column_name, 1)
    return [class_name(tag, where) for tag in require(row, column, list, where)]


def _column(row: Row, named: str | None, position: int) -> str:
    """Return the column that was named, the usual one, or the one at ``position``."""
    usual = DEFAULT_COLUMNS[position]
    if named is not None or usual in row or len(row) <= position:
        return named or usual
    return list(row)[position]
