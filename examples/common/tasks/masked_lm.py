"""Text whose tokens are hidden at random and guessed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.train.arguments import option
from tasks.features import EncodedDataset, Setup, TextOptions
from tasks.samples import TEXT_COLUMN, Rows, require


@dataclass(kw_only=True)
class MaskedTextOptions(TextOptions):
    """Where the text is, and how much of it is hidden.

    Raises:
        ValueError: The share is not within 0 and 1.
    """

    text_column_name: str | None = option(
        default=None, help="Column of the text; default: text, else the first column."
    )
    mlm_probability: float = option(default=0.15, help="Share of the tokens to guess.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(
                f"mlm_probability must be above 0 and at most 1, got {self.mlm_probability}"
            )


@dataclass(kw_only=True)
class MaskedLMOptions(MaskedTextOptions):
    """How the text is cut into sequences."""

    line_by_line: bool = option(
        default=False,
        help="Every line is a sequence; else the text is cut every --max_seq_length tokens.",
    )


def encode(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise lines, or cut the whole text into full sequences; a shorter rest is left out.

    Raises:
        DatasetError: A column is missing or of the wrong kind, or there is not enough text.
    """
    texts = texts_of(rows, text_column(rows, setup.options))
    if setup.options.line_by_line:
        return EncodedDataset(dict(setup.tokenise(texts)))
    length = setup.options.max_seq_length
    return cut_text(texts, setup.tokenizer, length, "--max_seq_length, or use --line_by_line")


def texts_of(rows: Rows, column: str) -> list[str]:
    """Return the texts of a column that are not blank.

    Raises:
        DatasetError: The column is missing or of the wrong kind, or there is no text.
    """
    texts = [require(row, column, str, f"row {i}") for i, row in enumerate(rows)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DatasetError(f"column {column!r} holds no text; pass a file with some")
    return texts


def text_column(rows: Rows, options: Any) -> str:
    """Return the column of the text."""
    if options.text_column_name is not None:
        return options.text_column_name
    return TEXT_COLUMN if TEXT_COLUMN in rows[0] else next(iter(rows[0]), TEXT_COLUMN)


def cut_text(texts: list[str], tokenizer: Any, length: int, option_name: str) -> EncodedDataset:
    """Join texts and cut them into sequences of ``length`` tokens; a shorter rest is left out.

    Args:
        texts: The texts.
        tokenizer: A tokenizer of transformers.
        length: Tokens of a sequence.
        option_name: What to lower where there is not enough text.

    Raises:
        DatasetError: The texts have fewer tokens than one sequence.
    """
    # Without verbose, no warning that a line is longer than the model's limit: it is cut below.
    encoded = tokenizer(texts, verbose=False)
    joined = {name: list(chain.from_iterable(column)) for name, column in encoded.items()}
    total = len(joined["input_ids"])
    if total < length:
        raise DatasetError(
            f"the text has {total} tokens, one sequence takes {length}; lower {option_name}"
        )
    starts = range(0, total - length + 1, length)
    return EncodedDataset({n: [c[i : i + length] for i in starts] for n, c in joined.items()})
