"""The ways to run each block on a device that is no IPU: plain, recomputed, serialized.

Serialization (``tables.py``) of a **lookup** makes no dense ``rows x width`` gradient, only one row
per looked-up token; every further slice reads the indices again. The dense gradient's time is not
credited, so that a plain lookup is kept where memory is ample. A **projection fused with the loss**
has one slice of logits at a time and keeps nothing of their size; every further slice reads the
table again, forward and in each product of the backward pass.

With one microbatch in flight the fused way computes gradients in the forward pass (three products
with the table). With more, the logits and their softmax are computed again in the backward pass
(four products), as when the head is recomputed. A loss that needs every other block is in the last
stage of any split, where the microbatches in flight depend on the schedule alone
(``loss_in_flight``); where that is not known, the price is the higher one.

The projection's menu carries the bytes of both, the loss has only its time, and
``GraphCosts.together`` keeps them in one stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.options.roofline import Roofline
from ipu_pipeline.planner.options.tables import (
    FusedHead,
    VocabularyTable,
    fused_heads,
    is_end,
    looked_up,
    products_with,
    table_of,
)

SLICE_BYTES = 64_000_000  # a slice of logits, or of a table, is at most about this large
FUSED_CHOICES = 3
_FLOAT_BYTES = 4  # the fused kernel computes slices of logits in float32
_INDEX_BYTES = 8
_TIE = 1e-6  # equally quick ways: the plain one, which needs no kernel of ours, is preferred
Seconds = tuple[float, float]
Menu = tuple[BlockChoice, ...]


@dataclass(frozen=True)
class BlockOptions:
    """Prices all blocks of one graph.

    Attributes:
        graph: The graph.
        roofline: Device, for what slicing adds.
        seconds: Forward and backward seconds of one plain microbatch, by block.
        factors: More numbers of slices to offer, by block; also for tables that are not large.
        unfused: Projections that are in another stage than the loss, where nothing is fused.
        loss_in_flight: Microbatches in flight in the last stage; ``None`` when not known.
    """

    graph: BlockGraph
    roofline: Roofline
    seconds: Mapping[str, Seconds]
    factors: Mapping[str, Sequence[int]]
    unfused: Collection[str]
    loss_in_flight: int | None

    def all(self) -> tuple[dict[str, Menu], tuple[tuple[str, str], ...]]:
        """Return the menu of every block, and the pairs that were priced together."""
        menus = {block.name: self._alone(block) for block in self.graph.blocks}
        found = fused_heads(self.graph, self.factors)
        heads = [pair for pair in found if pair.head.name not in self.unfused]
        for pair in heads:
            menus[pair.head.name] = self._fused(pair)
            menus[pair.loss.name] = (BlockChoice(*self.seconds[pair.loss.name]),)
        return menus, tuple((pair.head.name, pair.loss.name) for pair in heads)

    def _alone(self, block: Block) -> Menu:
        """Ways of a block that is in no pair."""
        plain = block_choices(self.graph, block, *self.seconds[block.name])
        table = table_of(self.graph, block)
        if table is None:
            return plain
        wanted = set(self.factors.get(block.name, ()))
        if self.graph.training and table.use == "lookup" and table.is_large and table.trainable:
            wanted.add(_power_of_two(table.num_bytes))
        ways = list(plain)
        for factor in sorted(wanted - {0, 1}):
            ways += [self._sliced(block, table, way, factor) for way in plain]
        return tuple(ways)

    def _sliced(
        self, block: Block, table: VocabularyTable, way: BlockChoice, factor: int
    ) -> BlockChoice:
        workspace = way.workspace_bytes
        tokens = looked_up(block, table)
        if table.use == "lookup":
            scan = (factor - 1) * tokens * _INDEX_BYTES
            extra = (scan / self.roofline.device.memory_bytes_per_s,) * 2
            if table.trainable and self.graph.training:
                row = table.num_bytes // table.rows
                workspace = max(0, workspace - table.num_bytes) + tokens * (row + _INDEX_BYTES)
        else:
            extra = self._again(block, table, factor)
        return replace(
            way,
            forward_s=way.forward_s + extra[0],
            backward_s=way.backward_s + (extra[1] if self.graph.training else 0.0),
            workspace_bytes=workspace,
            serialize_factor=factor,
        )

    def _again(self, block: Block, table: VocabularyTable, factor: int) -> Seconds:
        """Seconds that reading the table once per slice adds to its products."""
        more = (factor - 1) * table.num_bytes
        forward, backward = (
            self.roofline.seconds(products, more) - self.roofline.seconds(products)
            for products in (
                products_with(block.forward_ops, table),
                products_with(block.backward_ops, table),
            )
        )
        return forward, backward

    def _fused(self, pair: FusedHead) -> Menu:
        head, loss = pair.head, pair.loss
        own = block_choices(self.graph, head, *self.seconds[head.name])
        ways = [
            replace(
                way,
                stash_bytes=way.stash_bytes + loss.saved_bytes,
                # The head runs before the loss has kept anything and after it has let it go.
                workspace_bytes=max(way.workspace_bytes - loss.saved_bytes, loss.workspace_bytes),
            )
            for way in own
        ]
        logits = pair.logits.num_bytes if pair.logits.kept else 0
        wanted = {*fused_factors(pair), *self.factors.get(head.name, ())} - {0, 1}
        for factor in sorted(wanted):
            fused = self._fused_way(pair, factor)
            again_s = self._logits_again_s(pair, factor)
            alone = self.loss_in_flight == 1 and is_end(self.graph, loss)
            more_s = _TIE * fused.total_s if alone else again_s
            ways.append(replace(fused, backward_s=fused.backward_s + more_s))
            if len(own) > 1:
                ways.append(
                    replace(
                        own[1],
                        stash_bytes=own[1].stash_bytes - logits + _besides_softmax(pair),
                        forward_s=fused.forward_s,
                        backward_s=fused.backward_s + again_s + self.seconds[head.name][0],
                        workspace_bytes=fused.workspace_bytes + _kept_by_head(pair),
                        serialize_factor=factor,
                    )
                )
        return tuple(ways)

    def _fused_way(self, pair: FusedHead, factor: int) -> BlockChoice:
        """The fused way with as many products as the plain one."""
        head, table = pair.head, pair.table
        forward_s, backward_s = self.seconds[head.name]
        extra_forward_s, extra_backward_s = self._again(head, table, factor)
        hidden = pair.tokens * table.num_bytes // table.rows
        gradients = hidden + (table.num_bytes if table.trainable else 0)
        return BlockChoice(
            forward_s=forward_s + extra_forward_s,
            backward_s=backward_s + extra_backward_s,
            stash_bytes=_kept_by_head(pair) + _besides_softmax(pair),
            workspace_bytes=_slice_bytes(pair, factor) + gradients,
            serialize_factor=factor,
        )

    def _logits_again_s(self, pair: FusedHead, factor: int) -> float:
        """Seconds of computing the logits and their softmax a second time."""
        products = products_with(pair.head.forward_ops, pair.table)
        share = sum(op.flops * op.count for op in products) / pair.head.forward_flops
        extra_s, _ = self._again(pair.head, pair.table, factor)
        return share * self.seconds[pair.head.name][0] + extra_s + self.seconds[pair.loss.name][0]


def block_choices(
    graph: BlockGraph, block: Block, forward_s: float, backward_s: float
) -> tuple[BlockChoice, ...]:
    """Return the ways to run ``block`` whole: plain, and with its forward pass recomputed.

    A tensor between two blocks that is kept for a backward pass is charged to the block that
    makes it, however many read it. Recomputation keeps only what enters the block, also when
    nobody else would, and needs the saved tensors again as workspace while the block runs
    backward.
    """
    stash = block.saved_bytes + block.kept_bytes
    plain = BlockChoice(forward_s, backward_s, stash, block.workspace_bytes)
    if not graph.training or block.saved_bytes == 0:
        return (plain,)
    outputs = [graph.tensor_by_name[name] for name in block.outputs if name in graph.tensor_by_name]
    inputs = [graph.tensor_by_name[name] for name in block.inputs]
    recomputed = BlockChoice(
        forward_s=forward_s,
        backward_s=backward_s + forward_s,
        stash_bytes=sum(spec.num_bytes for spec in outputs if spec.kept)
        + sum(spec.num_bytes for spec in inputs if not spec.kept),
        workspace_bytes=block.workspace_bytes + block.saved_bytes,
        recompute=True,
    )
    return (plain, recomputed) if recomputed.stash_bytes < plain.stash_bytes else (plain,)


def fused_factors(pair: FusedHead) -> tuple[int, ...]:
    """Return the numbers of slices offered for a fused head: powers of two, at most three.

    The smallest makes a slice of logits at most ``SLICE_BYTES``; no slice is less than a token.
    """
    least = _power_of_two(pair.tokens * pair.table.rows * _FLOAT_BYTES)
    found = [least << step for step in range(FUSED_CHOICES)]
    most = 1 << (max(1, pair.tokens).bit_length() - 1)
    return tuple(sorted({min(factor, most) for factor in found} - {1}))


def _kept_by_head(pair: FusedHead) -> int:
    """Bytes that the head keeps besides what is as large as the logits."""
    return pair.head.saved_bytes - pair.saved_logits_bytes


def _besides_softmax(pair: FusedHead) -> int:
    """Bytes that the loss keeps besides the softmax of the logits."""
    return max(0, pair.loss.saved_bytes - pair.tokens * pair.table.rows * _FLOAT_BYTES)


def _slice_bytes(pair: FusedHead, factor: int) -> int:
    return ceil(pair.tokens / factor) * pair.table.rows * _FLOAT_BYTES


def _power_of_two(num_bytes: int) -> int:
    """Least power of two, from 2 on, that cuts ``num_bytes`` into slices of ``SLICE_BYTES``."""
    return 1 << max(1, (ceil(num_bytes / SLICE_BYTES) - 1).bit_length())
