"""The model in one piece, in transformers' Trainer: what the split one is compared with.

Batches, optimizer, schedule and clipping are those of the split run, and with the same seed it
starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from vqa_options import Options

from ipu_pipeline.stages.executable import EvalResult
from tasks.visual_question_answering import VisualQuestionAnsweringDataset


class Unsplit:
    """A model with the two methods that an evaluation and the saving of a model ask for.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def eval_step(self, batch: Mapping[str, Tensor]) -> EvalResult:
        """Run the model in evaluation mode without gradients."""
        self.model.eval()
        with torch.no_grad():
            output = self.model(**batch)
        scores = {"question_answering_score": output.question_answering_score}
        return EvalResult(output.loss.item(), scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the model's weights."""
        return self.model.state_dict()


def train_unsplit(
    model: nn.Module, dataset: VisualQuestionAnsweringDataset, options: Options
) -> dict[str, float]:
    """Train; return ``train_loss``, ``train_runtime`` (s), speeds, ... under transformers' names.

    An optimizer step reads the samples of all its microbatches at once: over microbatches, the
    Trainer would sum the losses of this model. There are no checkpoints.
    """
    options.save_strategy = "no"
    options.per_device_train_batch_size *= options.gradient_accumulation_steps
    options.gradient_accumulation_steps = 1
    metrics: dict[str, float] = Trainer(model, options, train_dataset=dataset).train().metrics
    return metrics
