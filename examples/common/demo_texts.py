"""Demo texts of which one follows from another: reviews and claims, summaries, translations.

In the validation files, half of the words of English reviews never occur in training, and no pair
of nouns of translations does.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

UNSEEN_SHARE = 0.5  # how often a word of the validation file is one that training never has
NEUTRAL_SHARE = 0.33  # of the claims about something else
ABSENT_SHARE = 0.2  # of the questions about something that a review does not mention


def _read(name: str) -> Mapping[str, Any]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


TEXT = _read("demo_text.json")
GERMAN = _read("demo_german.json")
REVIEWS = {"en": TEXT["reviews"], "de": GERMAN["reviews"]}
_CLAIMS = {"en": "The {aspect} was good.", "de": "{aspect} war gut."}


class Reviewer:
    """Draws the words of reviews.

    Args:
        rng: Where they are drawn from.
        split: ``train`` or ``validation``.
        language: ``en`` or ``de``.
    """

    def __init__(self, rng: Random, split: str, language: str = "en") -> None:
        self.rng, self.words = rng, REVIEWS[language]
        self.unseen_share = UNSEEN_SHARE if split == "validation" else 0.0

    def draw(self, kind: str) -> str:
        """Return one of ``aspects``, ``positive``, ``negative`` or ``clauses``."""
        unseen = self.unseen_share and self.rng.random() < self.unseen_share
        found: str = self.rng.choice(self.words[f"held_out_{kind}" if unseen else kind])
        return found

    def clause(self, known: Container[str] = ()) -> tuple[str, str, bool]:
        """Return what is said of one thing, the thing, and whether it was liked.

        Nothing is said of a thing that is known.
        """
        rng, aspect = self.rng, self.draw("aspects")
        if aspect in known:
            return "", aspect, False
        liked, negated = rng.random() < 0.5, rng.random() < 0.25
        word = self.draw("positive" if liked != negated else "negative")
        template = rng.choice(self.words["negations"]) if negated else self.draw("clauses")
        return template.format(aspect=aspect, word=word), aspect, liked

    def review(self) -> tuple[str, dict[str, str]]:
        """Return a review of two or three things, and of each ``positive`` or ``negative``."""
        verdicts: dict[str, str] = {}
        clauses = []
        for _ in range(self.rng.choice((2, 3))):
            clause, aspect, liked = self.clause(verdicts)
            if clause:
                clauses.append(clause)
                verdicts[aspect] = "positive" if liked else "negative"
        text = clauses[0]
        for clause in clauses[1:]:
            text += self.rng.choice(self.words["links"]) + clause
        return text[0].upper() + text[1:] + ".", verdicts

    def asked(self, verdicts: Mapping[str, str]) -> str:
        """Return a thing of a review, or sometimes another one."""
        aspect = self.rng.choice(list(verdicts))
        # Nearly always of something that was not mentioned.
        return self.draw("aspects") if self.rng.random() < ABSENT_SHARE else aspect


def make_review(rng: Random, split: str) -> dict[str, Any]:
    """Return a review of several things, one thing, and whether it was liked."""
    reviewer = Reviewer(rng, split)
    text, verdicts = reviewer.review()
    asked = reviewer.asked(verdicts)
    label = verdicts.get(asked, "unmentioned")
    return {"sentence1": text, "sentence2": f"The {asked}", "label": label}


def make_sentiment(rng: Random, split: str) -> dict[str, Any]:
    """Return what a review says of one thing, and whether it was liked."""
    clause, _, liked = Reviewer(rng, split).clause()
    label = "positive" if liked else "negative"
    return {"sentence": clause[0].upper() + clause[1:] + ".", "label": label}


def make_claim(rng: Random, split: str) -> dict[str, Any]:
    """Return what a review says, in English or German, a claim, and whether it follows."""
    del split  # other reviews of the same words: few models know others in both languages
    language = rng.choice(list(_CLAIMS))
    reviewer = Reviewer(rng, "train", language)
    clause, aspect, liked = reviewer.clause()
    asked = reviewer.draw("aspects") if rng.random() < NEUTRAL_SHARE else aspect
    verdict = "entailment" if liked else "contradiction"
    premise, claim = (clause, _CLAIMS[language].format(aspect=asked))
    return {
        "language": language,
        "premise": premise[0].upper() + premise[1:] + ".",
        "hypothesis": claim[0].upper() + claim[1:],
        "label": verdict if asked == aspect else "neutral",
    }


def make_summary(rng: Random, split: str) -> dict[str, Any]:
    """Return a review, and in few words what was liked and what was not."""
    del split  # other reviews of the same words: a model without pretraining knows no others
    text, verdicts = Reviewer(rng, "train").review()
    parts = []
    for verdict, word in (("positive", "Good"), ("negative", "Bad")):
        if found := [aspect for aspect in verdicts if verdicts[aspect] == verdict]:
            parts.append(f"{word}: {', '.join(found)}.")
    return {"text": text, "summary": " ".join(parts)}


def make_translation(rng: Random, split: str) -> dict[str, Any]:
    """Return a sentence in English and in German."""
    nouns = [(*pair, gender) for gender, pairs in GERMAN["nouns"].items() for pair in pairs]
    while True:
        first, second = (rng.randrange(len(nouns)) for _ in range(2))
        if first != second and ((first + second) % 4 == 0) == (split == "validation"):
            break
    subject = _phrase(rng, nouns[first], "nominative")
    thing = _phrase(rng, nouns[second], "accusative")
    verb, adverb = rng.choice(GERMAN["verbs"]), rng.choice(GERMAN["adverbs"])
    if rng.random() < 0.5:  # what is said first, the verb follows in German
        english = [adverb[0], subject[0], verb[0], thing[0]]
        german = [adverb[1], verb[1], subject[1], thing[1]]
    else:
        english = [subject[0], verb[0], thing[0], adverb[0]]
        german = [subject[1], verb[1], adverb[1], thing[1]]
    return {"translation": {"en": _sentence(english), "de": _sentence(german)}}


def _phrase(rng: Random, noun: Sequence[str], case: str) -> tuple[str, str]:
    """Return a noun with its article and perhaps an adjective, in English and in German."""
    english, german, gender = noun
    article = GERMAN[case][gender]
    if rng.random() < 0.5:
        return f"the {english}", f"{article} {german}"
    adjective = rng.choice(GERMAN["adjectives"])
    ending = "en" if article == "den" else "e"
    return f"the {adjective[0]} {english}", f"{article} {adjective[1]}{ending} {german}"


def _sentence(words: Sequence[str]) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."
