"""What the demo data can say: ten domains of invented facts, each worded in several ways.

A statement is a sentence with ``{name}`` or ``{short}`` (the subject) and one or two slots; the
answer to a question is the text of one slot. ``unseen_`` wordings are used for validation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import demo_values as v


@dataclass(frozen=True)
class Domain:
    """One kind of subject and everything that can be said and asked about it.

    Attributes:
        name: Title of its articles.
        subject: Draws a subject of the given split.
        slots: Draws the value of every slot.
        statements: Sentences of both splits.
        unseen_statements: Sentences of the validation split only.
        questions: Per slot, its questions; the LAST one is kept for validation.
        asides: Sentences about the subject that answer no question.
    """

    name: str
    subject: v.SubjectSampler
    slots: Mapping[str, v.Sampler]
    statements: tuple[str, ...]
    unseen_statements: tuple[str, ...]
    questions: Mapping[str, tuple[str, ...]]
    asides: tuple[str, ...]


PEOPLE = Domain(
    name="People",
    subject=v.person,
    slots={
        "born": v.year(1820, 1985),
        "birthplace": v.one_of(v.WORDS["cities"]),
        "job": v.one_of(v.WORDS["jobs"]),
        "teacher": v.full_name,
        "moved": v.one_of(v.WORDS["countries"]),
    },
    statements=(
        "{name} was born in {born}.",
        "{name}, born in {birthplace} in {born}, was the youngest of five children.",
        "In {birthplace}, the family of {name} kept a small shop; the child was born there.",
        "{name} earned a living as a {job}.",
        "By profession {short} was a {job}.",
        "{name} studied under {teacher} for several years.",
        "It was {teacher} who taught {name}.",
        "{name} left home and settled in {moved}.",
        "After the war {name} moved to {moved} and stayed there.",
    ),
    unseen_statements=(
        "{born} was the year in which {name} came into the world.",
        "As a {job}, {name} became known far beyond the city.",
        "{teacher} was the most important teacher that {name} had.",
    ),
    questions={
        "born": (
            "When was {name} born?",
            "In what year was {name} born?",
            "What is the birth year of {name}?",
        ),
        "birthplace": (
            "Where was {name} born?",
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
        ),
        "job": (
            "What was the job of {name}?",
            "What did {name} do for a living?",
            "What was the profession of {name}?",
        ),
        "teacher": (
            "Who taught {name}?",
            "With whom did {name} study?",
            "Who was the teacher of {name}?",
        ),
        "moved": (
            "Where did {name} move?",
            "To which country did {name} move?",
            "In which country did {name} settle?",
        ),
    },
    asides=(
        "Letters from {short} are kept in a private collection.",
        "{short} disliked long speeches and said so.",
        "A street has been named after {name}.",
    ),
)

COMPANIES = Domain(
    name="Companies",
    subject=v.company,
    slots={
        "founded": v.year(1840, 1995),
        "founder": v.full_name,
        "city": v.one_of(v.WORDS["cities"]),
        "revenue": v.millions,
        "product": v.one_of(v.WORDS["products"]),
    },
    statements=(
        "{name} was founded in {founded} by {founder}.",
        "In {founded}, {founder} opened {name} with borrowed money.",
        "{founder} started {name} in a rented garage.",
        "The head office of {name} is in {city}.",
        "{name} is based in {city}.",
        "Last year {name} reported a revenue of {revenue}.",
        "With sales of {revenue}, {name} had its best year so far.",
        "{short} is best known for its {product}.",
        "{name} makes {product} for customers abroad.",
    ),
    unseen_statements=(
        "Since {founded}, when it was set up, {name} has changed owners twice.",
        "From its offices in {city}, {name} serves the whole region.",
        "Few people make better {product} than {name}.",
    ),
    questions={
        "founded": (
            "When was {name} founded?",
            "In which year was {name} founded?",
            "What year did {name} start?",
        ),
        "founder": ("Who founded {name}?", "Who started {name}?", "Who is the founder of {name}?"),
        "city": (
            "Where is {name} based?",
            "In which city is the head office of {name}?",
            "Where are the offices of {name}?",
        ),
        "revenue": (
            "What was the revenue of {name}?",
            "How much revenue did {name} report?",
            "How large were the sales of {name}?",
        ),
        "product": (
            "What does {name} make?",
            "What is {name} known for?",
            "Which products does {name} sell?",
        ),
    },
    asides=(
        "The staff of {short} may bring their dogs to work.",
        "Two rivals tried to buy {name} without success.",
        "The logo of {short} has never changed.",
    ),
)

RIVERS = Domain(
    name="Rivers",
    subject=v.river,
    slots={
        "length": v.amount(60, 2400, "kilometres"),
        "country": v.one_of(v.WORDS["countries"]),
        "mouth": v.one_of(v.WORDS["cities"]),
        "depth": v.amount(4, 80, "metres"),
    },
    statements=(
        "The {name} is {length} long.",
        "Over a length of {length}, the {name} crosses forests and farmland.",
        "The {name} rises in the hills of {country}.",
        "Most of the {name} lies in {country}, where it is used for transport.",
        "The {name} reaches the sea near {mouth}.",
        "Near {mouth} the {name} flows into a wide bay.",
        "At its deepest point the {name} measures {depth}.",
        "The {name} is up to {depth} deep.",
    ),
    unseen_statements=(
        "From source to sea the {name} covers {length}.",
        "{country} is the country where the {name} begins.",
        "Divers found that the {name} goes down to {depth}.",
    ),
    questions={
        "length": (
            "How long is the {name}?",
            "What is the length of the {name}?",
            "How many kilometres does the {name} cover?",
        ),
        "country": (
            "In which country does the {name} rise?",
            "In what country is the {name}?",
            "Where does the {name} begin?",
        ),
        "mouth": (
            "Near which city does the {name} reach the sea?",
            "Where does the {name} flow into the sea?",
            "Which city is at the mouth of the {name}?",
        ),
        "depth": (
            "How deep is the {name}?",
            "What is the depth of the {name}?",
            "How far down does the {name} go?",
        ),
    },
    asides=(
        "Anglers visit the {name} in spring.",
        "Floods of the {short} are rare but severe.",
        "Several songs mention the {name}.",
    ),
)

BATTLES = Domain(
    name="Battles",
    subject=v.battle,
    slots={
        "date": v.date(1610, 1910),
        "winner": v.full_name,
        "soldiers": v.amount(1500, 60000, "soldiers", 100),
        "duration": v.amount(2, 30, "hours"),
    },
    statements=(
        "The {name} was fought on {date}.",
        "On {date} the armies met in the {name}.",
        "The {name} was won by General {winner}.",
        "General {winner} claimed victory in the {name}.",
        "More than {soldiers} took part in the {name}.",
        "The {name} involved {soldiers} on both sides.",
        "Fighting at {short} lasted {duration}.",
        "The {name} was over after {duration}.",
    ),
    unseen_statements=(
        "Historians date the {name} to {date}.",
        "Victory in the {name} went to {winner}.",
        "It took {duration} to decide the {name}.",
    ),
    questions={
        "date": (
            "When was the {name} fought?",
            "On what date was the {name}?",
            "On which day did the {name} take place?",
        ),
        "winner": (
            "Who won the {name}?",
            "Which general won the {name}?",
            "Who was the victor of the {name}?",
        ),
        "soldiers": (
            "How many soldiers took part in the {name}?",
            "How many soldiers fought in the {name}?",
            "How large were the armies in the {name}?",
        ),
        "duration": (
            "How long did the {name} last?",
            "After how many hours was the {name} over?",
            "For how long did the armies fight in the {name}?",
        ),
    },
    asides=(
        "Rain had turned the roads around {short} to mud.",
        "A stone cross marks the site of the {name}.",
        "Painters have often shown the {name}.",
    ),
)

RECIPES = Domain(
    name="Recipes",
    subject=v.dish,
    slots={
        "ingredient": v.two_of(v.WORDS["ingredients"]),
        "time": v.amount(12, 180, "minutes"),
        "heat": v.amount(120, 260, "degrees", 5),
        "origin": v.one_of(v.WORDS["countries"]),
    },
    statements=(
        "{name} is made with {ingredient}.",
        "Cooks prepare {name} from {ingredient}.",
        "{name} has to cook for {time}.",
        "After {time} on the stove, {name} is ready.",
        "The oven for {name} is heated to {heat}.",
        "At {heat}, {name} turns brown on top.",
        "{name} comes from {origin}.",
        "Sailors brought {name} home from {origin}.",
    ),
    unseen_statements=(
        "No {name} is complete without {ingredient}.",
        "{time} are enough to cook {name}.",
        "People in {origin} were the first to eat {name}.",
    ),
    questions={
        "ingredient": (
            "What is {name} made with?",
            "What are the ingredients of {name}?",
            "What goes into {name}?",
        ),
        "time": (
            "How long does {name} cook?",
            "How many minutes does {name} have to cook?",
            "How much time does {name} need?",
        ),
        "heat": (
            "At what temperature is {name} baked?",
            "How hot is the oven for {name}?",
            "To how many degrees is the oven heated for {name}?",
        ),
        "origin": (
            "Where does {name} come from?",
            "From which country does {name} come?",
            "What is the origin of {name}?",
        ),
    },
    asides=(
        "{name} is often served on Sundays.",
        "Children either love or hate {name}.",
        "Leftovers of {name} taste even better.",
    ),
)
