"""Masked text in pairs of segments: does the second follow the first?

As Devlin et al., BERT, NAACL 2019, section 3.1 and appendix A.2, make their data: consecutive
sentences of a document fill a sequence and are split at a random sentence; in half of the pairs
the second segment is then taken from another document. Models that are asked for the order of two
segments instead (Lan et al., ALBERT, ICLR 2020, section 3.1) get both in the wrong order.

The pairs depend on the text alone, so they are the same in every run; what is masked changes from
step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ipu_pipeline.capture.example_batch import SENTENCE_ORDER_LABEL
from ipu_pipeline.errors import DatasetError
from ipu_pipeline.train.arguments import option
from tasks.features import EncodedDataset, Setup
from tasks.masked_lm import MaskedTextOptions, text_column
from tasks.samples import Rows, require

FOLLOWS, DOES_NOT = 0, 1  # the numbers that BERT and ALBERT give them


@dataclass(kw_only=True)
class PretrainingOptions(MaskedTextOptions):
    """How segments are paired.

    Raises:
        ValueError: A share is not within 0 and 1.
    """

    nsp_probability: float = option(
        default=0.5, help="Share of the pairs that do not follow each other."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.nsp_probability <= 1:
            raise ValueError(f"nsp_probability must be within 0 and 1, got {self.nsp_probability}")


@dataclass(frozen=True)
class Sentence:
    """A sentence and the number of its tokens."""

    text: str
    num_tokens: int


Document = Sequence[Sentence]


def encode(rows: Rows, setup: Setup) -> EncodedDataset:
    """Tokenise pairs of segments; the label of the pair is under the name that the model has.

    A row is a sentence, and an empty one ends a document; or a row is a list of sentences, a whole
    document.

    Raises:
        DatasetError: A column is missing or of the wrong kind, or there are not enough documents.
        ValueError: The model learns nothing about pairs.
    """
    if setup.pair_label is None:
        raise ValueError(
            "this model learns nothing about pairs of sentences; use the task masked-lm"
        )
    options = setup.options
    texts = [document for document in _documents(rows, options) if document]
    if len(texts) < 2 or not any(len(document) > 1 for document in texts):
        raise DatasetError(
            f"the text has {len(texts)} documents, at least 2 are needed and one of 2 sentences; "
            "write a sentence per line and an empty line between documents"
        )
    documents = _measured(texts, setup)
    swaps = setup.pair_label == SENTENCE_ORDER_LABEL
    room = options.max_seq_length - setup.tokenizer.num_special_tokens_to_add(pair=True)
    pairs = [
        pair
        for index in range(len(documents))
        for pair in _pairs(documents, index, room, options.nsp_probability, swaps=swaps)
    ]
    encoded = setup.tokenise([first for first, _, _ in pairs], [second for _, second, _ in pairs])
    return EncodedDataset({**encoded, setup.pair_label: [label for _, _, label in pairs]})


def _documents(rows: Rows, options: PretrainingOptions) -> Iterator[list[str]]:
    """Yield the sentences of every document."""
    column = text_column(rows, options)
    current: list[str] = []
    for i, row in enumerate(rows):
        value = require(row, column, (str, list), f"row {i}")
        if isinstance(value, list):
            for sentence in value:
                if not isinstance(sentence, str):
                    kind = type(sentence).__name__
                    raise DatasetError(
                        f"row {i}: {column!r} lists a {kind}; write a document as a list of texts"
                    )
            yield [sentence for sentence in value if sentence.strip()]
        elif value.strip():
            current.append(value)
        else:
            yield current
            current = []
    yield current


def _measured(texts: Sequence[Sequence[str]], setup: Setup) -> list[Document]:
    """Count the tokens of every sentence."""
    flat = [sentence for document in texts for sentence in document]
    ids = setup.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"]
    sentences = iter([Sentence(text, len(tokens)) for text, tokens in zip(flat, ids, strict=True)])
    return [[next(sentences) for _ in document] for document in texts]


def _pairs(
    documents: Sequence[Document], index: int, room: int, share: float, *, swaps: bool
) -> Iterator[tuple[str, str, int]]:
    """Yield the pairs whose first segment is of one document, each with its label.

    Args:
        documents: All of them.
        index: Which one.
        room: Tokens of both segments.
        share: Of pairs that do not follow each other.
        swaps: Such a pair is the right one in the wrong order; else its second segment is of
            another document.
    """
    rng, document, start = Random(index), documents[index], 0
    while start < len(document) - 1:
        stop = _fill(document, start, room, at_least=2)
        middle = rng.randrange(start + 1, stop)
        first, second = document[start:middle], document[middle:stop]
        label = DOES_NOT if rng.random() < share else FOLLOWS
        if label == DOES_NOT and swaps:
            first, second = second, first
        elif label == DOES_NOT:
            second = _elsewhere(documents, index, room - sum(s.num_tokens for s in first), rng)
            stop = middle  # the sentences that were replaced begin the next pair
        yield _text(first), _text(second), label
        start = stop


def _elsewhere(documents: Sequence[Document], index: int, room: int, rng: Random) -> Document:
    """Return consecutive sentences of another document."""
    other = rng.randrange(len(documents) - 1)
    document = documents[other + (other >= index)]
    start = rng.randrange(len(document))
    return document[start : _fill(document, start, room, at_least=1)]


def _fill(document: Document, start: int, room: int, *, at_least: int) -> int:
    """Return where the sentences that fit into ``room`` tokens end."""
    stop, used = start, 0
    while stop < len(document) and (
        stop - start < at_least or used + document[stop].num_tokens <= room
    ):
        used += document[stop].num_tokens
        stop += 1
    return stop


def _text(sentences: Document) -> str:
    return " ".join(sentence.text for sentence in sentences)
