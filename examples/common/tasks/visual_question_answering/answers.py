"""The answers that a model chooses from, and what the data says is right, hard or soft.

A label may be given as an answer's number or text (hard), as ``{"ids": [...], "weights": [...]}``,
as ``{answer text: weight}``, as one weight for each answer of the set, or as the texts that several
people answered; these are soft, and the last becomes weights by VQA's rule
(:func:`~tasks.visual_question_answering.metrics.agreement`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ipu_pipeline.errors import DatasetError, shown
from tasks.visual_question_answering.metrics import agreement

Answer = int | str
MOST_ANSWERS = 100_000
_T = TypeVar("_T", int, float)


@dataclass(frozen=True)
class GivenLabel:
    """What one row of the data says.

    Attributes:
        weights: Answers by number or text, each with its weight in [0, 1].
        soft: Several answers may be right, each by its weight.
        size: Number of answers in the set, where the label spells out all of them.
    """

    weights: Mapping[Answer, float]
    soft: bool
    size: int = 0


def read_label(value: Any, where: str) -> GivenLabel:
    """Read one label in any of the forms that the top of this file lists.

    Raises:
        DatasetError: It has none of these forms, too large a number, or a weight outside [0, 1].
    """
    given = _read(value, where)
    for answer, weight in given.weights.items():
        if isinstance(answer, int) and answer >= MOST_ANSWERS:
            raise DatasetError(
                f"{where}: answer {answer} is out of range; number answers from 0 to "
                f"{MOST_ANSWERS - 1} at most"
            )
        if not 0 <= weight <= 1:
            raise DatasetError(
                f"{where}: answer {shown(answer)} has weight {weight}; weights are between 0 and 1"
            )
    return given


def _read(value: Any, where: str) -> GivenLabel:
    value = _plain(value)
    if isinstance(value, int | str) and not isinstance(value, bool):
        return GivenLabel({value: 1.0}, soft=False)
    if isinstance(value, Mapping):
        return GivenLabel(_mapping(value, where), soft=True)
    if isinstance(value, list | tuple):
        if all(isinstance(entry, str) for entry in value):
            people: Mapping[Answer, float] = {a: w for a, w in agreement(value).items()}
            return GivenLabel(people, soft=True)
        if all(isinstance(entry, int | float) for entry in value):
            return GivenLabel(_dense(value), soft=True, size=len(value))
    raise DatasetError(
        f"{where}: a label of {type(value).__name__} is not understood ({shown(value)}); give "
        "the answer's number or text, {'ids': [...], 'weights': [...]}, {answer: weight}, one "
        "weight per answer, or a list of people's answers"
    )


def _plain(value: Any) -> Any:
    """Return arrays as lists, and all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _dense(value: Sequence[float]) -> dict[Answer, float]:
    return {number: float(weight) for number, weight in enumerate(value) if weight}


def _mapping(value: Mapping[str, Any], where: str) -> dict[Answer, float]:
    if set(value) != {"ids", "weights"}:
        # A table of all rows has an entry for every answer: None where a row does not name it.
        return {
            answer: _number(weight, float, where)
            for answer, weight in value.items()
            if weight is not None
        }
    ids, weights = (_plain(value[name]) for name in ("ids", "weights"))
    if not isinstance(ids, list | tuple) or not isinstance(weights, list | tuple):
        raise DatasetError(f"{where}: 'ids' and 'weights' of a label are lists, got {shown(value)}")
    if len(ids) != len(weights):
        raise DatasetError(f"{where}: {len(ids)} 'ids' but {len(weights)} 'weights' in the label")
    return {
        _number(number, int, where): _number(weight, float, where)
        for number, weight in zip(ids, weights, strict=True)
    }


def _number(value: Any, kind: type[_T], where: str) -> _T:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise DatasetError(f"{where}: {shown(value)} in a label is no number; give one")
    return kind(value)  # type: ignore[call-arg]


@dataclass(frozen=True)
class AnswerSet:
    """The answers of a head: number ``i`` is ``names[i]``."""

    names: tuple[str, ...]
    _numbers: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {name: i for i, name in enumerate(self.names)})

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def numbered(cls, size: int) -> AnswerSet:
        """Return a set without texts: answer 7 is called ``7``."""
        return cls(tuple(str(number) for number in range(size)))

    @classmethod
    def of_labels(cls, labels: Iterable[GivenLabel]) -> AnswerSet:
        """Return the answers that labels name: texts in alphabetical order, or all numbers."""
        labels = list(labels)
        named = {answer for label in labels for answer in label.weights}
        texts = {answer for answer in named if isinstance(answer, str)}
        if texts:
            return cls(tuple(sorted(texts)))
        sizes = [label.size for label in labels]
        numbers = [answer for answer in named if isinstance(answer, int)]
        return cls.numbered(max([*sizes, *(number + 1 for number in numbers)], default=0))

    def number(self, answer: Answer, where: str) -> int:
        """Return an answer's number.

        Raises:
            DatasetError: It is not in the set.
        """
        found = self._numbers.get(answer, -1) if isinstance(answer, str) else answer
        if not 0 <= found < len(self):
            raise DatasetError(
                f"{where}: answer {shown(answer)} is out of range, the model chooses from "
                f"{len(self)} answers ({shown(list(self.names))}); train with --replace_qa_head to "
                "give it the answers of the data"
            )
        return found


class Labels:
    """The right answers of all questions, sparse; dense rows are made when they are read.

    Attributes:
        weights: For every question its answers' numbers and weights.
        soft: Rows are weights of all answers (float32); else one answer's number (int64).
        num_answers: Size of the set.
    """

    def __init__(
        self, weights: Sequence[Mapping[int, float]], *, soft: bool, num_answers: int
    ) -> None:
        self.weights = weights
        self.soft = soft
        self.num_answers = num_answers

    @classmethod
    def of(cls, given: Sequence[GivenLabel], answers: AnswerSet, where: str) -> Labels:
        """Number the answers of ``given``.

        Args:
            given: One label per question.
            answers: The set.
            where: Names the data in messages.

        Raises:
            DatasetError: Hard and soft labels are mixed, an answer is not in the set, or a label
                gives weights to another number of answers.
        """
        kinds = {label.soft for label in given}
        if len(kinds) > 1:
            raise DatasetError(f"{where} mixes hard and soft labels; write all of them in one form")
        rows = []
        for i, label in enumerate(given):
            at = f"{where} row {i}"
            if label.size and label.size != len(answers):
                raise DatasetError(
                    f"{at}: the label has {label.size} weights, the model chooses from "
                    f"{len(answers)} answers; train with --replace_qa_head to give it those of "
                    "the data"
                )
            rows.append({answers.number(a, at): w for a, w in label.weights.items()})
        return cls(rows, soft=True in kinds, num_answers=len(answers))

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, row: int) -> Tensor:
        """Return what the loss reads: a number, or ``num_answers`` weights."""
        if not self.soft:
            return torch.tensor(next(iter(self.weights[row])))
        dense = torch.zeros(self.num_answers)
        for number, weight in self.weights[row].items():
            dense[number] = weight
        return dense
