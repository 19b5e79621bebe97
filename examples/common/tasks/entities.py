"""Named entities in a sequence of tags, and how well two sequences agree about them.

An entity counts as found if its kind, its first and its last word agree, as in the CoNLL-2003
shared task (Tjong Kim Sang and De Meulder, section 3). Tags may be IOB1, IOB2, IOE or BIOES, or
plain kinds without prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "O"
Entity = tuple[str, int, int]


@dataclass(frozen=True)
class EntityScores:
    """Scores over all entities, 0 to 1.

    Attributes:
        precision: Share of the predicted entities that are right; 0 without any.
        recall: Share of the true entities that were found; 0 without any.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the kind, the first and the last word of every entity.

    An entity begins where ``B`` or ``S`` says so, behind ``E`` or ``S``, and where the kind
    changes: a sequence that breaks the rules is read as the scripts of the shared task read it.
    """
    found: set[Entity] = set()
    kind, start, before = OUTSIDE, 0, OUTSIDE
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, name = _parts(tag)
        begins = prefix in "BS" or before in "ES" or name != kind
        if kind != OUTSIDE and begins:
            found.add((kind, start, position - 1))
        if begins:
            start = position
        kind, before = name, prefix
    return found


def score_entities(
    predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]]
) -> EntityScores:
    """Compare the tags of all sentences."""
    right = guessed = true = 0
    for guess, gold in zip(predicted, expected, strict=True):
        mine, theirs = entities(guess), entities(gold)
        right, guessed, true = right + len(mine & theirs), guessed + len(mine), true + len(theirs)
    return EntityScores(right / guessed if guessed else 0.0, right / true if true else 0.0)


def _parts(tag: str) -> tuple[str, str]:
    """Split ``B-PER`` into its prefix and its kind; a tag without prefix continues its kind."""
    if tag == OUTSIDE:
        return OUTSIDE, OUTSIDE
    prefix, dash, name = tag.partition("-")
    return (prefix, name) if dash and prefix in "BIES" else ("I", tag)
