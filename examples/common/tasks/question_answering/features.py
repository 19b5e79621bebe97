"""Tokenised sliding windows over (question, context) pairs, all of one length.

Shapes are static (every window is padded to ``max_seq_length``), as IPUs and captured graphs need.
Axes: ``N`` windows, ``L`` tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.question_answering.squad import SquadExample

EXAMPLES_PER_CALL = 1000
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Where the tokens of one window come from.

    Attributes:
        example: Index of its example.
        first: Token index of its first context token.
        offsets_C2: Start and end character of each of its ``C`` context tokens.
    """

    example: int
    first: int
    offsets_C2: _Ints

    @property
    def stop(self) -> int:
        """Token index behind its last context token."""
        return self.first + len(self.offsets_C2)


class QuestionAnsweringDataset(Dataset[dict[str, Tensor]]):
    """The windows of all examples, in order; an item is a dict of tensors without batch axis.

    Attributes:
        tensors: ``input_ids``, ``attention_mask``, ``token_type_ids`` (if the tokenizer makes them)
            with shape ``NL``, ``start_positions`` and ``end_positions`` with shape ``N``; int64.
        windows: One per row, for the way back from tokens to text.
        examples: The examples that were tokenised.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        windows: Sequence[Window],
        examples: Sequence[SquadExample],
    ) -> None:
        """Keep the columns and their origin."""
        self.tensors = tensors
        self.windows = tuple(windows)
        self.examples = tuple(examples)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window."""
        return {name: column[index] for name, column in self.tensors.items()}


def build_features(
    examples: Sequence[SquadExample],
    tokenizer: Any,
    *,
    max_seq_length: int = 384,
    doc_stride: int = 128,
) -> QuestionAnsweringDataset:
    """Tokenise ``examples``; a context that does not fit gives several overlapping windows.

    The labels are the tokens of the first gold answer. In a window that does not hold all of it
    both labels are the CLS token (token 0 for tokenizers without one), as Devlin et al., BERT,
    NAACL 2019, train it.

    Args:
        examples: At least one.
        tokenizer: A fast tokenizer of transformers.
        max_seq_length: Tokens of a window: question, context and special tokens.
        doc_stride: Tokens by which neighbouring windows of one context overlap.

    Raises:
        ValueError: There is no example, the tokenizer is not a fast one, the length exceeds what
            the model takes, or a question leaves no room for more than ``doc_stride`` tokens.
    """
    _check(examples, tokenizer, max_seq_length)
    columns: dict[str, list[_Ints]] = {}
    windows: list[Window] = []
    for base in range(0, len(examples), EXAMPLES_PER_CALL):
        part = examples[base : base + EXAMPLES_PER_CALL]
        encoded = _tokenise(part, tokenizer, max_seq_length, doc_stride)
        windows.extend(_windows(encoded, base, context_id=_context_id(tokenizer)))
        for name, column in encoded.items():
            if name not in ("offset_mapping", "overflow_to_sample_mapping"):
                columns.setdefault(name, []).append(np.asarray(column, dtype=np.int64))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    cls_N = _cls_positions(arrays["input_ids"], tokenizer)
    labels = [_label(w, examples[w.example], int(c)) for w, c in zip(windows, cls_N, strict=True)]
    arrays["start_positions"], arrays["end_positions"] = np.array(labels, dtype=np.int64).T
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    return QuestionAnsweringDataset(tensors, windows, examples)


def _check(examples: Sequence[SquadExample], tokenizer: Any, max_seq_length: int) -> None:
    """Refuse what cannot be tokenised into windows."""
    if not examples:
        raise ValueError("there is no example to tokenise; pass at least one")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it cannot give character "
            "offsets; use a model with a tokenizer.json"
        )
    if max_seq_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length {max_seq_length} exceeds the {tokenizer.model_max_length} tokens "
            "that the model takes; lower --max_seq_length"
        )


def _context_id(tokenizer: Any) -> int:
    """Return which sequence is the context: the second, or the first where padding is left."""
    return 1 if tokenizer.padding_side == "right" else 0


def _tokenise(
    examples: Sequence[SquadExample], tokenizer: Any, max_seq_length: int, doc_stride: int
) -> Any:
    """Call the tokenizer once, after checking that every question leaves room for the context."""
    questions = [example.question.strip() for example in examples]
    contexts = [example.context for example in examples]
    lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
    room = max_seq_length - max(lengths) - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= doc_stride:
        longest = examples[int(np.argmax(lengths))]
        raise ValueError(
            f"max_seq_length {max_seq_length} leaves {max(room, 0)} tokens for the context of "
            f"question {longest.id!r} ({max(lengths)} tokens), but windows overlap by doc_stride "
            f"{doc_stride}; raise --max_seq_length or lower --doc_stride"
        )
    context_second = _context_id(tokenizer) == 1
    return tokenizer(
        questions if context_second else contexts,
        contexts if context_second else questions,
        truncation="only_second" if context_second else "only_first",
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def _windows(encoded: Any, base: int, context_id: int) -> Iterator[Window]:
    """Find the context tokens of every row."""
    offsets_NL2 = np.asarray(encoded["offset_mapping"], dtype=np.int64)
    for row, sample in enumerate(encoded["overflow_to_sample_mapping"]):
        ids = np.array([-1 if i is None else i for i in encoded.sequence_ids(row)])
        (tokens,) = np.nonzero(ids == context_id)
        first, stop = (int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0)
        yield Window(base + sample, first, offsets_NL2[row, first:stop].copy())


def _cls_positions(input_ids_NL: _Ints, tokenizer: Any) -> _Ints:
    """Return the CLS token's index in every row, 0 for tokenizers without one."""
    if tokenizer.cls_token_id is None:
        return np.zeros(len(input_ids_NL), dtype=np.int64)
    return np.argmax(input_ids_NL == tokenizer.cls_token_id, axis=1).astype(np.int64)


def _label(window: Window, example: SquadExample, cls_index: int) -> tuple[int, int]:
    """Return the first and last token of the answer, CLS twice when it is not all inside."""
    answer, offsets = example.answers[0], window.offsets_C2
    start, stop = answer.start, answer.start + len(answer.text)
    if not len(offsets) or start < offsets[0, 0] or stop > offsets[-1, 1]:
        return cls_index, cls_index
    first = int(np.searchsorted(offsets[:, 0], start, side="right")) - 1
    last = int(np.searchsorted(offsets[:, 1], stop, side="left"))
    return window.first + first, window.first + max(first, last)
