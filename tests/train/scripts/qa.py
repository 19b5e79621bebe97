"""Extractive question answering, written for transformers' Trainer: the answer stands in marks."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForQuestionAnswering, EvalPrediction

from transformers import Trainer  # isort: skip
from tests.train.scripts.common import ScriptArguments, bert_sizes, parsed, run

OPEN, CLOSE, VOCAB, LENGTH = 5, 6, 40, 24


class Marked(Dataset):
    """Random tokens with one span between marks."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        draw = np.random.default_rng((self.seed, index))
        ids = draw.integers(7, VOCAB, LENGTH)
        start = int(draw.integers(1, LENGTH - 6))
        end = start + int(draw.integers(0, 4))
        ids[start - 1], ids[end + 1] = OPEN, CLOSE
        return {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * LENGTH,
            "start_positions": start,
            "end_positions": end,
        }


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    starts, ends = (logits.argmax(-1) for logits in prediction.predictions)
    true_starts, true_ends = prediction.label_ids
    return {"exact_match": float(((starts == true_starts) & (ends == true_ends)).mean())}


def main(argv: list[str]) -> Trainer:
    script, args = parsed(ScriptArguments, argv)
    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=VOCAB,
            **bert_sizes(script),
            max_position_embeddings=LENGTH,
        )
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Marked(script.num_train, seed=1),
        eval_dataset=Marked(script.num_eval, seed=2),
        compute_metrics=exact_match,
    )
    return run(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
