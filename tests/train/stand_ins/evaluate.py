"""In place of the package ``evaluate``, whose metrics are on the hub: one that needs no network."""

from __future__ import annotations

from difflib import SequenceMatcher
from statistics import fmean
from typing import Any


class Overlap:
    """How much of the words of texts, or how many of other values, are as they should be."""

    def compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        return {"score": fmean(map(_overlap, predictions, references))}


def load(*_: Any, **__: Any) -> Overlap:
    return Overlap()


def _overlap(found: Any, expected: Any) -> float:
    if isinstance(found, dict):  # an answer to a question
        found, expected = found["prediction_text"], expected["answers"]["text"]
    if isinstance(expected, list):
        expected = expected[0]
    if not isinstance(found, str):
        return float(found == expected)
    return SequenceMatcher(None, found.split(), expected.split()).ratio()
