"""The region in which a serialized block runs: calls that read its table are sliced."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ipu_pipeline.ops.embedding import embedding_serialized
from ipu_pipeline.ops.projection import serialized_linear
from ipu_pipeline.stages.serialize.deferred import DeferredLogits
from ipu_pipeline.stages.serialize.gradients import LookupLeaves
from ipu_pipeline.stages.serialize.spread import Share
from ipu_pipeline.stages.serialize.tables import Table


class SerializedRegion(TorchFunctionMode):
    """While active, lookups and projections that read ``table`` run in slices.

    Args:
        table: The block's table.
        leaves: Stand-ins that collect the lookups' gradients.
        defer: Compute no logits but leave them to the loss behind the block.
        hold_gradients: Compute that loss's gradients in its forward pass.
        last_share: Where other stages hold rows too: the rows of this one, and the sum of theirs.
    """

    def __init__(
        self,
        table: Table,
        leaves: LookupLeaves,
        *,
        defer: bool,
        hold_gradients: bool,
        last_share: tuple[Share, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.leaves = leaves
        self.defer = defer
        self.hold_gradients = hold_gradients
        self.last_share = last_share

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding or func is functional.linear:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            if weight is self.table.parameter:
                sliced = self._look_up if func is functional.embedding else self._project
                return sliced(*args, **kwargs)
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
        leaf = self.leaves.of(self.table.parameter)
        if self.last_share is not None:
            share, received = self.last_share
            return share.look_up(input, leaf, received)
        return embedding_serialized(
            input,
            leaf,
            factor=self.table.factor,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
        )

    def _project(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        factor = self.table.factor
        if not self.defer:
            return serialized_linear(input, weight, bias, factor=factor)
        return DeferredLogits.of(
            input, weight, bias, factor=factor, hold_gradients=self.hold_gradients
        )
