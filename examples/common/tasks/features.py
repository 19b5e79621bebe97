"""Encoded samples, and what every encoder of a task is given.

Sequences are padded to ``max_seq_length`` unless asked otherwise: captured graphs and IPUs want
one shape. Axes: ``N`` samples, ``L`` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ipu_pipeline.train.arguments import option
from tasks.labels import number_of

PACK_HELP = "Put several sequences into a row of --max_seq_length tokens; batch sizes count rows."
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TextOptions:
    """What every task can be told about its texts; the annotations are the options' help.

    Raises:
        ValueError: A length is below 4 tokens.
    """

    max_seq_length: int = option(default=128, help="Tokens of a sequence; longer ones are cut.")
    pad_to_max_length: bool = option(
        default=True,
        help="Pad to --max_seq_length (one shape for all batches), not to the longest of a batch.",
    )

    pack: bool = option(default=False, help=PACK_HELP)

    def __post_init__(self) -> None:
        if self.max_seq_length < 4:
            raise ValueError(f"max_seq_length must be at least 4, got {self.max_seq_length}")


@dataclass(frozen=True)
class Setup:
    """What turns samples into features.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        options: Those of the task.
        labels: Names of the classes; the index of a name is its number. Empty without classes.
        pair_label: What the model calls its label of a pair of sentences, if it has one.

    Raises:
        ValueError: The tokenizer is not a fast one, or takes fewer tokens.
    """

    tokenizer: Any
    options: Any
    labels: tuple[str, ...] = ()
    pair_label: str | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer, so it cannot say which "
                "word a token belongs to; use a model with a tokenizer.json"
            )
        if self.options.max_seq_length > self.tokenizer.model_max_length:
            raise ValueError(
                f"max_seq_length {self.options.max_seq_length} exceeds the "
                f"{self.tokenizer.model_max_length} tokens that the model takes; lower "
                "--max_seq_length"
            )

    def number_of(self, label: str, where: str) -> int:
        """Return the number of a class; see :func:`number_of`."""
        return number_of(label, self.labels, where)

    def tokenise(
        self, first: Sequence[Any], second: Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Return token ids and masks of texts or pairs of texts, cut and padded.

        Args:
            first: Texts, or lists of words with ``is_split_into_words``.
            second: The second text of every pair.
            **options: Further ones of the tokenizer's call.
        """
        length = self.options.max_seq_length
        if second is not None:
            first, second = map(self._shortened, (first, second))
        encoded = self.tokenizer(
            list(first),
            second,
            truncation=True,
            max_length=length,
            padding="max_length" if self.options.pad_to_max_length else False,
            **options,
        )
        cut = sum(bool(one.overflowing) for one in encoded.encodings)
        if cut:
            logger.warning(
                "%d of %d sequences are longer than max_seq_length %d and were cut",
                cut,
                len(encoded.encodings),
                length,
            )
        return encoded

    def _shortened(self, texts: Sequence[str]) -> list[str]:
        """Cut off of long texts what no pair keeps.

        Of two texts that are cut, tokenizers keep every pair of the pieces: of two long lines
        that are more than memory holds.
        """
        kept, length = list(texts), self.options.max_seq_length
        for index, text in enumerate(kept):
            if len(text) > 16 * length:
                options = {"truncation": True, "max_length": 2 * length}
                (one,) = self.tokenizer([text], add_special_tokens=False, **options).encodings
                if one.overflowing:
                    kept[index] = text[one.offsets[0][0] : one.offsets[-1][1]]
        return kept


class EncodedDataset(Dataset[dict[str, Any]]):
    """Encoded samples; an item is a dict of lists and numbers, as collators expect.

    Args:
        columns: Values of all samples by name: ``input_ids``, ``attention_mask``, ``labels``, ...

    Attributes:
        columns: The same.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample."""
        return {name: column[index] for name, column in self.columns.items()}
