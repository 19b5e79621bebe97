"""The loss of soft labels inside LXMERT, against its formula; hard labels are as before."""

import torch
from torch.nn import functional as F

from tasks.visual_question_answering import SoftAnswerLoss
from tests.tiny_models import TINY


def test_the_model_computes_it_from_flattened_labels():
    model, batch = TINY["lxmert-qa"].build()
    size = model.config.num_qa_labels
    weights = torch.rand(2, size)
    model.loss = SoftAnswerLoss()
    output = model(**{**batch, "labels": weights})
    scores = output.question_answering_score
    by_hand = -(weights * F.logsigmoid(scores) + (1 - weights) * F.logsigmoid(-scores)).mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_gradients_in_double_precision():
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 3, dtype=torch.float64).T
    assert torch.autograd.gradcheck(lambda s: SoftAnswerLoss()(s, weights), scores)
