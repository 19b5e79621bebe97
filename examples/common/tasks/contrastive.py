"""Speech without text: hidden frames are told from others, as wav2vec 2.0 learns.

Baevski et al., wav2vec 2.0, NeurIPS 2020, section 3.2: frames are hidden in spans, and for every
hidden one the model tells its own quantized features from those of other hidden frames.

Axes: ``B`` samples, ``L`` frames, ``N`` wrong candidates, ``D`` features of a candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    _compute_mask_indices,
    _sample_negative_indices,
)

LABELS = ["mask_time_indices", "sampled_negative_indices"]


class ContrastiveCollator:
    """Makes a batch, and draws which frames are hidden and what each is told from.

    The random numbers are numpy's global ones, as in transformers' functions.

    Args:
        model: Says how many frames a sound has, and how many of them to hide.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch."""
        batch: dict[str, Tensor] = default_data_collator(samples)
        size, length = batch["input_values"].shape
        frames = int(self.model._get_feat_extract_output_lengths(length))
        attended = None
        if "attention_mask" in batch:
            attended = self.model._get_feature_vector_attention_mask(
                frames, batch["attention_mask"], add_adapter=False
            )
        config = self.model.config
        hidden = _compute_mask_indices(
            (size, frames),
            config.mask_time_prob,
            config.mask_time_length,
            attention_mask=attended,
            min_masks=2,
        )
        wrong = _sample_negative_indices((size, frames), config.num_negatives, hidden)
        drawn = (torch.tensor(hidden), torch.tensor(wrong, dtype=torch.long))
        return {**batch, **dict(zip(LABELS, drawn, strict=True))}


class ContrastiveTrainer(Trainer):
    """Divides the model's loss, a sum, by the number of hidden frames."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:  # noqa: FBT001, FBT002 - the inherited signature
        """Return the loss of a hidden frame, in nats."""
        outputs = model(**inputs)
        loss = outputs.loss / inputs["mask_time_indices"].sum()
        return (loss, outputs) if return_outputs else loss


class Temperature(TrainerCallback):
    """Lowers the temperature of the quantizer after every step.

    Args:
        highest: That of the first step.
        lowest: The least.
        decay: Its factor in every step.
    """

    def __init__(self, highest: float, lowest: float, decay: float) -> None:
        self.highest, self.lowest, self.decay = highest, lowest, decay

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        """Set it."""
        _, state, *_ = given
        now = self.highest * self.decay**state.global_step
        named["model"].set_gumbel_temperature(max(now, self.lowest))


def guessed(logits: Any, labels: Any) -> Tensor:
    """Return how many frames of every sample were hidden, and how many of them told right: [B, 2].

    A wrong candidate that is quantized as the right one is does not count.
    """
    found_BLD, right_BLD = logits[0], logits[1]
    hidden_BL, wrong_BLN = labels
    wrong_BLND = right_BLD.flatten(0, 1)[wrong_BLN]
    same_BLN = (wrong_BLND == right_BLD[:, :, None]).all(-1)
    others_BLN = cosine_similarity(found_BLD[:, :, None], wrong_BLND, dim=-1)
    own_BL = cosine_similarity(found_BLD, right_BLD, dim=-1)
    best_BL = others_BLN.masked_fill(same_BLN, -2.0).amax(-1)
    told_BL = (own_BL > best_BL) & hidden_BL
    return torch.stack([hidden_BL.sum(1), told_BL.sum(1)], dim=1)


def share_guessed(found: Any) -> dict[str, float]:
    """Return the share of hidden frames that were told from all others."""
    hidden, told = np.asarray(found.predictions).sum(0)
    return {"accuracy": float(told / hidden)}
