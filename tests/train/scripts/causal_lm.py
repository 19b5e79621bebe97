"""A language model that copies its prompt, written for transformers' Trainer.

The loss counts the copied tokens only, so every microbatch has another number of labels.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel

from transformers import Trainer  # isort: skip
from tests.train.scripts.common import ScriptArguments, parsed, run

PAD, SEPARATOR, VOCAB, LENGTH = 0, 1, 20, 20


class Copies(Dataset):
    """A prompt of 1 to 9 tokens, a separator, the prompt again; lengths vary a lot."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        draw = np.random.default_rng((self.seed, index))
        prompt = draw.integers(2, VOCAB, int(draw.integers(1, 10))).tolist()
        ids = [*prompt, SEPARATOR, *prompt]
        labels = [-100] * (len(prompt) + 1) + prompt
        padding = LENGTH - len(ids)
        return {
            "input_ids": ids + [PAD] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": labels + [-100] * padding,
        }


def choices(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    chosen, wanted = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"token_accuracy": float((chosen == wanted)[wanted != -100].mean())}


def main(argv: list[str]) -> Trainer:
    script, args = parsed(ScriptArguments, argv)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=LENGTH,
            bos_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
            pad_token_id=PAD,
            resid_pdrop=script.dropout,
            embd_pdrop=script.dropout,
            attn_pdrop=script.dropout,
        )
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Copies(script.num_train, seed=1),
        eval_dataset=Copies(script.num_eval, seed=2),
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=choices,
    )
    return run(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
