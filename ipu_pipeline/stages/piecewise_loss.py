"""Logits that are never whole while a model is looked at whose vocabulary is spread over processes.

Captures, their check and what finds out how losses add up run the whole model, on every process.
There the output projection gives logits that are not computed (``chunked_loss.py``), and a loss
takes them in pieces: some rows of the table at a time, computed again in the backward pass. The
values are those of the whole; only the table, which is a stand-in then, gets no gradient. Whatever
else a model does with its logits computes them as a whole.

Axes: N tokens, H hidden size, V classes, R those of a piece.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.ops.linear_cross_entropy import apply
from ipu_pipeline.stages.chunked_loss import DeferredLogits
from ipu_pipeline.stages.tables import TableCalls
from ipu_pipeline.stages.vocabulary import SpreadLoss, SpreadTable, loss_dtype

# So many logits exist at once.
MOST_LOGITS = 1 << 22


class PiecewiseLoss(SpreadLoss):
    """Takes logits in pieces of the rows of a table that is here."""

    may_be_whole: ClassVar[bool] = True

    def softmax(
        self, logits: DeferredLogits, target_N: Tensor | None, summed_V: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials, the target's logit and a sum of all."""
        x = logits.input()
        x_NH = x.reshape(-1, x.shape[-1])
        if target_N is None:
            target_N = torch.zeros(len(x_NH), dtype=torch.int64, device=x.device)
        table_VH = self.table.parameter.detach()
        bias_V = None if logits.bias_V is None else logits.bias_V.to(x.dtype)

        def piece(rows: slice, x_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            bias_R = None if bias_V is None else bias_V[rows]
            product_NR = functional.linear(x_NH, table_VH[rows].to(x.dtype).contiguous(), bias_R)
            logits_NR = apply(logits.pointwise, product_NR, rows).to(loss_dtype(x))
            class_N = target_N - rows.start
            here_N = (class_N >= 0) & (class_N < logits_NR.shape[1])
            logit_N = logits_NR.gather(1, class_N.where(here_N, 0)[:, None])[:, 0].where(here_N, 0)
            total_N = torch.zeros_like(logit_N)
            if summed_V is not None:
                total_N = logits_NR @ summed_V[rows].to(logits_NR)
            return logits_NR.logsumexp(1), logit_N, total_N

        step = max(1, MOST_LOGITS // max(1, len(x_NH)))
        starts = range(0, self.table.size, step)
        pieces = [slice(start, min(start + step, self.table.size)) for start in starts]
        found = [
            checkpoint(partial(piece, rows), x_NH, use_reentrant=False, preserve_rng_state=False)
            for rows in pieces
        ]
        lse_NP, logit_NP, total_NP = (torch.stack(each, 1) for each in zip(*found, strict=True))
        return lse_NP.logsumexp(1), logit_NP.sum(1), total_NP.sum(1)


class PiecewiseLogits(TableCalls):
    """While active, the logits of a table are computed where something needs all of them only."""

    def __init__(self, table: SpreadTable) -> None:
        super().__init__()
        self._table = table

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """Take the projection; not where shapes are looked at only."""
        if func is functional.linear and weight is self._table.parameter:
            return self._project(*args, **kwargs)
        return func(*args, **kwargs)

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor or input.is_meta:
            return functional.linear(input, weight, bias)
        return DeferredLogits.of(input, weight, bias, softmax=PiecewiseLoss(self._table))
