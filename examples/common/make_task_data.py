"""Write small data sets for the tasks of the scripts, from templates and invented names.

    python examples/common/make_task_data.py ner --output_dir out/demo_ner

writes ``train`` and ``validation`` files. The validation files need more than memory: their names
never occur in the training files, and part of their wordings, words or subjects neither. The same
task, seed and sizes always write the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from demo_texts import (
    TEXT,
    make_claim,
    make_review,
    make_sentiment,
    make_summary,
    make_translation,
)

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.files import make_folder, write_text

THEMES: Mapping[str, Sequence[str]] = TEXT["themes"]
SLOTS = {"per": "PER", "per2": "PER", "loc": "LOC", "loc2": "LOC", "org": "ORG"}
NUM_CHOICES = 4


def invent_name(rng: Random, split: str) -> str:
    """Return a name of one or two words; a word belongs to one split only."""
    words = []
    while not words or (len(words) < 2 and rng.random() < 0.3):
        first, middle, last = (
            rng.randrange(len(TEXT["names"][p])) for p in ("first", "middle", "last")
        )
        if ((first + middle + last) % 4 == 0) == (split == "validation"):
            parts = zip(("first", "middle", "last"), (first, middle, last), strict=True)
            words.append("".join(TEXT["names"][part][index] for part, index in parts))
    return " ".join(words)


def invent_names(rng: Random, split: str) -> dict[str, str]:
    """Return different names for all slots of a text."""
    while True:
        names = {slot: invent_name(rng, split) for slot in SLOTS}
        if len(set(names.values())) == len(names):
            return names


def choose_sentences(rng: Random, split: str, theme: str, count: int) -> list[str]:
    """Return templates of a theme in random order; its last two are for validation only."""
    known = THEMES[theme] if split == "validation" else THEMES[theme][:-2]
    return rng.sample(known, count)


def make_entities(rng: Random, split: str) -> dict[str, Any]:
    """Return a sentence or two as words, and tags of persons, places and organisations."""
    names = invent_names(rng, split)
    tokens: list[str] = []
    tags: list[str] = []
    for template in choose_sentences(rng, split, rng.choice(list(THEMES)), rng.choice((1, 2))):
        for piece in template.replace(".", " .").replace(",", " ,").split():
            slot = piece.strip("{}")
            words = names[slot].split() if slot in SLOTS else [piece]
            kind = SLOTS.get(slot)
            tokens += words
            tags += [f"{'I' if i else 'B'}-{kind}" if kind else "O" for i in range(len(words))]
    return {"tokens": tokens, "ner_tags": tags}


def make_choice(rng: Random, split: str) -> dict[str, Any]:
    """Return a beginning and four endings with the same names; one is about the same subject."""
    held_out = TEXT["held_out_themes"]
    themes = held_out if split == "validation" else [t for t in THEMES if t not in held_out]
    theme, *others = rng.sample(themes, NUM_CHOICES)
    names = invent_names(rng, split)
    first, second, ending = (s.format(**names) for s in rng.sample(THEMES[theme], 3))
    wrong = [rng.choice(THEMES[other]).format(**names) for other in others]
    label = rng.randrange(NUM_CHOICES)
    endings = [*wrong[:label], ending, *wrong[label:]]
    named = {f"ending{i}": text for i, text in enumerate(endings)}
    return {"sent1": f"{first} {second}", "sent2": "", **named, "label": label}


def make_story(rng: Random, split: str) -> dict[str, Any]:
    """Return the sentences of a story about one subject, with the same names throughout."""
    names = invent_names(rng, split)
    templates = choose_sentences(rng, split, rng.choice(list(THEMES)), rng.choice((4, 5, 6)))
    return {"sentences": [template.format(**names) for template in templates]}


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write an object per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a story per line."""
    return "".join(" ".join(row["sentences"]) + "\n" for row in rows)


def as_documents(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a sentence per line, and an empty line between stories."""
    return "\n".join("".join(s + "\n" for s in row["sentences"]) for row in rows)


@dataclass(frozen=True)
class Demo:
    """How the data of a task is made and written.

    Attributes:
        make: Makes one sample.
        write: Writes all of them.
        suffix: Of the files.
        num_train: Samples of the training file, unless said otherwise.
        vocabulary: At most so many tokens of a tokenizer of its own, for models without one.
    """

    make: Callable[[Random, str], dict[str, Any]]
    write: Callable[[Sequence[Mapping[str, Any]]], str]
    suffix: str
    num_train: int
    vocabulary: int = 0


DEMOS = {
    "classification": Demo(make_review, as_csv, "csv", 3000),
    "ner": Demo(make_entities, as_jsonl, "jsonl", 2000),
    "swag": Demo(make_choice, as_csv, "csv", 400),
    "sst2": Demo(make_sentiment, as_csv, "csv", 2000),
    "xnli": Demo(make_claim, as_csv, "csv", 6000, vocabulary=1000),
    "mlm": Demo(make_story, as_lines, "txt", 1500),
    "clm": Demo(make_story, as_lines, "txt", 1500, vocabulary=1000),
    "summarization": Demo(make_summary, as_jsonl, "jsonl", 4000, vocabulary=1000),
    "translation": Demo(make_translation, as_jsonl, "jsonl", 4000, vocabulary=1000),
    "pretraining": Demo(make_story, as_documents, "txt", 1500),
}


def make_rows(task: str, split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Return the samples of one split.

    Raises:
        ValueError: The task is unknown, or the size below 1.
    """
    if task not in DEMOS:
        raise ValueError(f"there is no demo data for {task!r}, only for {', '.join(DEMOS)}")
    if size < 1:
        raise ValueError(f"the {split} file needs at least 1 sample, got {size}")
    rng = Random(f"{task}-{split}-{seed}")
    return [DEMOS[task].make(rng, split) for _ in range(size)]


def make_split(task: str, split: str, size: int, seed: int) -> str:
    """Return the whole file of one split.

    Raises:
        ValueError: The task is unknown, or the size below 1.
    """
    rows = make_rows(task, split, size, seed)
    return DEMOS[task].write(rows)


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text of a sample."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(inner)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Return a tokenizer of pieces of these texts; every text ends with ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(DEMOS)}.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the two files.")],
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 42,
    num_train: Annotated[
        int | None, typer.Option("--num_train", min=1, help="Samples; default: enough to learn.")
    ] = None,
    num_validation: Annotated[int, typer.Option("--num_validation", min=1, help="Samples.")] = 200,
) -> None:
    """Write the train and validation files of one task."""
    make_folder("--output_dir", output_dir)
    train_size = num_train or DEMOS[task].num_train if task in DEMOS else 1
    for split, size in (("train", train_size), ("validation", num_validation)):
        text = make_split(task, split, size, seed)
        path = output_dir / f"{split}.{DEMOS[task].suffix}"
        write_text(path, text)
        typer.echo(f"{path}: {size} samples")
    if vocabulary := DEMOS[task].vocabulary:
        rows = make_rows(task, "train", train_size, seed)
        tokenizer = make_tokenizer(texts_of(rows), vocabulary)
        tokenizer.save_pretrained(output_dir)
        typer.echo(f"{output_dir}: a tokenizer of {len(tokenizer)} tokens")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (PipelineError, ValueError) as error:
        sys.exit(f"error: {error}")
