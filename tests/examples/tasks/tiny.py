"""A tiny tokenizer, tiny models and tiny samples for every task of the table."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ipu_pipeline.capture.example_batch import pair_label
from ipu_pipeline.train import TrainingArguments
from ipu_pipeline.train.data import Collator, build_collator
from tasks.features import EncodedDataset, Setup
from tasks.labels import choose_classes, label_config
from tasks.table import TASKS, Task

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(12)] + ["good", "bad", "thanks", "mr", "in", ".", ","]
LETTERS = [chr(c) for c in range(97, 123)] + [str(i) for i in range(10)]
NAMES = [f"{a}{b}" for a in "bcdfg" for b in "aeiou"]  # two letters each: two tokens
PIECES = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
ENCODER = {
    "vocab_size": len(PIECES),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # with 0.02, so small a model learns nothing for many steps
}
BERT = transformers.BertConfig
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer; words that it does not know fall into letters."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{piece[1:-1].lower()}_token": piece for piece in SPECIAL}
    given = {
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask", "token_type_ids"],
        **names,
        **options,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def make_rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return samples of ``task`` that a tiny model learns in seconds: their order tells nothing."""
    rng = Random(f"{task} {seed}")
    return [row for _ in range(count) for row in _MAKERS[task](rng)]


def _words(rng: Random, count: int) -> list[str]:
    return [rng.choice(WORDS[:12]) for _ in range(count)]


def _classification(rng: Random) -> list[dict[str, Any]]:
    label = rng.choice(("bad", "good"))
    words = _words(rng, rng.randint(2, 6))
    words.insert(rng.randrange(len(words)), label)
    return [{"sentence1": " ".join(words), "sentence2": "w1 w2", "label": label}]


def _tokens(rng: Random) -> list[dict[str, Any]]:
    """Return words and one name, whose kind another word of the sentence tells."""
    kind = rng.choice(("PER", "LOC"))
    words = _words(rng, 4)
    words.insert(rng.randrange(5), "mr" if kind == "PER" else "in")
    at = rng.randrange(6)
    words.insert(at, rng.choice(NAMES))
    tags = ["O"] * 6
    tags[at] = f"B-{kind}"
    return [{"tokens": words, "ner_tags": tags}]


def _choices(rng: Random) -> list[dict[str, Any]]:
    endings = [" ".join(_words(rng, 3)) for _ in range(3)]
    label = rng.randrange(3)
    endings[label] += " thanks"
    row: dict[str, Any] = {"sent1": " ".join(_words(rng, 2)), "sent2": "w3", "label": label}
    return [row | {f"ending{i}": ending for i, ending in enumerate(endings)}]


def _text(rng: Random) -> list[dict[str, Any]]:
    """Return a line of one word, so that a hidden token is any other of the line."""
    return [{"text": " ".join([rng.choice(WORDS[:12])] * rng.randint(6, 9))}]


def _story(rng: Random) -> list[dict[str, Any]]:
    return [_text(rng)[0]] * rng.randint(2, 3) + [{"text": ""}]


_MAKERS = {
    "sequence-classification": _classification,
    "token-classification": _tokens,
    "multiple-choice": _choices,
    "masked-lm": _text,
    "pretraining": _story,
}
OPTIONS: dict[str, dict[str, Any]] = {"masked-lm": {"line_by_line": True}}


@dataclass(frozen=True)
class Tiny:
    """A task with its data, ready to train."""

    task: Task
    model: Any
    setup: Setup
    train: EncodedDataset
    collate: Collator

    def encode(self, count: int, seed: int) -> EncodedDataset:
        return self.task.encode(make_rows(self.task.name, count, seed), self.setup)

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return dict(self.collate([self.train[i] for i in range(size)]))


def build(name: str, config_class: Any = BERT, *, count: int = 24, **changes: Any) -> Tiny:
    """Return a tiny model of ``config_class`` and encoded samples."""
    task = TASKS[name]
    options = task.options(**{"max_seq_length": 24, **OPTIONS.get(name, {})})
    rows = make_rows(name, count)
    classes = ()
    if task.labels_of is not None:
        classes = choose_classes({"train": task.labels_of(rows, options)})
    config = config_class(**{**ENCODER, **NO_DROPOUT, **label_config(classes), **changes})
    torch.manual_seed(0)
    model = getattr(transformers, task.auto_class).from_config(config).train()
    setup = Setup(make_tokenizer(), options, classes, pair_label(model))
    collate = build_collator(model, TrainingArguments(), task.collator(setup))
    return Tiny(task, model, setup, task.encode(rows, setup), collate)
