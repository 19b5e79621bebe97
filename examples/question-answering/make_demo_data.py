"""Write a small question-answering data set of invented facts, in SQuAD v1.1 format.

    python examples/question-answering/make_demo_data.py --output_dir out/demo_data

writes ``train.json`` and ``validation.json``: paragraphs of 3 to 7 sentences about 1 to 3
subjects, in random order, with sentences that answer nothing. The validation file is about other
subjects, and part of its wordings occur nowhere in the training file. The same seed and sizes
always write the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from string import Formatter
from typing import Annotated, Any

import typer
from demo_domains import Domain
from demo_domains_more import DOMAINS, FILLER_SLOTS, FILLERS
from demo_values import Split, Subject

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import make_folder, write_text

MIN_SENTENCES, MAX_SENTENCES = 3, 7
QUESTIONS_PER_PARAGRAPH = 4
PARAGRAPHS_PER_ARTICLE = 10
SAME_DOMAIN_SHARE = 0.7  # how often several subjects of a paragraph are of one kind
RIVAL_SHARE = 0.6  # how often the same is then told of both
UNSEEN_STATEMENT_SHARE = 0.3  # of the validation sentences
UNSEEN_QUESTION_SHARE = 0.3  # of the validation questions
UNIT = re.compile(r"^([\d,]+) [a-z]+$")


@dataclass(frozen=True)
class Fact:
    """A value somewhere in a sentence: what may be asked about.

    Attributes:
        subject: Whom the fact is about.
        domain: Where its questions are found.
        slot: Which of the domain's slots it fills.
        value: The answer.
        start: Character where the answer starts, counted from the start of the sentence.
    """

    subject: Subject
    domain: Domain
    slot: str
    value: str
    start: int


@dataclass(frozen=True)
class Sentence:
    """A sentence and the facts that it states."""

    text: str
    facts: tuple[Fact, ...] = ()


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Return ``template`` with its fields replaced, and where each of them starts."""
    text, starts = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            starts[field] = len(text)
            text += values[field]
    return text, starts


def fields_of(template: str) -> set[str]:
    """Return the names of the slots of a statement (without ``name`` and ``short``)."""
    found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    return found - {"name", "short"}


def describe(
    domain: Domain, subject: Subject, count: int, rivals: set[str], split: Split, rng: Random
) -> list[Sentence]:
    """Write up to ``count`` sentences about ``subject``; each slot has one value, told once.

    Slots in ``rivals`` were told of another subject of the same kind. They are preferred, so that
    a question cannot be answered by looking for the right kind of word.
    """
    values = {slot: sample(rng) for slot, sample in domain.slots.items()}
    values |= {"name": subject.name, "short": subject.short}
    seen = rng.sample(domain.statements, len(domain.statements))
    unseen = rng.sample(domain.unseen_statements, len(domain.unseen_statements))
    unseen = unseen if split == "validation" else []
    sentences: list[Sentence] = []
    told: set[str] = set()
    while len(sentences) < count and (seen or unseen):
        pool = unseen if unseen and rng.random() < UNSEEN_STATEMENT_SHARE else seen or unseen
        if rng.random() < RIVAL_SHARE:
            pool.sort(key=lambda text: not rivals & fields_of(text))
        template = pool.pop(0)
        slots = fields_of(template)
        if slots & told:
            continue
        told |= slots
        text, starts = fill(template, values)
        facts = (Fact(subject, domain, s, values[s], starts[s]) for s in sorted(slots))
        sentences.append(Sentence(text, tuple(facts)))
    return sentences


def filler(subjects: list[tuple[Domain, Subject]], rng: Random) -> Sentence:
    """Write a sentence that answers no question, about one of ``subjects`` or about nothing."""
    if rng.random() < 0.5:
        domain, subject = rng.choice(subjects)
        values = {"name": subject.name, "short": subject.short}
        return Sentence(fill(rng.choice(domain.asides), values)[0])
    values = {slot: sample(rng) for slot, sample in FILLER_SLOTS.items()}
    return Sentence(fill(rng.choice(FILLERS), values)[0])


def choose_subjects(split: Split, rng: Random) -> list[tuple[Domain, Subject]]:
    """Draw the one to three subjects of a paragraph; no two of them share a name or a word."""
    count = rng.choices((1, 2, 3), weights=(2, 5, 3))[0]
    domain, same = rng.choice(DOMAINS), rng.random() < SAME_DOMAIN_SHARE
    chosen: list[tuple[Domain, Subject]] = []
    while len(chosen) < count:
        of = domain if same else rng.choice(DOMAINS)
        subject = of.subject(rng, split)
        if all(subject.short != other.short for _, other in chosen):
            chosen.append((of, subject))
    return chosen


def write_sentences(split: Split, rng: Random) -> list[Sentence]:
    """Write the sentences of one paragraph, in random order, no value stated twice."""
    while True:
        subjects = choose_subjects(split, rng)
        count = {1: rng.randint(2, 4), 2: 2, 3: rng.randint(1, 2)}[len(subjects)]
        sentences: list[Sentence] = []
        for domain, subject in subjects:
            rivals = {f.slot for s in sentences for f in s.facts if f.domain is domain}
            sentences += describe(domain, subject, count, rivals, split, rng)
        low = max(0, MIN_SENTENCES - len(sentences))
        for _ in range(rng.randint(low, max(low, min(2, MAX_SENTENCES - len(sentences))))):
            extra = filler(subjects, rng)
            if extra.text not in {s.text for s in sentences}:
                sentences.append(extra)
        rng.shuffle(sentences)
        text = " ".join(s.text for s in sentences)
        values = [fact.value for s in sentences for fact in s.facts]
        if len(sentences) >= MIN_SENTENCES and all(text.count(value) == 1 for value in values):
            return sentences


def ask(fact: Fact, start: int, identifier: str, split: Split, rng: Random) -> dict[str, Any]:
    """Write one question; a held-out number with a unit may be answered without the unit."""
    *common, kept_back = fact.domain.questions[fact.slot]
    unseen = split == "validation" and rng.random() < UNSEEN_QUESTION_SHARE
    template = kept_back if unseen else rng.choice(common)
    question, _ = fill(template, {"name": fact.subject.name})
    answers = [{"text": fact.value, "answer_start": start}]
    number = UNIT.match(fact.value)
    if split == "validation" and number is not None:
        answers.append({"text": number.group(1), "answer_start": start})
    return {"id": identifier, "question": question, "answers": answers}


def write_paragraph(split: Split, first_id: int, limit: int, rng: Random) -> dict[str, Any]:
    """Write one paragraph with at most ``limit`` questions."""
    sentences = write_sentences(split, rng)
    context, placed = "", []
    for sentence in sentences:
        context += " " if context else ""
        placed += [(fact, len(context) + fact.start) for fact in sentence.facts]
        context += sentence.text
    asked = rng.sample(placed, min(len(placed), QUESTIONS_PER_PARAGRAPH, limit))
    qas = [ask(f, s, f"{split}-{first_id + i}", split, rng) for i, (f, s) in enumerate(asked)]
    return {"context": context, "qas": qas}


def paragraphs(split: Split, num_questions: int, rng: Random) -> Iterator[dict[str, Any]]:
    """Write paragraphs until they hold exactly ``num_questions`` questions."""
    done = 0
    while done < num_questions:
        paragraph = write_paragraph(split, done, num_questions - done, rng)
        done += len(paragraph["qas"])
        yield paragraph


def make_split(split: Split, num_questions: int, seed: int) -> dict[str, Any]:
    """Return the whole file of one split.

    Args:
        split: ``train`` or ``validation``.
        num_questions: How many questions it holds, at least 1.
        seed: The same seed, split and size give the same file.

    Raises:
        ValueError: ``num_questions`` is below 1.
    """
    if num_questions < 1:
        raise ValueError(f"the {split} file needs at least 1 question, got {num_questions}")
    rng = Random(f"{split}-{seed}")
    written = list(paragraphs(split, num_questions, rng))
    articles = [
        {
            "title": f"Demo_{split}_{start // PARAGRAPHS_PER_ARTICLE}",
            "paragraphs": written[start : start + PARAGRAPHS_PER_ARTICLE],
        }
        for start in range(0, len(written), PARAGRAPHS_PER_ARTICLE)
    ]
    return {"version": "1.1", "data": articles}


def main(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder of the two files.")
    ] = Path("out/demo_data"),
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 42,
    num_train: Annotated[int, typer.Option("--num_train", min=1, help="Questions.")] = 4000,
    num_validation: Annotated[
        int, typer.Option("--num_validation", min=1, help="Questions.")
    ] = 400,
) -> None:
    """Write train.json and validation.json of the demo data set."""
    make_folder("--output_dir", output_dir)
    sizes: tuple[tuple[Split, int], ...] = (("train", num_train), ("validation", num_validation))
    for split, size in sizes:
        path = output_dir / f"{split}.json"
        text = json.dumps(make_split(split, size, seed), indent=1, ensure_ascii=False)
        write_text(path, text + "\n")
        typer.echo(f"{path}: {size} questions")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")
