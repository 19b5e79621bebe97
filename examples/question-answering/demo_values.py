"""Values that the demo facts are filled with: names, places, numbers, dates.

Every function takes a ``random.Random`` and returns a string (or a subject), so that the same
seed writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

Split = Literal["train", "validation"]
Sampler = Callable[[Random], str]

# One of this many name pairs is kept for the validation file, so that its entities are unseen.
HELD_OUT_ONE_IN = 5

WORDS: dict[str, list[str]] = json.loads(Path(__file__).with_name("demo_words.json").read_text())
RIVER_PREFIXES = ("Upper", "Lower", "Little", "Great", "North", "South", "East", "West")
BATTLE_PLACES = ("Hill", "Creek", "Ford", "Pass", "Moor", "Cross")


@dataclass(frozen=True)
class Subject:
    """What a paragraph talks about: its full name and the shorter one used in passing."""

    name: str
    short: str


SubjectSampler = Callable[[Random, Split], Subject]


def _pair(rng: Random, split: Split, left: Sequence[str], right: Sequence[str]) -> tuple[str, str]:
    """Draw a pair of words that belongs to ``split``; the two splits share no pair."""
    while True:
        i, j = rng.randrange(len(left)), rng.randrange(len(right))
        held_out = (i + j) % HELD_OUT_ONE_IN == 0
        if held_out == (split == "validation"):
            return left[i], right[j]


def person(rng: Random, split: Split) -> Subject:
    """``Clara Morris``, in passing ``Morris``."""
    first, last = _pair(rng, split, WORDS["first_names"], WORDS["surnames"])
    return Subject(f"{first} {last}", last)


def company(rng: Random, split: Split) -> Subject:
    """``Heron Motors``, in passing ``Heron``."""
    word, trade = _pair(rng, split, WORDS["nature"], WORDS["trades"])
    return Subject(f"{word} {trade}", word)


def river(rng: Random, split: Split) -> Subject:
    """``Upper Calder River``, in passing ``Upper Calder``."""
    prefix, name = _pair(rng, split, RIVER_PREFIXES, WORDS["rivers"])
    return Subject(f"{prefix} {name} River", f"{prefix} {name}")


def vessel(rng: Random, split: Split) -> Subject:
    """``Silver Heron``, which is also its short name."""
    name = " ".join(_pair(rng, split, WORDS["colours"], WORDS["nature"]))
    return Subject(name, name)


def place_with(suffix: str) -> SubjectSampler:
    """Subjects such as ``Cold Raven Station``, in passing ``Cold Raven``."""

    def sample(rng: Random, split: Split) -> Subject:
        short = " ".join(_pair(rng, split, WORDS["colours"], WORDS["nature"]))
        return Subject(f"{short} {suffix}", short)

    return sample


def battle(rng: Random, split: Split) -> Subject:
    """``Battle of Nash Hill``, in passing ``Nash Hill``."""
    short = " ".join(_pair(rng, split, WORDS["surnames"], BATTLE_PLACES))
    return Subject(f"Battle of {short}", short)


def dish(rng: Random, split: Split) -> Subject:
    """``Palmer soup``: a dish called after a family."""
    name = " ".join(_pair(rng, split, WORDS["surnames"], WORDS["dishes"]))
    return Subject(name, name)


def one_of(words: Sequence[str]) -> Sampler:
    """Draw one of ``words``."""
    return lambda rng: rng.choice(words)


def two_of(words: Sequence[str]) -> Sampler:
    """Draw two different ``words``, joined by ``and``."""
    return lambda rng: " and ".join(rng.sample(words, 2))


def full_name(rng: Random) -> str:
    """Draw a first name and a surname."""
    return f"{rng.choice(WORDS['first_names'])} {rng.choice(WORDS['surnames'])}"


def year(low: int, high: int) -> Sampler:
    """Draw a year between ``low`` and ``high``."""
    return lambda rng: str(rng.randint(low, high))


def date(low: int, high: int) -> Sampler:
    """Draw a date in one of two spellings: ``14 March 1887`` or ``March 14, 1887``."""

    def sample(rng: Random) -> str:
        day, month, of_year = (
            rng.randint(1, 28),
            rng.choice(WORDS["months"]),
            rng.randint(low, high),
        )
        return rng.choice((f"{day} {month} {of_year}", f"{month} {day}, {of_year}"))

    return sample


def amount(low: int, high: int, unit: str, step: int = 1) -> Sampler:
    """Draw a number with thousands separators and its unit: ``1,240 kilometres``."""
    return lambda rng: f"{rng.randrange(low, high, step):,} {unit}"


def millions(rng: Random) -> str:
    """Draw a sum of money: ``$42.5 million`` or ``310 million euros``."""
    dollars = f"${rng.randint(11, 999) / 10:.1f} million"
    return rng.choice((dollars, f"{rng.randint(2, 950)} million euros"))
