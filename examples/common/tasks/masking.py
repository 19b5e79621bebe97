"""Hides tokens while a batch is made, as transformers' collator does.

Its random numbers are torch's global ones; the batches of :mod:`ipu_pipeline.train.data` seed
them by (seed, epoch, step), so that a resumed run hides the same tokens.

Axes: ``B`` samples, ``L`` tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from ipu_pipeline.capture.example_batch import IGNORED_LABEL
from tasks.features import Setup


class MaskingCollator:
    """Pads samples, hides tokens and keeps them in ``labels``; -100 where nothing was hidden.

    A row of which the dice hid nothing gets one hidden token: the loss of a microbatch without any
    is not a number. That is the one difference to transformers' collator, and rare in rows of more
    than 30 tokens.

    Args:
        setup: Tokenizer and ``mlm_probability``.

    Raises:
        ValueError: The tokenizer has no mask token.
    """

    def __init__(self, setup: Setup) -> None:
        if setup.tokenizer.mask_token is None:
            raise ValueError(
                f"the tokenizer {type(setup.tokenizer).__name__} has no mask token, so the model "
                "was not made to guess hidden tokens; use an encoder such as BERT"
            )
        self.tokenizer = setup.tokenizer
        self.collate = DataCollatorForLanguageModeling(
            setup.tokenizer, mlm_probability=setup.options.mlm_probability
        )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch."""
        batch: dict[str, Tensor] = dict(self.collate(samples))
        tokens_BL, labels_BL = batch["input_ids"], batch["labels"]
        for row in torch.nonzero((labels_BL == IGNORED_LABEL).all(dim=1)).flatten().tolist():
            special = self.tokenizer.get_special_tokens_mask(
                tokens_BL[row].tolist(), already_has_special_tokens=True
            )
            (ordinary,) = torch.nonzero(torch.tensor(special) == 0, as_tuple=True)
            if len(ordinary):
                chosen = ordinary[torch.randint(len(ordinary), ())]
                labels_BL[row, chosen] = tokens_BL[row, chosen]
                tokens_BL[row, chosen] = self.tokenizer.mask_token_id
        return batch
