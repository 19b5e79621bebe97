"""A spread vocabulary as blocks: what every share computes and holds, and what stays where it was.

A share of R of V rows is a few blocks of the model's own operations with R in the place of V, so
that every backend prices it as it prices the whole head:

* the projection of its rows, and the gradient of the hidden states from them (``head[0:R]``);
* softmax and loss over its logits (``loss[0:R]``);
* the gradient of its rows (``head[0:R].rows``), which nobody waits for;
* the lookups: all tokens, those of other shares masked (``embedding[0:R]``).

A transform before the projection, the scalar loss, position embeddings stay in their blocks.

Memory of a share, beside weights, gradients and optimizer state of its rows: the softmax of its
rows in float32 and the hidden states, of as many microbatches as the gradient of the rows is put
off; the gradient of the hidden states in float32; that of the rows.

Messages of a microbatch: hidden states to every share, the sum of their gradients and two numbers a
token back; of every lookup the sum of the rows found, and its gradient back. Megatron's fork runs
them as rings beside other kernels; this project's last stage sends to and hears from the others one
by one. In one memory there are none, and lookups stay whole.

Source: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025
(arXiv 2411.05288), algorithm 2 and appendix C.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from ipu_pipeline.ir.graph import (
    DTYPE_BYTES,
    Block,
    BlockGraph,
    OpRecord,
    ParameterSpec,
    tensor_bytes,
)
from ipu_pipeline.ir.machine import Link
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.options.tables import FusedHead, VocabularyTable, looked_up, table_of
from ipu_pipeline.planner.options.vocabulary import lookups, spread_head

# Microbatches of which a stage keeps the softmax until it computes the gradient of its rows.
PUT_OFF = 2
_FLOAT_BYTES = 4
_STATISTICS = 2  # largest logit and sum of a token
_HOPS = 3  # a broadcast in a ring passes a link once, a sum (all-reduce) twice
Range = tuple[int, int]
_SHARE = re.compile(r"(.+)\[(\d+):(\d+)\]")


@dataclass(frozen=True)
class Share:
    """Names of the blocks of one share.

    Attributes:
        softmax: What the last stage's backward pass waits for.
        rows: What nobody waits for.
    """

    softmax: tuple[str, ...]
    rows: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.softmax, *self.rows)


@dataclass(frozen=True)
class VocabularyShares:
    """Head, loss and lookups of one graph, ready to be shared out.

    Attributes:
        graph: With whole blocks.
        with_lookups: Whether lookups are shared out, too; not where all stages see one table.
    """

    graph: BlockGraph
    with_lookups: bool = True

    @cached_property
    def pair(self) -> FusedHead:
        """Projection and loss."""
        return spread_head(self.graph)

    @cached_property
    def tables(self) -> dict[str, VocabularyTable]:
        """Tables of the blocks that look up."""
        found = {name: table_of(self.graph, self.graph[name]) for name in self._lookups}
        return {name: table for name, table in found.items() if table is not None}

    @cached_property
    def _lookups(self) -> tuple[str, ...]:
        return tuple(lookups(self.graph, self.pair)) if self.with_lookups else ()

    @property
    def size(self) -> int:
        """Rows of the table."""
        return self.pair.table.rows

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states that every share multiplies its rows with."""
        products = (op for op in self.pair.head.forward_ops if self._is_projection(op))
        dtype = next((op.dtype for op in products), self.pair.logits.dtype)
        return tensor_bytes((self.pair.tokens, self.pair.table.width), dtype)

    @cached_property
    def looked_up_bytes(self) -> tuple[int, ...]:
        """Bytes of the rows that every lookup finds."""
        return tuple(
            looked_up(self.graph[name], table) * table.num_bytes // table.rows
            for name, table in self.tables.items()
        )

    def message_s(self, link: Link | None, overlap: float = 0.0) -> tuple[float, float]:
        """Seconds of a share's messages for the softmax, and of those for the lookups.

        Args:
            link: The slowest one between two of its devices; ``None``: they share a memory.
            overlap: Share of them that runs beside passes.
        """
        if link is None:
            return 0.0, 0.0
        numbers = _STATISTICS * _FLOAT_BYTES * self.pair.tokens
        softmax_s = _HOPS * link.transfer_s(self.hidden_bytes) + link.transfer_s(numbers)
        rows_s = sum(_HOPS * link.transfer_s(num_bytes) for num_bytes in self.looked_up_bytes)
        return (1 - overlap) * softmax_s, (1 - overlap) * rows_s

    def shared(self, ranges: Sequence[Range]) -> tuple[BlockGraph, tuple[Share, ...]]:
        """Return the graph with shares as blocks, and their names, for every range of rows."""
        made = [self._blocks(*span) for span in ranges]
        blocks = (*map(self._rest, self.graph.blocks), *(b for own, _ in made for b in own))
        users: dict[str, list[str]] = {}
        for block in blocks:
            for fqn in block.parameters:
                users.setdefault(fqn, []).append(block.name)
        tensors = tuple(
            replace(one, shape=(*one.shape[:-1], 1), kept=False) if one is self.pair.logits else one
            for one in self.graph.tensors
        )
        parameters = tuple(
            replace(spec, blocks=tuple(users[spec.fqn]))
            for whole in self.graph.parameters
            for spec in self._specs(whole, ranges)
            if spec.fqn in users
        )
        graph = replace(self.graph, blocks=blocks, tensors=tensors, parameters=parameters)
        return graph, tuple(share for _, share in made)

    def measured(
        self, seconds: Mapping[str, tuple[float, float]], ranges: Sequence[Range]
    ) -> dict[str, tuple[float, float]]:
        """Return measured seconds of all blocks with shares; nothing where there are none.

        Every share of a lookup writes the rows of all tokens; of the head, half of the backward
        pass is the gradient of the rows.
        """
        if not seconds:
            return {}
        head, loss, found = self.pair.head.name, self.pair.loss.name, dict(seconds)
        products = sum(op.flops * op.count for op in self.pair.head.forward_ops
                       if self._is_projection(op))  # fmt: skip
        moved = products / max(1, self.pair.head.forward_flops)
        (forward_s, backward_s), loss_s = seconds[head], seconds[loss]
        for first, end in ranges:
            part = moved * (end - first) / self.size
            found[rows_name(head, first, end)] = part * forward_s, part * backward_s / 2
            found[f"{rows_name(head, first, end)}.rows"] = 0.0, part * backward_s / 2
            of_loss = (end - first) / self.size
            found[rows_name(loss, first, end)] = of_loss * loss_s[0], of_loss * loss_s[1]
            for name in self.tables:
                own = seconds[name]
                found[rows_name(name, first, end)] = own[0], of_loss * own[1]
        found[head] = (1 - moved) * forward_s, (1 - moved) * backward_s
        return found | dict.fromkeys((loss, *self.tables), (0.0, 0.0))

    # -- what stays ------------------------------------------------------------------------------

    def _rest(self, block: Block) -> Block:
        if block.name not in (self.pair.head.name, self.pair.loss.name, *self.tables):
            return block
        saved, kept, space = block.saved_bytes, block.kept_bytes, block.workspace_bytes
        logits, tokens = self.pair.logits, self.pair.tokens
        if block.name == self.pair.head.name:
            saved -= self.pair.saved_logits_bytes
            kept = max(0, kept - logits.num_bytes) if logits.kept else kept
            space = min(space, self.hidden_bytes)
        elif block.name == self.pair.loss.name:
            saved = max(0, saved - tokens * self.size * _FLOAT_BYTES)
            space = min(space, tokens * _FLOAT_BYTES)
        else:
            space = max(0, space - self.tables[block.name].num_bytes)
        return replace(
            block,
            parameters=tuple(p for p in block.parameters if not self._is_spread(p)),
            forward_ops=tuple(op for op in block.forward_ops if not self._moves(block, op)),
            backward_ops=tuple(op for op in block.backward_ops if not self._moves(block, op)),
            saved_bytes=saved, kept_bytes=kept, workspace_bytes=space,
            cut_bytes=min(block.cut_bytes, saved),
            cut_workspace_bytes=min(block.cut_workspace_bytes, space),
        )  # fmt: skip

    def _moves(self, block: Block, op: OpRecord) -> bool:
        """Whether an operation of a block is one of the shares'."""
        if block.name in self.tables:
            table = self.tables[block.name]
            gradient = op.kind == "scatter" and "embedding" in op.name
            return gradient or op.shapes[:1] == ((table.rows, table.width),)
        return any(self.size in shape for shape in op.shapes)

    def _is_spread(self, fqn: str) -> bool:
        """Whether a parameter has one entry for each row: tables and biases of the logits."""
        if fqn in {table.parameter for table in self.tables.values()}:
            return True
        spec = self.graph.parameter_by_fqn[fqn]
        return fqn in self.pair.head.parameters and spec.shape[:1] == (self.size,)

    def _specs(self, whole: ParameterSpec, ranges: Sequence[Range]) -> Iterator[ParameterSpec]:
        yield whole
        for first, end in ranges if self._is_spread(whole.fqn) else ():
            shape = (end - first, *whole.shape[1:])
            yield replace(whole, fqn=rows_name(whole.fqn, first, end), shape=shape, aliases=())

    # -- a share ---------------------------------------------------------------------------------

    def _blocks(self, first: int, end: int) -> tuple[tuple[Block, ...], Share]:
        head, loss, rows = self.pair.head, self.pair.loss, end - first
        mine = [p for p in head.parameters if self._is_spread(p)]
        common: dict[str, Any] = {"inputs": (), "outputs": (), "saved_bytes": 0, "kept_bytes": 0,
                                  "cut_bytes": 0, "cut_workspace_bytes": 0}  # fmt: skip
        made = []
        for whole, name, kinds in (
            (head, rows_name(head.name, first, end), (True, False)),
            (loss, rows_name(loss.name, first, end), (True, True)),
            (head, f"{rows_name(head.name, first, end)}.rows", (False, True)),
            *((self.graph[n], rows_name(n, first, end), (True, True)) for n in self.tables),
        ):
            found = [
                [
                    self._part(whole, op, rows)
                    for op in operations
                    if self._moves(whole, op) and kinds[self._is_later(whole, op)]
                ]
                for operations in (whole.forward_ops, whole.backward_ops)
            ]
            own = [self.tables[whole.name].parameter] if whole.name in self.tables else mine
            own = own if kinds[1] and whole is not loss else []
            made.append(
                replace(
                    whole,
                    name=name,
                    parameters=tuple(rows_name(p, first, end) for p in own),
                    forward_ops=tuple(found[0]),
                    backward_ops=tuple(found[1]),
                    workspace_bytes=self._space(rows) if whole is head else 0,
                    **common,
                )
            )
        names = [block.name for block in made]
        return tuple(made), Share(tuple(names[:2]), tuple(names[2:]))

    def _is_projection(self, op: OpRecord) -> bool:
        table = (self.pair.table.rows, self.pair.table.width)
        return op.kind == "matmul" and bool({table, table[::-1]} & set(op.shapes))

    def _is_later(self, block: Block, op: OpRecord) -> bool:
        """Whether an operation is one of the gradient of the rows: a product without the table."""
        return block is self.pair.head and op.kind == "matmul" and not self._is_projection(op)

    def _part(self, block: Block, op: OpRecord, rows: int) -> OpRecord:
        """Return an operation over some rows; what does not have their length is read whole."""
        if block.name not in self.tables:
            return over_rows(op, self.size, rows)
        moved = op.bytes_moved - int(self.tables[block.name].num_bytes * (1 - rows / self.size))
        shapes = over_rows(op, self.size, rows).shapes
        return replace(op, shapes=shapes, bytes_moved=moved if moved > 0 else op.bytes_moved)

    def _space(self, rows: int) -> int:
        tokens, table = self.pair.tokens, self.pair.table
        kept = tokens * rows * _FLOAT_BYTES + self.hidden_bytes
        gradient = tokens * table.width * _FLOAT_BYTES
        return PUT_OFF * kept + gradient + rows * table.num_bytes // table.rows


def over_rows(op: OpRecord, size: int, rows: int) -> OpRecord:
    """Return ``op`` with ``rows`` in the place of ``size``; what has another length stays whole."""
    whole = int(
        sum(prod(s) * DTYPE_BYTES.get(op.dtype, _FLOAT_BYTES) for s in op.shapes if size not in s)
    )
    whole = min(whole, op.bytes_moved)
    return replace(
        op,
        shapes=tuple(tuple(rows if n == size else n for n in shape) for shape in op.shapes),
        flops=op.flops * rows // size,
        bytes_moved=whole + (op.bytes_moved - whole) * rows // size,
    )


def rows_name(name: str, first: int, end: int) -> str:
    """Return the name of what ``name`` is for the rows from ``first`` to before ``end``."""
    return f"{name}[{first}:{end}]"


def share_of(name: str) -> tuple[str, Range] | None:
    """Return the whole block's (or parameter's) name and the rows; ``None``: it is no share."""
    found = _SHARE.fullmatch(name)
    return found and (found[1], (int(found[2]), int(found[3])))


def shares(graph: BlockGraph) -> dict[str, tuple[Range, ...]]:
    """Return the rows of every share by the name of the spread parameter."""
    found: dict[str, tuple[Range, ...]] = {}
    for fqn in graph.parameter_by_fqn:
        if part := share_of(fqn):
            found[part[0]] = tuple(sorted({*found.get(part[0], ()), part[1]}))
    return found


def with_shares(plan: Plan) -> tuple[Plan, dict[int, Share]]:
    """Return a plan whose shares of the vocabulary are blocks of its stages, and their names."""
    if plan.vocabulary is None:
        return plan, {}
    spread = VocabularyShares(plan.graph, with_lookups=not plan.machine.shared_memory)
    ranges = [(first, end) for _, first, end in plan.vocabulary.rows]
    graph, found = spread.shared(ranges)
    shares = {stage: own for (stage, _, _), own in zip(plan.vocabulary.rows, found, strict=True)}
    stages = tuple(
        replace(stage, blocks=(*stage.blocks, *shares[number].names)) if number in shares else stage
        for number, stage in enumerate(plan.stages)
    )
    measured_s = spread.measured(plan.measured_s, ranges)
    return replace(plan, graph=graph, stages=stages, measured_s=measured_s), shares
