"""One microbatch's forward pass through the blocks of a stage, serialized ones in slices.

The gradient of a lookup holds only the rows that were looked up. It is added in place into a dense
gradient, so that no second tensor as large as the table is made.

Where a vocabulary is spread over processes, captures, their check and what finds out how losses add
up run the whole model, on every process. There the output projection gives logits that are not
computed (``chunked_loss.py``), and a loss takes them in pieces: some rows of the table at a time,
computed again in the backward pass. The values are those of the whole; only the table, which is a
stand-in then, gets no gradient. What else a model does with its logits computes them as a whole.

Axes: N tokens, H hidden size, V classes, R those of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.capture.programs import Program
from ipu_pipeline.ops.embedding import embedding_serialized
from ipu_pipeline.ops.linear_cross_entropy import apply
from ipu_pipeline.stages.chunked_loss import DeferredLogits
from ipu_pipeline.stages.tables import RowShard, Table, TableCalls
from ipu_pipeline.stages.vocabulary import SpreadLoss, SpreadTable, loss_dtype


def no_calls(_: Program) -> AbstractContextManager[None]:
    """Return a region in which no calls of a block are taken."""
    return nullcontext()


class SerializedRegion(TableCalls):
    """While active, lookups of ``table`` run in slices, and its logits wait for their loss.

    A projection alone has nothing to save: its result and the gradient of the table are whole.

    Args:
        run: What runs the block.
        table: The block's table.
        defer: Compute no logits but leave them to the loss behind the block.
        spread: Where its rows are spread over stages for the loss: what computes the softmax.
    """

    def __init__(
        self,
        run: SerializedForward,
        table: Table,
        *,
        defer: bool,
        spread: SpreadLoss | None = None,
    ) -> None:
        super().__init__()
        self._run = run
        self.table = table
        self.defer = defer
        self.spread = spread

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """Take the calls that read the table."""
        if weight is self.table.parameter:
            func = self._look_up if func is functional.embedding else self._project
        return func(*args, **kwargs)

    def _look_up(  # the parameters of functional.embedding
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
        sparse: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        del weight, max_norm, norm_type, sparse  # tables.py refuses the ones that matter
        leaf = self._run.leaves.of(self.table.parameter)
        if self.table.block in self._run.last_row_shards:
            shard, received = self._run.last_row_shards[self.table.block]
            return shard.look_up(input, leaf, received)
        return embedding_serialized(
            input,
            leaf,
            factor=self.table.factor,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
        )

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.defer:
            return functional.linear(input, weight, bias)
        return DeferredLogits.of(
            input,
            weight,
            bias,
            factor=self.table.factor,
            hold_gradients=self._run.hold_gradients,
            softmax=self.spread,
        )


@dataclass(eq=False)
class SerializedForward:
    """Runs programs; recomputation calls :meth:`run` again with the same object.

    Args:
        tables: By block name; a block without one runs as it is.
        fused: Blocks whose logits may stay deferred until the loss takes them.
        row_shards: Of this stage.
        hold_gradients: Compute a fused loss's gradients in its forward pass: right when no other
            microbatch of the stage is in flight meanwhile.
        spread: Computes the loss of a vocabulary that is spread over stages.
        calls: A region for every block, in which calls that read its tables are taken.

    Attributes:
        leaves: Collect the gradients of the lookups.
        last_row_shards: Where other stages hold rows too: those of this one, and the sum of theirs.
    """

    tables: Mapping[str, Table]
    fused: frozenset[str]
    row_shards: Sequence[RowShard]
    hold_gradients: bool = field(kw_only=True)
    spread: SpreadLoss | None = None
    calls: Callable[[Program], AbstractContextManager[None]] = no_calls

    def __post_init__(self) -> None:
        self.leaves = LookupLeaves()
        self.last_row_shards: dict[str, tuple[RowShard, Tensor]] = {}

    def look_up_row_shards(self, values: dict[str, Any]) -> None:
        """Add the rows held for later stages to ``values``, under the names they are sent by."""
        for shard in self.row_shards:
            if not shard.sent:
                self.last_row_shards[shard.table.block] = (shard, values[shard.received])
                continue
            leaf = self.leaves.of(shard.table.parameter)
            received = values[shard.received] if shard.received else None
            values[shard.sent] = shard.look_up(values[shard.ids], leaf, received)

    def run(self, program: Program, inputs: Sequence[Any]) -> Any:
        """Return the outputs of ``program``; a fused block's logits may be deferred."""
        with self.calls(program), self._region(program):
            return program(*inputs)

    def _region(self, program: Program) -> AbstractContextManager[Any]:
        spread = self.spread
        if spread is not None and program.name == spread.table.block:
            whole = Table(program.name, spread.table.parameter, 1)
            return SerializedRegion(self, whole, defer=True, spread=spread)
        if program.name not in self.tables:
            return nullcontext()
        defer = program.name in self.fused and torch.is_grad_enabled()
        return SerializedRegion(self, self.tables[program.name], defer=defer)


class LookupLeaves:
    """Stand-ins of the tables that one microbatch looks up.

    A stand-in shares the table's memory but has a ``.grad`` of its own: there the lookups'
    gradient stays sparse. In the table's own, autograd would first add it to the dense gradient
    of a tied projection, which had to wait for it through the whole backward pass.
    """

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def of(self, table: nn.Parameter) -> Tensor:
        """Return the stand-in of ``table``, the same one every time; without gradients, itself."""
        if not (table.requires_grad and torch.is_grad_enabled()):
            return table
        if id(table) not in self._leaves:
            self._leaves[id(table)] = (table, table.detach().requires_grad_())
        return self._leaves[id(table)][1]

    def pairs(self) -> tuple[tuple[nn.Parameter, Tensor], ...]:
        """Return every table with its stand-in."""
        return tuple(self._leaves.values())


class GradientSum:
    """The sum of gradients of one parameter, its dense and its sparse part apart."""

    def __init__(self) -> None:
        self.dense: Tensor | None = None
        self.sparse: Tensor | None = None
        self._owned = False  # autograd may have given the first gradient to others too

    def own(self) -> Tensor | None:
        """Return the dense part in memory that nothing else reads, to be added to in place."""
        if self.dense is not None and not self._owned:
            self.dense, self._owned = self.dense.clone(), True
        return self.dense

    def add(self, gradient: Tensor) -> None:
        """Add one gradient."""
        if gradient.is_sparse:
            self.sparse = gradient if self.sparse is None else self.sparse + gradient
            if self.sparse._nnz() >= len(self.sparse):  # it would grow with every microbatch
                whole, self.sparse = self.sparse.to_dense(), None
                self.add(whole)
        elif self.dense is None:
            self.dense = gradient
        elif self._owned:
            self.dense += gradient
        else:
            self.dense = self.dense + gradient
            self._owned = True


@torch.no_grad()
def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add ``gradient`` to ``parameter.grad``, which is dense afterwards.

    A new ``.grad`` has the parameter's strides, as autograd gives it: torch's fused optimizers
    read both as if they were one-dimensional.
    """
    if parameter.grad is not None:
        parameter.grad += gradient
    elif gradient.is_sparse:
        parameter.grad = torch.zeros_like(parameter).add_(gradient)
    elif gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad = gradient


@torch.no_grad()
def add_sums(parameter: Tensor, sums: Iterable[GradientSum]) -> None:
    """Add ``sums`` to ``parameter.grad``: all dense parts in their order, then the sparse ones.

    The order is fixed, whatever the timing, so the last bit is too.
    """
    total = GradientSum()
    sums = tuple(sums)
    for part in (*(s.dense for s in sums), *(s.sparse for s in sums)):
        if part is not None:
            total.add(part)
    if total.dense is not None and total.sparse is not None and parameter.grad is None:
        parameter.grad = total.dense + total.sparse
        return
    for part in (total.dense, total.sparse):
        if part is not None:
            add_gradient(parameter, part)


# ---- logits of a table whose rows other processes hold ----------------------------------------


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
