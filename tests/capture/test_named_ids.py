"""Ids that are in no row of a table, and labels that are no class: plan and steps name both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.errors import CaptureError, StageError
from ipu_pipeline.ops.embedding import embedding_serialized


class Words(nn.Module):
    """Looks six words up and tells which of five classes they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(6, 4), nn.Linear(4, 5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(self.head(self.words(ids)), labels)}


GOOD = {"ids": torch.arange(4), "labels": torch.tensor([0, 1, -100, 4])}
WRONG = {
    "ids": (torch.tensor([0, 7, 1, 2]), r"words.weight has 6 rows, and id 7 \(of a tensor \(\d,"),
    "labels": (torch.tensor([0, 5, -100, -1]), "given label 5 and has 5 classes, 0 to 4"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_first_batch_later_ones_and_a_plan_say_it_alike(name: str, schedule: str) -> None:
    value, message = WRONG[name]
    wrong = {**GOOD, name: value}
    with pytest.raises(CaptureError, match=message):
        ipp.plan(Words(), wrong, num_stages=2, microbatches=2)
    model = Words()
    plan = ipp.plan(model, GOOD, num_stages=2, microbatches=1, schedule=schedule)
    for before in (0, 1):
        with ipp.compile(model, plan) as executable:
            for _ in range(before):
                executable.forward_backward(GOOD)
            with pytest.raises((CaptureError, StageError), match=message):
                executable.forward_backward(wrong)
    with ipp.compile(model, plan) as executable, pytest.raises(StageError, match=message):
        executable.forward(**wrong)


def test_tables_without_name_and_other_errors() -> None:
    with pytest.raises(IndexError, match="a table of the model has 3"), naming_ids(nn.Identity()):
        functional.embedding(torch.tensor([0, -1]), torch.zeros(3, 2))
    with pytest.raises(IndexError, match="has 3 rows, and id 3"), naming_ids(nn.Identity()):
        embedding_serialized(torch.tensor([3]), torch.zeros(3, 2), factor=2)
    with pytest.raises(IndexError, match="list index out of range"), naming_ids(Words()):
        functional.cross_entropy(torch.zeros(2, 5), [torch.zeros(2)][1])
    with pytest.raises(IndexError, match="too many"), naming_ids(Words(), StageError):
        torch.zeros(2)[0, 0]
