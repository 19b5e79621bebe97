"""VQA accuracy: the share of people who agree with an answer, at most 1.

Source: Antol et al., VQA: Visual Question Answering, ICCV 2015, section 3: an answer that three or
more people gave is right, one of fewer people counts for a third each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PEOPLE = 3


@dataclass(frozen=True)
class VqaScores:
    """Mean scores over all questions, in percent.

    Attributes:
        accuracy: Mean weight of the chosen answers; for hard labels the share of right ones.
        constant_accuracy: The same for the best single answer to every question.
        total: Number of questions.
    """

    accuracy: float
    constant_accuracy: float
    total: int


def agreement(given: Sequence[str]) -> dict[str, float]:
    """Return the weight of every answer that people gave: ``min(1, count / 3)``."""
    return {answer: min(1.0, count / PEOPLE) for answer, count in Counter(given).items()}


def score_answers(weights: Sequence[Mapping[int, float]], chosen: Sequence[int]) -> VqaScores:
    """Score one chosen answer per question.

    Args:
        weights: For every question, the weight of each answer that is right at least in part.
        chosen: The number of the answer chosen for it.

    Raises:
        ValueError: There is no question, or not one answer for each.
    """
    if not weights or len(weights) != len(chosen):
        raise ValueError(
            f"{len(chosen)} chosen answers for {len(weights)} questions; choose one for each, and "
            "score at least one question"
        )
    totals: Counter[int] = Counter()
    for row in weights:
        for number, weight in row.items():
            totals[number] += weight  # type: ignore[assignment]  # a Counter adds floats as well
    earned = sum(row.get(number, 0.0) for row, number in zip(weights, chosen, strict=True))
    share = 100.0 / len(weights)
    return VqaScores(share * earned, share * max(totals.values(), default=0), len(weights))
