"""Exact match and F1 between a predicted and the gold answers, as SQuAD v1.1 defines them.

Source: Rajpurkar et al., SQuAD, EMNLP 2016, section 6.1. One case is not fixed there: an answer
of nothing but articles and punctuation. It is then compared as the empty answer, and two empty
answers agree in both scores, as in transformers' ``squad_metrics`` and the v2.0 script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.question_answering.squad import SquadExample

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SHOWN_IDS = 3


@dataclass(frozen=True)
class SquadScores:
    """Mean scores over all questions, in percent.

    Attributes:
        exact_match: Share of predictions that equal a gold answer, 0 to 100.
        f1: Mean overlap of words with the best gold answer, 0 to 100.
        total: Number of questions.
    """

    exact_match: float
    f1: float
    total: int


def normalize_answer(text: str) -> str:
    """Lower the case; drop ASCII punctuation, then English articles; squeeze white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """Return 1 if both are the same after normalisation, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over the bags of normalised words."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    # 2PR / (P + R) with P = same / predicted and R = same / wanted.
    same = (Counter(predicted) & Counter(wanted)).total()
    return 2 * same / (len(predicted) + len(wanted))


def best_over_gold(
    score: Callable[[str, str], float], prediction: str, gold: Sequence[str]
) -> float:
    """Return the best score of ``prediction`` against any gold answer.

    Gold answers that normalise to nothing count only if there is no other one.
    """
    real = [text for text in gold if normalize_answer(text)] or [""]
    return max(score(prediction, text) for text in real)


def score_predictions(
    examples: Sequence[SquadExample], predictions: Mapping[str, str]
) -> SquadScores:
    """Score one prediction per example.

    Args:
        examples: Questions with their gold answers.
        predictions: Predicted text by example id.

    Raises:
        ValueError: There is no example, or a prediction is missing.
    """
    if not examples:
        raise ValueError("there is no example to score; pass at least one")
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        shown = ", ".join(map(repr, missing[:_SHOWN_IDS]))
        raise ValueError(
            f"{len(missing)} of {len(examples)} questions have no prediction (such as {shown}); "
            "predict every question, with an empty string where there is no answer"
        )

    def mean(score: Callable[[str, str], float]) -> float:
        best = (
            best_over_gold(score, predictions[e.id], [a.text for a in e.answers]) for e in examples
        )
        return 100.0 * sum(best) / len(examples)

    return SquadScores(mean(exact_match), mean(f1), len(examples))
