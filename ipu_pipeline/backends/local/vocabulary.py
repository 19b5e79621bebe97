"""The passes of a vocabulary that is spread over the stages of one process.

The table stays one tensor, of which each stage reads its own rows and adds to their gradient.
Lookups in it are those of their blocks: in one memory nobody's help is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from ipu_pipeline.stages.serialize import add_gradient
from ipu_pipeline.stages.vocabulary import KeptSoftmax, SoftmaxPart, SpreadLoss, softmax_part


class VocabularyPasses:
    """What the stages compute of the softmax of a step's microbatches."""

    def __init__(self) -> None:
        self._losses: dict[int, SpreadLoss] = {}
        self._parts: dict[int, dict[int, Sequence[SoftmaxPart]]] = {}
        self._kept: dict[tuple[int, int], Sequence[KeptSoftmax]] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._lock = Lock()

    def begin(self, microbatch: int, loss: SpreadLoss) -> None:
        """Take what the loss of a microbatch needs."""
        self._losses[microbatch] = loss

    def softmax(self, stage: int, microbatch: int) -> None:
        """Compute the part of one stage."""
        loss = self._losses[microbatch]
        first, end = loss.table.rows[stage]
        weight_RH = loss.table.parameter.detach()[first:end]
        pairs = []
        for query in loss.queries:
            bias_R = None if query.bias_V is None else query.bias_V.detach()[first:end]
            pairs.append(softmax_part(query, weight_RH, bias_R, first))
        with self._lock:
            self._parts.setdefault(microbatch, {})[stage] = [part for part, _ in pairs]
            self._kept[microbatch, stage] = [kept for _, kept in pairs]

    def parts_of(self, microbatch: int) -> dict[int, Sequence[SoftmaxPart]]:
        """Return the parts of all stages, once."""
        return self._parts.pop(microbatch)

    def add_gradients(self, stage: int, microbatch: int) -> None:
        """Add the gradient of a stage's rows, in the order of its microbatches."""
        loss = self._losses[microbatch]
        first, end = loss.table.rows[stage]
        with self._lock:
            kept = self._kept.pop((microbatch, stage))
            if not any(number == microbatch for number, _ in self._kept):
                del self._losses[microbatch]
        for one, given in zip(kept, loss.given_back, strict=True):
            if given:
                weight_VH = self._sum_of(loss.table.parameter)
                bias_V = self._sum_of(one.query.bias_V)
                one.add_gradients(
                    given[stage],
                    None if weight_VH is None else weight_VH[first:end],
                    None if bias_V is None else bias_V[first:end],
                )

    def add_to_parameters(self) -> None:
        """Add the sums of all rows to ``.grad``, behind what other blocks have added."""
        for parameter, gradient in self._gradients.items():
            add_gradient(parameter, gradient)
        self._gradients.clear()
        self._losses.clear()

    def _sum_of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """Return the gradient that all stages add their rows to; None without one."""
        if parameter is None or not parameter.requires_grad:
            return None
        with self._lock:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)
            return self._gradients[parameter]
