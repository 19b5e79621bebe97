"""Tables spread over IPUs: the rows that one IPU holds are a parameter, their use is a block.

A spread lookup is one block for each share of the rows, in the order of the rows: each adds what it
finds to the sum of those before it, and the last one goes on with the rest of the block. A spread
projection multiplies the same hidden states with each share, and the last one joins the parts. So
stages, copies, memory, the update and the search are those of any other blocks. PopART copies no
variable between IPUs: all uses of a table's share are on one IPU.

Source: ``serialized_embedding_splits_per_ipu`` and ``serialized_projection_splits_per_ipu`` of
optimum-graphcore's ``ipu_config.json``: slices on each IPU, all of one size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod

from ipu_pipeline.backends.ipu.prices.operations import slices_problem
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.errors import ConfigError
from ipu_pipeline.ir.graph import DTYPE_BYTES, Block, BlockGraph, OpRecord, TensorSpec
from ipu_pipeline.planner.options.tables import VocabularyTable, looked_up, table_of
from ipu_pipeline.planner.options.vocabulary_shares import (
    Range,
    over_rows,
    rows_name,
    share_of,
    shares,
)

SHARES = (2, 4)  # of a table, where the planner chooses


def spread_tables(graph: BlockGraph, settings: IPUSettings) -> BlockGraph:
    """Return ``graph`` with the tables spread that ``settings`` spread; those that are, stay.

    Raises:
        ConfigError: There is no such table, its rows cannot be cut so, or a graph that is spread
            already has other shares.
    """
    made = shares(graph)
    for parameter, splits in _splits(graph, settings).items():
        if parameter in made:
            ranges = _ranges(splits, made[parameter][-1][1])
            if not {end for _, end in ranges} <= {end for _, end in made[parameter]}:
                raise ConfigError(
                    f"{parameter!r} is spread in rows {_text(made[parameter])}, and its splits "
                    f"{list(splits)} ask for {_text(ranges)}; training and inference read the same "
                    "shares: give both the same splits, or inference none (all on one IPU)"
                )
            continue
        for name in graph.parameter_by_fqn[parameter].blocks:
            problem = slices_problem(graph, name, sum(splits))
            if problem:
                raise ConfigError(problem)
        rows = graph.parameter_by_fqn[parameter].shape[0]
        if sum(map(bool, splits)) > 1:
            graph = spread_rows(graph, parameter, _ranges(splits, rows))
    return graph


def share_ipus(graph: BlockGraph, settings: IPUSettings) -> dict[str, int]:
    """Return the IPU of every block that has a share of a table which ``settings`` spread."""
    made, found = shares(graph), {}
    for parameter, splits in _splits(graph, settings).items():
        parts = made.get(parameter, ())
        ends = (
            [*accumulate(count * parts[-1][1] // sum(splits) for count in splits)] if parts else []
        )
        for span in parts:
            ipu = next(ipu for ipu, end in enumerate(ends) if span[1] <= end)
            spec = graph.parameter_by_fqn[rows_name(parameter, *span)]
            found.update(dict.fromkeys(spec.blocks, ipu))
    return found


def splits_of(graph: BlockGraph, ipus: Mapping[str, int], settings: IPUSettings) -> IPUSettings:
    """Return ``settings`` that say where the shares of ``graph`` are, all of one number of rows.

    Args:
        graph: A graph of :func:`spread_graphs`, or one without shares.
        ipus: IPU by block.
        settings: The run.
    """
    for parameter, ranges in shares(graph).items():
        users = [graph.parameter_by_fqn[rows_name(parameter, *span)].blocks for span in ranges]
        lookup = any(graph[name].kind == "embedding" for name in users[0])
        what = "embedding" if lookup else "projection"
        slices = max(len(ranges), getattr(settings, f"{what}_factor"))
        counts = [0] * settings.num_ipus
        for names in users:
            counts[ipus[names[0]]] += slices // len(ranges)
        found = {f"{what}_splits": tuple(counts), f"{what}_factor": slices}
        settings = replace(settings, **found)
    return settings


def spread_graphs(graph: BlockGraph) -> Iterator[BlockGraph]:
    """Yield ``graph`` with its large tables in 2 and in 4 shares, those that so many divide."""
    tables = {}
    for block in graph.blocks if not shares(graph) else ():
        table = table_of(graph, block)
        if table is not None and table.is_large and block.kind in ("embedding", "head", "other"):
            tables[table.parameter] = table.rows
    for count in SHARES:
        found = graph
        for parameter, rows in tables.items():
            if rows % count == 0:
                with suppress(ConfigError):  # used as something else, too
                    found = spread_rows(found, parameter, _ranges((1,) * count, rows))
        if found is not graph:
            yield found


def _splits(graph: BlockGraph, settings: IPUSettings) -> dict[str, tuple[int, ...]]:
    """Return the slices on every IPU by the parameter that is spread."""
    found: dict[str, tuple[int, ...]] = {}
    for what, kinds, splits in (
        ("embedding", ("embedding",), settings.embedding_splits),
        ("projection", ("head", "other"), settings.projection_splits),
    ):
        if not splits:
            continue
        field, parameter = f"serialized_{what}_splits_per_ipu", _largest(graph, kinds)
        if parameter is None:
            raise ConfigError(f"{field} is given, but the model has no {what}; set it to null")
        if found.setdefault(parameter, splits) != splits:
            raise ConfigError(
                f"the embedding and the output projection share {parameter!r}, whose rows are on "
                f"one IPU each, but {field}={list(splits)} and the embedding's are "
                f"{list(found[parameter])}; give both the same, or one of them"
            )
    return found


def _largest(graph: BlockGraph, kinds: Sequence[str]) -> str | None:
    """The table with the most rows of the blocks of ``kinds``, by its whole name."""
    rows: dict[str, int] = {}
    for block in graph.blocks:
        if block.kind not in kinds:
            continue
        table = table_of(graph, block)
        if table is not None:
            rows[table.parameter] = table.rows
        for name, (_, end) in filter(None, map(share_of, block.parameters)):
            rows[name] = max(rows.get(name, 0), end)
    return max(rows, key=rows.__getitem__, default=None)


def _ranges(splits: Iterable[int], rows: int) -> tuple[Range, ...]:
    counts = [count for count in splits if count]
    ends = accumulate(counts, initial=0)
    return tuple(pairwise(end * rows // sum(counts) for end in ends))


def _text(ranges: Iterable[Range]) -> str:
    return ", ".join(f"{first} to {end - 1}" for first, end in ranges)


# ---- shares as blocks


def spread_rows(graph: BlockGraph, parameter: str, ranges: Sequence[Range]) -> BlockGraph:
    """Return ``graph`` with every use of ``parameter`` as one block for each range of its rows.

    Raises:
        ConfigError: A block does something else with it than look up or project.
    """
    whole = graph.parameter_by_fqn[parameter]
    made: dict[str, _Spread] = {}
    for name in whole.blocks:
        table = table_of(graph, graph[name])
        if table is None or table.parameter != parameter:
            raise ConfigError(
                f"block {name!r} uses {parameter!r} as no lookup and no projection, so its rows "
                "cannot be on several IPUs; set the splits to null"
            )
        made[name] = _Spread(graph, graph[name], table, tuple(ranges))
    blocks = [
        part for block in graph.blocks
        for part in (made[block.name].blocks() if block.name in made else (block,))
    ]  # fmt: skip
    reads: dict[str, list[str]] = {}
    users: dict[str, list[str]] = {}
    for block in blocks:
        for names, of in ((block.inputs, reads), (block.parameters, users)):
            for item in names:
                of.setdefault(item, []).append(block.name)
    between = [tensor for one in made.values() for tensor in one.between()]
    last = {name: rows_name(name, *ranges[-1]) for name in made}
    parts = [
        replace(whole, fqn=rows_name(parameter, *span), aliases=(),
                shape=(span[1] - span[0], *whole.shape[1:]))
        for span in ranges
    ]  # fmt: skip
    return replace(
        graph,
        blocks=tuple(blocks),
        tensors=tuple(
            replace(
                tensor,
                producer=last.get(tensor.producer or "", tensor.producer),
                consumers=tuple(reads.get(tensor.name, ())),
            )
            for tensor in (*graph.tensors, *between)
        ),
        parameters=tuple(
            replace(spec, blocks=tuple(users[spec.fqn]))
            for one in graph.parameters
            for spec in (parts if one is whole else (one,))
        ),
    )


@dataclass(frozen=True)
class _Spread:
    """One use of a table, in shares."""

    graph: BlockGraph
    block: Block
    table: VocabularyTable
    ranges: tuple[Range, ...]

    @property
    def names(self) -> list[str]:
        return [rows_name(self.block.name, *span) for span in self.ranges]

    @property
    def is_lookup(self) -> bool:
        return self.table.use == "lookup"

    def blocks(self) -> list[Block]:
        """The shares, in the order of the rows; one of them has the rest of the block."""
        rest = len(self.ranges) - 1 if self.is_lookup else 0
        return [self._share(i, is_rest=i == rest) for i in range(len(self.ranges))]

    def between(self) -> list[TensorSpec]:
        """What the shares hand on: the sum so far, or the hidden states and parts of the logits."""
        dtype = self.graph.parameter_by_fqn[self.table.parameter].dtype
        train = self.graph.training
        if self.is_lookup:
            return [
                TensorSpec(f"{name}.sum", self._found, dtype, train and self.table.trainable, name)
                for name in self.names[:-1]
            ]
        first = self.names[0]
        hidden = TensorSpec(f"{self.block.name}.hidden", self._hidden, dtype, train, first)
        return [hidden] + [
            TensorSpec(f"{name}.part", (*self._hidden[:-1], end - start), dtype, train, name)
            for name, (start, end) in zip(self.names[:-1], self.ranges, strict=False)
        ]

    def _share(self, index: int, *, is_rest: bool) -> Block:
        block, last = self.block, index == len(self.ranges) - 1
        start, end = self.ranges[index]
        sent = [tensor.name for tensor in self.between()]
        if self.is_lookup:
            inputs = (*block.inputs, *(sent[index - 1 : index] if index else ()))
            outputs = block.outputs if last else (sent[index],)
        else:
            inputs = (sent[0], *(sent[1:] if last else ())) if index else block.inputs
            outputs = block.outputs if last else (*(() if index else sent[:1]), sent[index + 1])
        hidden = 0 if self.is_lookup or not self.graph.training else self._bytes(self._hidden)
        own = tuple(
            fqn for fqn in block.parameters
            if fqn != self.table.parameter and (last if self._by_row(fqn) else is_rest)
        )  # fmt: skip
        return replace(
            block,
            name=self.names[index],
            parameters=(rows_name(self.table.parameter, start, end), *own),
            inputs=inputs,
            outputs=outputs,
            forward_ops=self._operations(
                block.forward_ops, end - start, rest=is_rest,
                joins=index > 0 and (last or self.is_lookup),
            ),
            backward_ops=self._operations(block.backward_ops, end - start, rest=is_rest),
            saved_bytes=block.saved_bytes if is_rest else hidden,
            kept_bytes=block.kept_bytes if last else 0,
            uses_random=block.uses_random and is_rest,
        )  # fmt: skip

    def _operations(
        self, operations: Sequence[OpRecord], rows: int, *, rest: bool, joins: bool = False
    ) -> tuple[OpRecord, ...]:
        """Return the operations of a share; ``joins``: it takes in what others found."""
        found: list[OpRecord] = []
        lookups = self._lookups
        for op in operations:
            count = op.count if self._has_rows(op) else 0
            if self.is_lookup and op.kind == "scatter" and "embedding" in op.name:
                count = min(op.count, lookups)  # the others are of small tables beside it
                lookups -= count
            if count:
                found.append(replace(over_rows(op, self.table.rows, rows), count=count))
            if rest and op.count > count:
                found.append(replace(op, count=op.count - count))
        if joins:
            found.append(self._join())
        return tuple(found)

    def _join(self) -> OpRecord:
        """The sum of two parts of a lookup, or the parts of the logits side by side."""
        dtype = self.graph.parameter_by_fqn[self.table.parameter].dtype
        if self.is_lookup:
            size = self._bytes(self._found)
            shapes = (self._found, self._found)
            return OpRecord("aten.add", "vector", dtype, shapes, prod(self._found), 3 * size)
        logits = (*self._hidden[:-1], self.table.rows)
        return OpRecord("aten.cat", "copy", dtype, (logits,), 0, 2 * self._bytes(logits))

    def _has_rows(self, op: OpRecord) -> bool:
        if self.is_lookup:
            return op.shapes[:1] == ((self.table.rows, self.table.width),)
        return any(self.table.rows in shape for shape in op.shapes)

    def _by_row(self, fqn: str) -> bool:
        return self.graph.parameter_by_fqn[fqn].shape == (self.table.rows,)

    @property
    def _lookups(self) -> int:
        return sum(op.count for op in self.block.forward_ops if self._has_rows(op))

    @property
    def _found(self) -> tuple[int, ...]:
        return (looked_up(self.block, self.table), self.table.width)

    @property
    def _hidden(self) -> tuple[int, ...]:
        wide = {(self.table.rows, self.table.width), (self.table.width, self.table.rows)}
        products = [
            op for op in self.block.forward_ops if op.kind == "matmul" and wide & {*op.shapes}
        ]
        tokens = sum(op.count * op.flops for op in products) // (
            2 * self.table.rows * self.table.width
        )
        return (tokens, self.table.width)

    def _bytes(self, shape: tuple[int, ...]) -> int:
        dtype = self.graph.parameter_by_fqn[self.table.parameter].dtype
        return int(prod(shape) * DTYPE_BYTES[dtype])
