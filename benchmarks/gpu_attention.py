"""Ranks of Megatron-LM before fused attention, whose L x S weights are tensors.

Source: Korthikanti et al., Reducing Activation Recomputation, MLSys 2023: ``5 a s^2 b`` bytes for
attention that is not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from ipu_pipeline.backends.cluster.prices.fused import FusedLayer
from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankPricer
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import Block, OpRecord

_HALF_BYTES = 2
# An element of the L x S weights keeps the softmax, what dropout left of it, and the mask; the
# backward pass makes three more tensors of 16 bits.
_WEIGHT_KEPT_BYTES, _WEIGHT_MADE_BYTES = 5, 6


class CoreAttentionLayer(FusedLayer):
    """A layer that keeps the L x S weights."""

    def _attention_kept_bytes(self, op: OpRecord) -> float:
        return float(_WEIGHT_KEPT_BYTES * op.count * prod(op.shapes[0][:-1]) * op.shapes[1][-2])


@dataclass(frozen=True)
class CoreAttentionPricer(RankPricer):
    """Prices blocks with attention in its parts."""

    def block(self, block: Block) -> RankBlock:
        """Return one block as this rank runs it, with the L x S tensors of its backward pass."""
        found = super().block(block)
        if block.kind != "layer":
            return found
        made = sum(
            _WEIGHT_MADE_BYTES * prod(op.shapes[0][:-1]) * op.shapes[1][-2]
            for op in self._fused(block).attentions
        )
        return replace(found, workspace_bytes=found.workspace_bytes + made / self.shared)

    def _fused(self, block: Block) -> CoreAttentionLayer:
        return CoreAttentionLayer(block.forward_ops, self.tokens, self.hidden, self.engine)

    def _operations(self, block: Block, *, backward: bool) -> Iterator[OpRecord]:
        for op in super()._operations(block, backward=backward):
            if is_attention(op):
                yield from (self._shared(part, 1, quantized=False) for part in parts_of(op))
            else:
                yield op


class DroppedTokensPricer(RankPricer):
    """Prices experts that are padded to a capacity (Megatron-Core 0.16, ``drop_and_pad``).

    Shapes are known, so that the host waits for nothing and launches ahead. Taken, as rows do not
    say it: the plain all-to-all, which sends every copy of a row, with nothing beside it.
    """

    def _group_launches(self, found: tuple[OpRecord, ...], experts: int) -> int:
        del found, experts
        return 0

    def _host_wait_s(self) -> float:
        return 0.0

    def _distinct_nodes(self, experts: float) -> float:
        del experts
        return 1.0


def parts_of(op: OpRecord) -> Iterator[OpRecord]:
    """Yield what an attention is without a fused kernel.

    Bytes an element of the L x S weights: the softmax with scale and mask reads and writes, dropout
    reads and writes with its mask; backward the softmax reads one more.
    """
    backward = op.name.endswith("_backward")
    query, key = op.shapes[int(backward) : int(backward) + 2]
    heads, (length, size), keys = prod(query[:-2]), query[-2:], key[-2]
    weights = heads * length * keys
    yield OpRecord(
        "aten.bmm", "matmul", op.dtype, ((heads, length, size), (heads, size, keys)),
        2 * weights * size, _HALF_BYTES * (weights + heads * size * (length + keys)),
        4 if backward else 2,
    )  # fmt: skip
    yield OpRecord("fused.softmax", "softmax", op.dtype, (), 0, (6 if backward else 4) * weights)
    yield OpRecord("fused.dropout", "random", op.dtype, (), 0, 5 * weights)
