"""What one rank of a cluster computes, keeps and exchanges, from the blocks of the whole model.

A captured block is the work of one device on one microbatch. :meth:`RankPricer.block` returns the
same block as one rank of tensor, context and expert parallelism runs it, priced by the same
roofline as every other plan.

Sources: Shoeybi et al., Megatron-LM, 2019 (tensor parallelism); Korthikanti et al., MLSys 2023
(sequence parallelism); Rajbhandari et al., ZeRO, SC 2020; Patarasuk and Yuan, 2009 (rings).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from ipu_pipeline.backends.cluster.prices.fused import (
    FusedLayer,
    fused_loss,
    is_grouped,
    logits,
    written,
)
from ipu_pipeline.backends.cluster.prices.parallel_sizes import EAGER, ParallelSizes, RankEngine
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import DTYPE_BYTES, Block, BlockGraph, OpRecord
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.roofline import Roofline, product_sides

_HALF_BYTES, _FLOAT_BYTES = 2, 4
# Freed blocks of torch's caching allocator that fit no other tensor, as a share of what is kept.
_FRAGMENTS = 1.04
# What a host does for one product of one expert, in launches: the library's call and casts; where
# hardware scales no blocks, the largest elements, scales and transposes of operands besides.
_PRODUCT_LAUNCHES, _SCALED_LAUNCHES = 8, 28
_ROUTER_SIDE = 256  # products with so few columns stay in the model's precision


@dataclass(frozen=True)
class RankParameters:
    """Elements of the weights that a rank holds.

    Attributes:
        dense: Trained ones that all data parallel ranks hold.
        experts: Trained ones of experts.
        frozen: Ones without gradients.
    """

    dense: float = 0.0
    experts: float = 0.0
    frozen: float = 0.0

    def __add__(self, other: RankParameters) -> RankParameters:
        """Return both together."""
        return RankParameters(
            self.dense + other.dense, self.experts + other.experts, self.frozen + other.frozen
        )

    def times(self, number: float) -> RankParameters:
        """Return ``number`` of them."""
        return RankParameters(self.dense * number, self.experts * number, self.frozen * number)


@dataclass(frozen=True)
class RankBlock:
    """One block, or several, on one rank, for one microbatch.

    Attributes:
        forward_s: Seconds of the forward pass, with its collectives.
        backward_s: Seconds of the backward pass, with its collectives and recomputation.
        saved_bytes: Kept from the forward to the backward pass.
        workspace_bytes: Most bytes needed besides while it runs.
        parameters: Its weights on this rank.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    saved_bytes: float = 0.0
    workspace_bytes: float = 0.0
    parameters: RankParameters = RankParameters()


@dataclass(frozen=True)
class RankPricer:
    """Prices the blocks of one graph on one rank.

    Attributes:
        graph: The whole model, for one microbatch.
        machine: Where it runs.
        sizes: Who shares what.
        engine: How operations run.
    """

    graph: BlockGraph
    machine: Machine
    sizes: ParallelSizes
    engine: RankEngine = EAGER

    @property
    def roofline(self) -> Roofline:
        """Prices of operations on the machine's first device."""
        return Roofline(self.machine.devices[0])

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch, of the whole sequence."""
        return prod(self.graph.inputs[0].shape) if self.graph.inputs else 0

    @property
    def hidden(self) -> int:
        """Width of the tensors between blocks."""
        made = [t for t in self.graph.tensors if t.producer is not None and len(t.shape) == 3]
        return made[0].shape[-1] if made else 0

    @property
    def shared(self) -> int:
        """Ranks that share the tokens of a microbatch."""
        return self.sizes.tp * self.sizes.cp

    def block(self, block: Block) -> RankBlock:
        """Return one block as this rank runs it."""
        found = RankBlock(
            self.roofline.seconds(self._operations(block, backward=False)),
            self.roofline.seconds(self._operations(block, backward=True)),
            block.saved_bytes / self.shared,
            block.workspace_bytes / self.shared,
            self.parameters(block),
        )
        if self.engine.fused_loss and block.kind in ("head", "loss"):
            held = 2 * _HALF_BYTES * logits(block) / self.shared
            return replace(found, saved_bytes=0.0, workspace_bytes=held)
        if block.kind != "layer":
            return found
        exchanged_s = self.exchanged_s(block)
        found = replace(
            found,
            forward_s=found.forward_s + exchanged_s,
            backward_s=found.backward_s + exchanged_s,
        )
        if self.engine.fused:
            kept = self._fused(block).kept_bytes()
            found = replace(found, saved_bytes=_FRAGMENTS * kept / self.shared)
        return self.recomputed(block, found)

    def as_kept(self, graph: BlockGraph) -> BlockGraph:
        """Return a graph with the bytes that this project's ranks keep of it.

        Masks of dropout are counted again (decision 0008). Without sequence parallelism all that
        lies between the cut parts of a layer is whole on every rank (Korthikanti et al., section
        4.2.1).
        """
        share = 1 - 1 / self.sizes.tp
        blocks = tuple(
            replace(
                block,
                saved_bytes=max(
                    0, block.saved_bytes - _mask_bytes(block) - int(share * block.cut_bytes)
                ),
                workspace_bytes=block.workspace_bytes - int(share * block.cut_workspace_bytes),
            )
            for block in graph.blocks
        )
        return replace(graph, blocks=blocks)

    def deferred_bytes(self, block: Block) -> float:
        """Bytes that wait for the gradients of a block's weights when those come later.

        They are the gradients of what is computed with each weight (torch's
        ``stage_backward_input`` keeps them): products, and norms that are scaled by a vector.
        """
        found = 0.0
        for op in block.forward_ops:
            if is_attention(op) or op.name == "aten.bmm":
                continue
            if op.flops:
                number = written(op)
            elif any(len(shape) == 1 for shape in op.shapes):
                number = max(map(prod, op.shapes))
            else:
                continue
            found += op.count * number * DTYPE_BYTES.get(op.dtype, _HALF_BYTES)
        return found / self.shared

    def parameters(self, block: Block) -> RankParameters:
        """Return this rank's part of the weights of a block."""
        found = RankParameters()
        for fqn in block.parameters:
            spec = self.graph.parameter_by_fqn[fqn]
            of_experts = ".experts." in fqn
            shares = self.sizes.ep if of_experts else self.sizes.tp
            if of_experts and self.engine.ours:
                shares *= self.sizes.tp
            numel = spec.numel / shares
            if not (spec.trainable and self.graph.training):
                found += RankParameters(frozen=numel)
            else:
                found += RankParameters(experts=numel) if of_experts else RankParameters(numel)
        return found

    # -- operations ------------------------------------------------------------------------------

    def _fused(self, block: Block) -> FusedLayer:
        return FusedLayer(block.forward_ops, self.tokens, self.hidden, self.engine)

    def _operations(self, block: Block, *, backward: bool) -> Iterator[OpRecord]:
        """Yield this rank's part of the operations of one pass."""
        found = block.backward_ops if backward else block.forward_ops
        if self.engine.fused_loss and block.kind in ("head", "loss"):
            found = fused_loss(block, backward=backward)
        fused = self.engine.fused and block.kind == "layer"
        experts = max((op.shapes[0][0] for op in found if is_grouped(op)), default=1)
        for op in found:
            if op.flops or not fused or op.name.startswith("fused."):
                yield self._shared(op, experts, quantized=block.kind == "layer")
        if fused and found:
            layer = self._fused(block)
            passes = 2 * len(layer.products) * (2 if backward else 1)
            moved = layer.pass_bytes(backward=backward) / self.shared / max(1, passes)
            yield OpRecord("fused.passes", "vector", "bfloat16", (), 0, int(moved), passes)
            if launches := self._group_launches(found, experts):
                yield OpRecord("fused.launches", "vector", "bfloat16", (), 0, 0, launches)

    def _group_launches(self, found: tuple[OpRecord, ...], experts: int) -> int:
        """Launches for the products of a rank's experts, which a host makes one after another.

        The GPU has just waited for it to read how many rows they get, so that nothing hides them.
        """
        grouped = sum(op.count for op in found if "grouped" in op.name)
        scaled = self.engine.precision == "float8" and not self.machine.devices[0].scales_blocks
        launches = _SCALED_LAUNCHES if scaled else _PRODUCT_LAUNCHES
        return round(grouped * experts / self.sizes.ep * launches)

    def _shared(self, op: OpRecord, experts: int, *, quantized: bool) -> OpRecord:
        """Return this rank's part of an operation."""
        part = replace(op, flops=op.flops // self.shared, bytes_moved=op.bytes_moved // self.shared)
        sides = product_sides(op)
        if not op.flops or is_attention(op) or op.name == "aten.bmm" or len(sides) != 3:
            return part  # one matrix per head: ranks share the heads
        dtype = op.dtype
        if self.engine.precision and quantized and min(sides[1:]) > _ROUTER_SIDE:
            dtype = self.engine.precision
        elif self.engine.fused and dtype == "float32":
            dtype = "tfloat32"
        if "grouped" in op.name:
            rows = sides[0] / (experts if len(op.shapes[0]) == 2 else 1)
            one: tuple[float, ...] = (rows * self.sizes.ep / self.shared, *sides[1:])
            part = replace(part, bytes_moved=self._grouped_bytes(op, one, experts))
        else:
            one = self._divided(sides)
        a, b, c = (max(1, round(side)) for side in one)
        return replace(part, name="aten.mm", dtype=dtype, shapes=((a, b), (b, c)))

    def _divided(self, sides: tuple[float, ...]) -> tuple[float, ...]:
        """Divide the tokens by ``cp`` and the longer of the other sides by ``tp``."""
        rest = list(sides)
        tokens = self.tokens if self.tokens in rest else max(rest)
        rest.remove(tokens)
        return (tokens / self.sizes.cp, max(rest) / self.sizes.tp, min(rest))

    def _grouped_bytes(self, op: OpRecord, one: tuple[float, ...], experts: int) -> int:
        rows, a, b = one
        each = rows * a + rows * b + a * b
        return int(DTYPE_BYTES.get(op.dtype, _HALF_BYTES) * experts / self.sizes.ep * each)

    def recomputed(self, block: Block, found: RankBlock) -> RankBlock:
        """Return a layer with the parts of it recomputed that the sizes name."""
        wanted, layer = self.sizes.recompute, self._fused(block)
        if "full" in wanted:
            entering = _HALF_BYTES * self.tokens * self.hidden / self.shared
            return replace(
                found,
                backward_s=found.backward_s + found.forward_s,
                saved_bytes=entering,
                workspace_bytes=found.workspace_bytes + found.saved_bytes,
            )
        again_s, freed = 0.0, 0.0
        for op in (*layer.products, *layer.attentions):
            part = _part_of(op, self.hidden)
            if part in wanted and part != "moe_act":
                again_s += self.roofline.seconds([self._shared(op, 1, quantized=True)])
            if part in wanted and part != "core_attn":
                leads_back = op.shapes[0][-1] == self.hidden  # rows of experts to the stream's
                freed += layer.inner(op) if part != "moe_act" or leads_back else 0.0
        if "layernorm" in wanted:
            freed += self.tokens * self.hidden * 2
        saved = max(0.0, found.saved_bytes - _HALF_BYTES * freed / self.shared)
        return replace(found, backward_s=found.backward_s + again_s, saved_bytes=saved)

    # -- collectives of a layer ------------------------------------------------------------------

    def ring_s(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of ``num_bytes`` (the whole) in a ring.

        The slowest link of ``ranks`` that are ``stride`` positions apart bounds it.
        """
        if ranks < 2 or not num_bytes:
            return 0.0
        devices = self.machine.devices
        link = self.machine.link_between(0, min(ranks * stride, len(devices)) - 1)
        kernels = devices[0].kernels
        rate = link.bytes_per_s * (1.0 if kernels is None else kernels.link_share)
        return link.latency_s + (ranks - 1) / ranks * num_bytes / rate

    def exchanged_s(self, block: Block) -> float:
        """Seconds that collectives within a layer add to one pass."""
        sizes, layer = self.sizes, self._fused(block)
        parts = (len(layer.attentions) > 0) + (len(layer.products) > 1)
        stream = _HALF_BYTES * self.tokens * self.hidden / sizes.cp
        # Per part of a layer one all-gather before it and one reduce-scatter behind it.
        found = 2 * parts * self.ring_s(stream, sizes.tp) * (1 - self.engine.tensor_overlap)
        rows = layer.routed_rows
        if rows:
            sent = _HALF_BYTES * rows * self.hidden / self.shared
            sent *= self._distinct_nodes(rows / self.tokens)
            found += self._host_wait_s()
            found += 2 * self.ring_s(sent, sizes.ep) * (1 - self.engine.expert_overlap)
        for op in layer.attentions if sizes.cp > 1 else ():
            moved = _HALF_BYTES * sum(map(prod, op.shapes[1:3])) / sizes.tp
            beside_s = self.roofline.seconds([self._shared(op, 1, quantized=True)])
            found += max(0.0, self.ring_s(moved, sizes.cp, sizes.tp) - beside_s)
        return found

    def _host_wait_s(self) -> float:
        """Seconds of waiting for a host that must know how many rows every expert gets."""
        return self.machine.devices[0].host_sync_s

    def _distinct_nodes(self, experts: float) -> float:
        """Share of a token's copies that are sent: one for all of its experts on a node."""
        per_node = self.machine.devices_per_board or len(self.machine.devices)
        nodes = ceil(self.sizes.ep / per_node)
        return 1.0 if nodes < 2 else nodes * (1 - (1 - 1 / nodes) ** experts) / experts

    # -- once per step, and all the time ---------------------------------------------------------

    @property
    def _copies(self) -> tuple[int, int]:
        """Ranks that hold the same weights, and the same weights of experts."""
        same = self.sizes.dp * self.sizes.cp
        own = 1 if self.engine.ours else self.sizes.tp
        return same, max(1, same * own // self.sizes.ep)

    def state_bytes(self, held: RankParameters) -> float:
        """Bytes of weights, gradients and optimizer state of a rank."""
        engine, stage = self.engine, self.sizes.zero_stage
        total = engine.weight_bytes * held.frozen
        for numel, ranks in zip((held.dense, held.experts), self._copies, strict=True):
            total += numel * engine.weight_bytes / (ranks if stage >= 3 else 1)
            total += numel * engine.gradient_bytes / (ranks if stage >= 2 else 1)
            total += numel * engine.state_bytes / (ranks if stage >= 1 else 1)
        return total

    def widened_bytes(self, held: RankParameters) -> float:
        """Bytes that the update needs besides the state, when no activation is left."""
        engine, (same, of_experts) = self.engine, self._copies
        if not engine.ours:
            return 0.0
        if not self.sizes.zero_stage:
            same = of_experts = 1
        more = max(0, _FLOAT_BYTES - engine.gradient_bytes)
        return more * (held.dense / same + held.experts / of_experts)

    def update_s(self, held: RankParameters) -> float:
        """Seconds of the optimizer over a rank's part of its state."""
        same, of_experts = self._copies if self.sizes.zero_stage else (1, 1)
        numel = held.dense / same + held.experts / of_experts
        return self.engine.update_bytes * numel / self.roofline.bytes_per_s

    def reduction_s(self, held: RankParameters) -> float:
        """Seconds of reducing gradients and gathering weights over the ranks that share them."""
        return self.shared_ring_s(held, self.engine.gradient_bytes + _HALF_BYTES)

    def shared_ring_s(self, held: RankParameters, num_bytes: float) -> float:
        """Seconds of one collective of ``num_bytes`` a weight over the ranks that share it."""
        same, of_experts = self._copies
        apart = self.sizes.pp if self.engine.ours else 1
        dense_s = self.ring_s(num_bytes * held.dense, same, self.sizes.tp * apart)
        return dense_s + self.ring_s(num_bytes * held.experts, of_experts, self.sizes.ep * apart)


def _mask_bytes(block: Block) -> int:
    """Return the bytes of the masks that torch's own dropout keeps, as it was counted."""
    drawn = [op for op in block.forward_ops if op.name == "aten.bernoulli_"]
    return int(sum(op.count * prod(op.shapes[0]) * DTYPE_BYTES[op.dtype] for op in drawn))


def _part_of(op: OpRecord, hidden: int) -> str:
    """Return which part of a layer an operation belongs to, by Megatron's names."""
    if is_attention(op):
        return "core_attn"
    if "grouped" in op.name:
        return "moe_act"
    sides = product_sides(op)
    if len(sides) == 3 and hidden not in sides:
        return "mla_up_proj"
    return "mlp" if len(sides) == 3 and max(sides[1:]) > 2 * hidden else ""
