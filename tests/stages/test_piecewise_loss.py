"""Logits that are computed in pieces while a whole model is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.captured import capture
from ipu_pipeline.stages import serialize
from ipu_pipeline.stages.materialize import stand_in
from ipu_pipeline.stages.serialize import PiecewiseLogits
from ipu_pipeline.stages.vocabulary import SpreadTable
from tests.stages.test_vocabulary import CLASSES, LOSSES, TOKENS, cross_entropy, inputs
from tests.tiny_models import TINY, VOCAB


class _Columns(TorchDispatchMode):
    """Notes the largest number of elements of a tensor with ``columns`` of them."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.most = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.ndim < 2:
                continue
            if tensor.shape[-1] == self.columns:
                self.most = max(self.most, tensor.numel())
        return found


@contextmanager
def in_pieces(
    table: Tensor, monkeypatch: pytest.MonkeyPatch, tokens: int = TOKENS
) -> Iterator[_Columns]:
    monkeypatch.setattr(serialize, "MOST_LOGITS", tokens * len(table) // 4)
    noted = _Columns(len(table))
    with PiecewiseLogits(SpreadTable("head", table, {}, len(table))), noted:  # type: ignore[arg-type]
        yield noted


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = inputs()
    expected = LOSSES[name](functional.linear(x, weight, bias))
    wanted = torch.autograd.grad(expected, [x, bias])
    with in_pieces(weight, monkeypatch) as noted:
        found = LOSSES[name](functional.linear(x, weight, bias))
        gradients = torch.autograd.grad(found, [x, bias])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, wanted)
    assert noted.most == 0


def test_smoothing_and_a_microbatch_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = inputs()
    with in_pieces(weight, monkeypatch):
        logits = functional.linear(x, weight)
        smoothed = cross_entropy(logits, label_smoothing=0.1)
        nothing = functional.cross_entropy(logits, torch.full((TOKENS,), -100))
    torch.testing.assert_close(
        smoothed, cross_entropy(functional.linear(x, weight), label_smoothing=0.1)
    )
    assert nothing.isnan()


def test_what_else_is_asked_of_logits_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = inputs()
    whole = functional.linear(x, weight)
    with torch.no_grad(), in_pieces(weight, monkeypatch) as noted:
        logits = functional.linear(x, weight)
        torch.testing.assert_close(logits.softmax(-1), whole.softmax(-1))
    assert noted.most == TOKENS * CLASSES


@pytest.mark.parametrize("name", ["gpt2-lm", "llama", "t5", "bart", "bert-mlm"])
@pytest.mark.parametrize("training", [True, False])
def test_captures_and_their_check_have_no_whole_logits(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = TINY[name].build()
    model.train(training)
    plain = capture(model, batch, self_check=False)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head.weight.data = stand_in(head.weight)  # type: ignore[arg-type, union-attr]
    tokens = next(iter(batch.values())).numel()
    with in_pieces(head.weight, monkeypatch, tokens) as noted:  # type: ignore[arg-type]
        found = capture(model, batch)
    assert noted.most <= noted.columns == VOCAB  # a bias may have one row
    assert found.graph.blocks == plain.graph.blocks
    assert found.results == plain.results
