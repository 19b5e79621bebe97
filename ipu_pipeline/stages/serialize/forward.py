"""One microbatch's forward pass through the blocks of a stage, serialized ones in slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.capture.programs import Program
from ipu_pipeline.stages.serialize.gradients import LookupLeaves
from ipu_pipeline.stages.serialize.region import SerializedRegion
from ipu_pipeline.stages.serialize.spread import Share
from ipu_pipeline.stages.serialize.tables import Table


class SerializedForward:
    """Runs programs; recomputation calls :meth:`run` again with the same object.

    Args:
        tables: Tables by block name; a block without one runs as it is.
        fused: Blocks whose logits may stay deferred until the loss takes them.
        shares: Rows that this stage holds of tables that several stages hold.
        hold_gradients: Compute a fused loss's gradients in its forward pass: right when no other
            microbatch of the stage is in flight meanwhile.

    Attributes:
        leaves: Collect the gradients of the lookups.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        fused: frozenset[str],
        shares: Sequence[Share],
        *,
        hold_gradients: bool,
    ) -> None:
        self.tables = tables
        self.fused = fused
        self.hold_gradients = hold_gradients
        self.shares = shares
        self.leaves = LookupLeaves()
        self._last_shares: dict[str, tuple[Share, Tensor]] = {}

    def look_up_shares(self, values: dict[str, Any]) -> None:
        """Add the rows held for later stages to ``values``, under the names they are sent by."""
        for share in self.shares:
            if not share.sent:
                self._last_shares[share.table.block] = (share, values[share.received])
                continue
            leaf = self.leaves.of(share.table.parameter)
            received = values[share.received] if share.received else None
            values[share.sent] = share.look_up(values[share.ids], leaf, received)

    def run(self, program: Program, inputs: Sequence[Any]) -> Any:
        """Return the outputs of ``program``; a fused block's logits may be deferred."""
        table = self.tables.get(program.name)
        if table is None:
            return program.module(*inputs)
        region = SerializedRegion(
            table,
            self.leaves,
            defer=program.name in self.fused and torch.is_grad_enabled(),
            hold_gradients=self.hold_gradients,
            last_share=self._last_shares.get(program.name),
        )
        with region:
            return program.module(*inputs)
