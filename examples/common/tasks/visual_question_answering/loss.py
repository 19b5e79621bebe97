"""The loss of soft labels, in the place of the cross entropy that LXMERT's head has."""

from __future__ import annotations

from torch import Tensor, nn


class SoftAnswerLoss(nn.BCEWithLogitsLoss):
    """Binary cross entropy of every answer by itself, mean over questions and answers.

    ``model.loss = SoftAnswerLoss()`` makes a ``LxmertForQuestionAnswering`` read soft labels of
    shape ``NA``; the model's ``forward`` stays as it is, and it flattens the labels it passes.

    The mean over the answers, not their sum, is what published IPU runs train with (Graphcore's
    ``lxmert-vqa-uncased``), so that their ``--loss_scaling`` keeps its meaning.
    """

    def forward(self, scores_NA: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of ``scores_NA`` for as many ``weights``, flattened or not."""
        return super().forward(scores_NA, weights.view_as(scores_NA))
