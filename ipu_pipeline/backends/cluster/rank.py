"""What one rank of a cluster computes, keeps and exchanges, from the blocks of the whole model.

A captured block is the work of one device on one microbatch. :func:`rank_block` returns the same
block as one rank of tensor, context and expert parallelism runs it, under one of two engines:

* ``EAGER``: operation by operation, keeping what was captured (torch, the cluster backend).
* ``fused``: operations between products run as one pass over what the products read and write, and
  only that is kept (Megatron-Core with Transformer Engine; ``torch.compile``). In bytes:
  ``inner`` is what the products of a block read and write besides the residual stream (queries,
  keys, values, results of attention, the wide tensors of an MLP); norms keep input and result.

Sources: Korthikanti et al., Reducing Activation Recomputation, MLSys 2023 (what is kept, sequence
parallelism); Rajbhandari et al., ZeRO, SC 2020; Shoeybi et al., Megatron-LM, 2019.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from ipu_pipeline.ir.attention import is_attention, unfused
from ipu_pipeline.ir.graph import DTYPE_BYTES, Block, BlockGraph, OpRecord
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.machine import Link, Machine
from ipu_pipeline.planner.options.roofline import Roofline, product_sides

_NORMS = frozenset({"native_layer_norm", "rms_norm", "_fused_rms_norm", "mean"})
_HALF_BYTES = 2
_FLOAT_BYTES = 4
# Megatron's core attention without a fused kernel keeps the softmax, what dropout left of it, and
# the mask: 5 bytes an element of the L x S weights.
_UNFUSED_ATTENTION_BYTES = 5
_QUANTIZED = ("float8", "float4")
_ADAM_BYTES = 4 * (4 + 3)  # master weight, both moments and the gradient read, three written


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How many ranks share what. Their product without ``ep`` and ``vpp`` is the number of GPUs.

    Attributes:
        dp: Data parallel copies.
        tp: Ranks that share every product, with sequence parallelism between products.
        pp: Ranks of a pipeline.
        cp: Ranks that share the tokens of a sequence.
        ep: Ranks that share the experts; they are among the ``dp * cp * tp``.
        vpp: Stages of a rank.
        zero_stage: 0: every rank holds all optimizer state of its stage; 1: sharded over
            ``dp * cp``; 2: gradients, too; 3: weights, too.
        micro_batch: Samples of a microbatch.
        recompute: ``full`` for whole layers, or parts: ``core_attn``, ``mlp``, ``moe_act``,
            ``layernorm``, ``mla_up_proj``.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    zero_stage: int = 0
    micro_batch: int = 1
    recompute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "vpp", "micro_batch"):
            limit = name if name == "micro_batch" else "num_devices"
            check_count(name, getattr(self, name), limit)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if (self.dp * self.cp * self.tp) % self.ep:
            raise ValueError(
                f"ep {self.ep} does not divide the {self.dp * self.cp * self.tp} ranks of a stage "
                f"(dp {self.dp} x cp {self.cp} x tp {self.tp}); use a divisor"
            )

    @property
    def num_devices(self) -> int:
        """GPUs of the whole job."""
        return self.dp * self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a program runs the operations of a block.

    Attributes:
        fused: Operations between products run as one pass, see the module's docstring.
        fused_attention: No L x S tensor is made.
        precision: dtype of the layers' products: that of the model, ``float8`` or ``float4``.
        gradient_bytes: Of one element of an accumulated gradient.
        dropout: Masks are kept, one byte an element, for each of two outputs of a layer.
        tensor_overlap: Share of tensor parallel collectives that runs beside products.
        expert_overlap: The same of the experts' all-to-all.
    """

    fused: bool = False
    fused_attention: bool = True
    precision: str = ""
    gradient_bytes: int = _FLOAT_BYTES
    dropout: bool = False
    tensor_overlap: float = 0.0
    expert_overlap: float = 0.0


EAGER = Engine()


@dataclass(frozen=True)
class RankBlock:
    """One block on one rank, for one microbatch.

    Attributes:
        forward_s: Seconds of the forward pass, with its collectives.
        backward_s: Seconds of the backward pass, with its collectives and recomputation.
        saved_bytes: Kept from the forward to the backward pass.
        workspace_bytes: Most bytes needed besides while it runs.
        dense_parameters: Elements of the weights that this rank holds, without experts.
        expert_parameters: The same of experts.
    """

    forward_s: float
    backward_s: float
    saved_bytes: float
    workspace_bytes: float
    dense_parameters: float
    expert_parameters: float


def rank_link(machine: Machine, ranks: int, stride: int = 1) -> Link:
    """Return the link that bounds a group of ``ranks`` that are ``stride`` positions apart."""
    return machine.link_between(0, min(ranks * stride, len(machine.devices)) - 1)


def ring_s(link: Link, num_bytes: float, ranks: int, share: float = 1.0) -> float:
    """Seconds of an all-gather or a reduce-scatter of ``num_bytes`` (the whole) in a ring.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009.
    """
    if ranks < 2 or not num_bytes:
        return 0.0
    return link.latency_s + (ranks - 1) / ranks * num_bytes / (link.bytes_per_s * share)


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
    engine: Engine = EAGER

    @property
    def roofline(self) -> Roofline:
        """Prices of operations on the machine's first device."""
        return Roofline(self.machine.devices[0])

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch, of the whole sequence."""
        return prod(self.graph.inputs[0].shape)

    @property
    def hidden(self) -> int:
        """Width of the tensors between blocks."""
        made = [t for t in self.graph.tensors if t.producer is not None and len(t.shape) == 3]
        return made[0].shape[-1] if made else 0

    def block(self, block: Block) -> RankBlock:
        """Return one block as this rank runs it."""
        is_layer = block.kind == "layer"
        forward = tuple(self._operations(block.forward_ops, is_layer=is_layer))
        backward = tuple(self._operations(block.backward_ops, is_layer=is_layer))
        saved: float = block.saved_bytes / self.shared
        if is_layer and self.engine.fused:
            saved = self._kept_bytes(block)
        again_s, saved = self._recomputed(block, forward, saved) if is_layer else (0.0, saved)
        exchanged_s = self._exchanged_s(block) if is_layer else 0.0
        dense, experts = self.parameters(block)
        return RankBlock(
            self.roofline.seconds(forward) + exchanged_s,
            self.roofline.seconds(backward) + exchanged_s + again_s,
            saved,
            block.workspace_bytes / self.shared,
            dense,
            experts,
        )

    @property
    def shared(self) -> int:
        """Ranks that share the tokens of a microbatch."""
        return self.sizes.tp * self.sizes.cp

    def parameters(self, block: Block) -> tuple[float, float]:
        """Return the elements of this rank's weights of a block, and those of its experts."""
        dense = experts = 0.0
        for fqn in block.parameters:
            numel = self.graph.parameter_by_fqn[fqn].numel
            if ".experts." in fqn:
                experts += numel / self.sizes.ep
            else:
                dense += numel / self.sizes.tp
        return dense, experts

    # -- operations -------------------------------------------------------------------------

    def _operations(self, found: Iterable[OpRecord], *, is_layer: bool) -> Iterator[OpRecord]:
        found = tuple(found)
        if not self.engine.fused_attention:
            found = tuple(unfused(found))
        products = [op for op in found if op.flops]
        experts = max((op.shapes[0][0] for op in products if _is_grouped_weight(op)), default=1)
        yield from (self._shared(op, experts, is_layer=is_layer) for op in products)
        if self.engine.fused and is_layer:
            yield from self._one_pass(found)
        else:
            yield from (self._shared(op, 1, is_layer=False) for op in found if not op.flops)

    def _shared(self, op: OpRecord, experts: int, *, is_layer: bool) -> OpRecord:
        """Return this rank's part of an operation."""
        num_bytes = op.bytes_moved // self.shared
        if not op.flops or is_attention(op):
            return replace(op, flops=op.flops // self.shared, bytes_moved=num_bytes)
        sides = product_sides(op)
        dtype = op.dtype
        wide = len(sides) == 3 and min(sides) > 256  # not a router
        if self.engine.precision and is_layer and wide and op.name != "aten.bmm":
            dtype = self.engine.precision
        if len(sides) != 3:
            return replace(op, flops=op.flops // self.shared, bytes_moved=num_bytes, dtype=dtype)
        if "grouped" in op.name:
            rows = sides[0] / (experts if len(op.shapes[0]) == 2 else 1)
            one: tuple[float, ...] = (rows * self.sizes.ep / self.shared, *sides[1:])
            num_bytes = self._grouped_bytes(op, one, experts)
        else:
            one = self._divided(sides)
        a, b, c = (max(1, round(side)) for side in one)
        return replace(
            op, name="aten.mm", dtype=dtype, shapes=((a, b), (b, c)), bytes_moved=num_bytes,
            flops=op.flops // self.shared,
        )  # fmt: skip

    def _divided(self, sides: tuple[float, ...]) -> tuple[float, ...]:
        """Tokens are divided by ``cp``, the longer of the other sides by ``tp``."""
        rest = list(sides)
        tokens = self.tokens if self.tokens in rest else max(rest)
        rest.remove(tokens)
        longer = max(rest)
        rest.remove(longer)
        return (tokens / self.sizes.cp, longer / self.sizes.tp, rest[0])

    def _grouped_bytes(self, op: OpRecord, one: tuple[float, ...], experts: int) -> int:
        rows, a, b = one
        local = experts / self.sizes.ep
        size = DTYPE_BYTES.get(op.dtype, 2)
        return int(size * local * (rows * a + rows * b + a * b))

    # -- the fused engine -------------------------------------------------------------------

    def _one_pass(self, found: tuple[OpRecord, ...]) -> Iterator[OpRecord]:
        """Everything between the products: norms, activations, residuals, casts."""
        backward = any("backward" in op.name for op in found)
        products = [op for op in found if op.flops and not is_attention(op)]
        inner = self._inner_elements(products) / (2 if backward else 1)
        norms = self._norm_elements(found)
        if backward:  # counted by the products alone: a layer norm's gradient has many forms
            norms = 2 * self.tokens * self.hidden
        # A norm reads the sum of two, writes it and its result; an activation reads and writes.
        moved = _HALF_BYTES * (inner + 4 * norms) * (2 if backward else 1)
        if self.engine.precision in _QUANTIZED:
            read = sum(op.count * _rows(op) for op in products) / (2 if backward else 1)
            moved += 4 * read  # read in 16 bits, written by rows and by columns
        kernels = max(1, 2 * len(products))
        yield OpRecord(
            "fused.pointwise", "vector", "bfloat16", (), 0,
            int(moved / self.shared / kernels), kernels,
        )  # fmt: skip

    def _inner_elements(self, products: Collection[OpRecord]) -> float:
        """Elements that products read and write besides the residual stream."""
        return sum(op.count * self._inner(op) for op in products)

    def _inner(self, op: OpRecord) -> float:
        sides = product_sides(op)
        if len(sides) != 3:
            return 0.0
        if "grouped" in op.name:
            rows = op.shapes[-1][0] if len(op.shapes[0]) == 3 else sides[0]
            return rows * (sides[1] + (sides[2] if sides[2] != self.hidden else 0))
        tokens = self.tokens
        if tokens not in sides or op.name == "aten.bmm":
            return 0.0
        rest = list(sides)
        rest.remove(tokens)
        if self.hidden in rest:
            rest.remove(self.hidden)
        return float(tokens * sum(rest))

    def _norm_elements(self, found: Iterable[OpRecord]) -> float:
        return sum(
            op.count * prod(op.shapes[0]) for op in found if op.name.split(".")[-1] in _NORMS
        )

    def _kept_bytes(self, block: Block) -> float:
        """Bytes that a fused layer keeps for its backward pass."""
        found = block.forward_ops
        products = [op for op in found if op.flops and not is_attention(op)]
        kept = _HALF_BYTES * self._inner_elements(products)
        norms = self._norm_elements(found)
        kept += 2 * _HALF_BYTES * norms
        if self.engine.dropout:
            kept += 2 * self.tokens * self.hidden
        for op in found:
            if is_attention(op):
                rows = op.count * prod(op.shapes[0][:-1])
                width = op.shapes[1][-2]
                per_row = _FLOAT_BYTES if self.engine.fused_attention else (
                    _UNFUSED_ATTENTION_BYTES * width
                )  # fmt: skip
                kept += rows * per_row
        return kept / self.shared

    def _recomputed(
        self, block: Block, forward: tuple[OpRecord, ...], saved: float
    ) -> tuple[float, float]:
        """Return the seconds that recomputation adds and the bytes that are still kept."""
        wanted = self.sizes.recompute
        if "full" in wanted:
            entering = _HALF_BYTES * self.tokens * self.hidden / self.shared
            return self.roofline.seconds(forward), entering
        again_s = 0.0
        inner = {op: self._inner(op) * op.count for op in block.forward_ops if op.flops}
        for op, mine in inner.items():
            part = _part(op, self.hidden)
            if part == "attention" and "core_attn" in wanted:
                again_s += self.roofline.seconds([self._shared(op, 1, is_layer=True)])
            if part == "mlp" and "mlp" in wanted:
                again_s += self.roofline.seconds([self._shared(op, 1, is_layer=True)])
                saved -= _HALF_BYTES * mine / self.shared
            if part == "experts" and "moe_act" in wanted and op.shapes[0][-1] == self.hidden:
                saved -= _HALF_BYTES * mine / self.shared
            if part == "latent" and "mla_up_proj" in wanted:
                again_s += self.roofline.seconds([self._shared(op, 1, is_layer=True)])
                saved -= _HALF_BYTES * mine / self.shared
        if "layernorm" in wanted:
            saved -= 2 * _HALF_BYTES * self.tokens * self.hidden / self.shared
        return again_s, saved

    # -- collectives of a layer --------------------------------------------------------------

    def _exchanged_s(self, block: Block) -> float:
        """Seconds of one pass that collectives within a layer add."""
        machine, sizes = self.machine, self.sizes
        kernels = machine.devices[0].kernels
        share = kernels.link_share if kernels else 1.0
        stream = _HALF_BYTES * self.tokens * self.hidden / sizes.cp
        products = [op for op in block.forward_ops if op.flops]
        parts = sum((any(map(is_attention, products)), len(products) > 1))
        link = rank_link(machine, sizes.tp)
        # Per part of a layer one all-gather before it and one reduce-scatter behind it.
        tensor_s = 2 * parts * ring_s(link, stream, sizes.tp, share)
        found = tensor_s * (1 - self.engine.tensor_overlap)
        routed = next((op for op in products if _is_grouped_weight(op)), None)
        if routed is not None and sizes.ep > 1:
            rows = routed.shapes[-1][0] * self.hidden * _HALF_BYTES / self.shared
            link = rank_link(machine, sizes.ep)
            found += 2 * ring_s(link, rows, sizes.ep, share) * (1 - self.engine.expert_overlap)
        attention = next((op for op in products if is_attention(op)), None)
        if attention is not None and sizes.cp > 1:
            moved = _HALF_BYTES * sum(map(prod, attention.shapes[1:3])) / sizes.tp
            link = rank_link(machine, sizes.cp, sizes.tp)
            beside_s = self.roofline.seconds([self._shared(attention, 1, is_layer=True)])
            found += max(0.0, ring_s(link, moved, sizes.cp, share) - beside_s)
        return found

    # -- once per step -----------------------------------------------------------------------

    def state_bytes(self, dense: float, experts: float) -> float:
        """Bytes of weights, gradients and optimizer state of so many elements of a rank."""
        sizes, total = self.sizes, 0.0
        copies = sizes.dp * sizes.cp
        for numel, ranks in ((dense, copies), (experts, max(1, copies * sizes.tp // sizes.ep))):
            weights, gradients, state = (numel * size for size in (2, self.engine.gradient_bytes, 12))
            total += weights / (ranks if sizes.zero_stage >= 3 else 1)
            total += gradients / (ranks if sizes.zero_stage >= 2 else 1)
            total += state / (ranks if sizes.zero_stage >= 1 else 1)
        return total

    def update_s(self, dense: float, experts: float) -> float:
        """Seconds of Adam over the elements of a rank."""
        copies = self.sizes.dp * self.sizes.cp if self.sizes.zero_stage else 1
        of_experts = max(1, copies * self.sizes.tp // self.sizes.ep) if copies > 1 else 1
        return _ADAM_BYTES * (dense / copies + experts / of_experts) / self.roofline.bytes_per_s

    def reduction_s(self, dense: float, experts: float) -> float:
        """Seconds of reducing gradients and gathering weights over the data parallel ranks."""
        sizes, kernels = self.sizes, self.machine.devices[0].kernels
        share = kernels.link_share if kernels else 1.0
        copies = sizes.dp * sizes.cp
        moved = self.engine.gradient_bytes + _HALF_BYTES
        link = rank_link(self.machine, copies, sizes.tp)
        found = ring_s(link, moved * dense, copies, share)
        if experts:
            ranks = max(1, copies * sizes.tp // sizes.ep)
            link = rank_link(self.machine, ranks, sizes.ep)
            found += ring_s(link, moved * experts, ranks, share)
        return found


def _is_grouped_weight(op: OpRecord) -> bool:
    return "grouped" in op.name and len(op.shapes[0]) == 3


def _rows(op: OpRecord) -> float:
    """Elements of the activation that a product reads."""
    first, second = [shape for shape in op.shapes if len(shape) >= 2][-2:]
    return float(prod(second) if len(first) == 3 else prod(first))


def _part(op: OpRecord, hidden: int) -> str:
    """Return which part of a layer a product belongs to, for selective recomputation."""
    if is_attention(op):
        return "attention"
    if "grouped" in op.name:
        return "experts"
    sides = product_sides(op)
    if len(sides) == 3 and hidden not in sides:
        return "latent"
    return "mlp" if len(sides) == 3 and max(sides[1:]) > 2 * hidden else "projection"
