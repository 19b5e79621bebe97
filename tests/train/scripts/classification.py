"""Text classification with dynamic padding, written for transformers' Trainer."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from transformers import Trainer  # isort: skip
from tests.train.scripts.common import ScriptArguments, bert_sizes, parsed, run

WORDS = [f"w{index}" for index in range(30)]
LABELS = ("good", "bad", "odd")


@dataclass
class OwnArguments(ScriptArguments):
    patience: int = 0


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", *LABELS, *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def reviews(size: int, seed: int) -> Dataset:
    """Texts of 4 to 20 words, one of which tells the label."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(size):
        text = list(draw.choice(WORDS, int(draw.integers(4, 21))))
        label = int(draw.integers(len(LABELS)))
        text[int(draw.integers(len(text)))] = LABELS[label]
        rows.append({"text": " ".join(text), "label": label})
    return Dataset.from_list(rows)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str]) -> Trainer:
    script, args = parsed(OwnArguments, argv)
    words = tokenizer()
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(words),
            **bert_sizes(script),
            max_position_embeddings=40,
            num_labels=len(LABELS),
            pad_token_id=words.pad_token_id,
        )
    )
    train, evaluation = (
        reviews(size, seed).map(lambda row: words(row["text"], truncation=True))
        for size, seed in ((script.num_train, 1), (script.num_eval, 2))
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=words,
        data_collator=DataCollatorWithPadding(words, pad_to_multiple_of=8),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(script.patience)] if script.patience else None,
    )
    return run(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
