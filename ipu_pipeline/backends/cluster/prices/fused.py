"""What a layer moves and keeps under an engine that fuses what stands between its products.

Megatron-Core with Transformer RankEngine and ``torch.compile`` run norms, activations, dropout and
residuals as few passes over what the products read and write, and keep only that for the backward
pass. All of it follows from the operations of a captured layer:

* ``inner``: what its products read and write besides the residual stream (queries, keys, values,
  results of attention, the wide tensors of an MLP, routed rows).
* norms: each keeps its input and its result.
* attention: keeps one number per row.

Source: Korthikanti et al., Reducing Activation Recomputation, MLSys 2023: ``34 s b h`` bytes for a
GPT layer with dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ipu_pipeline.backends.cluster.prices.parallel_sizes import RankEngine
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import Block, OpRecord
from ipu_pipeline.planner.options.roofline import product_sides

_NORMS = frozenset({"native_layer_norm", "rms_norm", "_fused_rms_norm", "mean"})
_HALF_BYTES, _FLOAT_BYTES = 2, 4
# Bytes of an element of what products read, by their precision.
_QUANTIZED_BYTES = {"float8": 1.0, "float4": 0.5}
# Times that routed rows are read or written besides products: to and from the order of the
# sender's experts, and to and from that of the receiver's, before and behind the experts.
_ROUTING_PASSES = 8


@dataclass(frozen=True)
class FusedLayer:
    """The counts of one captured layer, for all ranks that share it together.

    Attributes:
        operations: Of its forward pass.
        tokens: Of one microbatch.
        hidden: Width of the residual stream.
        engine: How operations run.
    """

    operations: tuple[OpRecord, ...]
    tokens: int
    hidden: int
    engine: RankEngine

    @property
    def products(self) -> list[OpRecord]:
        """Matrix products, without attention."""
        return [op for op in self.operations if op.flops and not is_attention(op)]

    @property
    def attentions(self) -> list[OpRecord]:
        """Its attention operations."""
        return [op for op in self.operations if is_attention(op)]

    @property
    def norms(self) -> float:
        """Elements that its norms read."""
        found = (op for op in self.operations if op.name.split(".")[-1] in _NORMS)
        return sum(op.count * prod(op.shapes[0]) for op in found)

    @property
    def routed_rows(self) -> int:
        """Tokens times the experts of each."""
        return max((op.shapes[-1][0] for op in self.products if is_grouped(op)), default=0)

    def inner(self, op: OpRecord) -> float:
        """Elements that a product reads and writes besides the residual stream."""
        sides = product_sides(op)
        if len(sides) != 3:
            return 0.0
        if is_grouped(op):
            wide = sides[2] if sides[2] != self.hidden else 0
            return op.count * op.shapes[-1][0] * (sides[1] + wide)
        rest = list(sides)
        if self.tokens not in rest:
            return 0.0
        rest.remove(self.tokens)
        if self.hidden in rest:
            rest.remove(self.hidden)
        return op.count * self.tokens * sum(rest)

    def pass_bytes(self, *, backward: bool) -> float:
        """Bytes that move between the products of one pass.

        A norm reads a sum of two, writes it and its result; the backward pass of everything
        reads and writes twice as much. Quantized products read what one more pass wrote, by rows
        and by columns.
        """
        moved = _HALF_BYTES * (sum(map(self.inner, self.products)) + 4 * self.norms)
        moved *= 2 if backward else 1
        moved += _HALF_BYTES * _ROUTING_PASSES * self.hidden * self.routed_rows
        if self.engine.precision in _QUANTIZED_BYTES:
            moved += 4 * sum(op.count * _rows_read(op) for op in self.products)
        return moved

    def kept_bytes(self) -> float:
        """Bytes that it keeps for its backward pass."""
        kept = _HALF_BYTES * (sum(map(self.inner, self.products)) + 2 * self.norms)
        quantized = _QUANTIZED_BYTES.get(self.engine.precision)
        if quantized is not None:
            # Results of norms and of attention are kept once, however many products read them.
            attended = sum(prod(op.shapes[0][:-1]) * op.shapes[2][-1] for op in self.attentions)
            own = (op for op in self.products if is_grouped(op) or self._narrows(op, attended))
            read = self.norms + attended + sum(op.count * _rows_read(op) for op in own)
            kept -= (_HALF_BYTES - quantized) * read
        if self.engine.dropout:
            kept += 2 * self.tokens * self.hidden
        return kept + sum(map(self._attention_kept_bytes, self.attentions))

    def _narrows(self, op: OpRecord, attended: int) -> bool:
        """Whether a product turns wide rows of an MLP into those of the residual stream."""
        (tokens, wide), (_, width) = (shape[-2:] for shape in op.shapes[-2:])
        return width == self.hidden != wide and tokens * wide != attended

    def _attention_kept_bytes(self, op: OpRecord) -> float:
        return float(_FLOAT_BYTES * op.count * prod(op.shapes[0][:-1]))


def is_grouped(op: OpRecord) -> bool:
    """Whether ``op`` is a product of every expert's weights with its own rows."""
    return "grouped" in op.name and len(op.shapes[0]) == 3


def _rows_read(op: OpRecord) -> float:
    """Elements of the activation that a product reads."""
    first, second = [shape for shape in op.shapes if len(shape) >= 2][-2:]
    return float(prod(second) if len(first) == 3 else prod(first))


def fused_loss(block: Block, *, backward: bool) -> tuple[OpRecord, ...]:
    """Return the operations of a head or a loss where one kernel takes the logits in 16 bits.

    Forward it reads them twice (largest one and sum, then the gradient), backward it reads and
    writes what became the gradient.
    """
    own = block.backward_ops if backward else block.forward_ops
    if block.kind == "head":
        return tuple(op for op in own if op.flops)
    moved = 2 * _HALF_BYTES * logits(block)
    return (OpRecord("fused.loss", "softmax", "bfloat16", (), 0, moved),) if own else ()


def logits(block: Block) -> int:
    """Number of logits that a head makes or a loss reads."""
    if block.kind == "head":
        return max((written(op) for op in block.forward_ops if op.flops), default=0)
    return max((prod(op.shapes[0]) for op in block.forward_ops if op.shapes), default=0)


def written(op: OpRecord) -> int:
    """Return the elements that a product makes."""
    first, second = [shape for shape in op.shapes if len(shape) >= 2][-2:]
    return prod(first[:-1]) * second[-1]
