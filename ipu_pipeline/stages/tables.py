"""The tables of serialized blocks, and those whose rows several stages hold.

A block's table is its parameter with the most rows among the two-dimensional ones that it looks
up (``functional.embedding``) or multiplies with (``functional.linear``).

A row-sharded embedding is held by several consecutive stages: each looks its own rows up. A stage
before the block's own adds the rows that it holds to what it receives (an id of another stage's row
gives zeros) and sends the sum on; the block's lookup adds the last rows. The sum of one row and
zeros is that row, so nothing is rounded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.embedding import embedding_serialized


@dataclass(frozen=True)
class Table:
    """The parameter (V rows of H) that a block reads in ``factor`` slices."""

    block: str
    parameter: nn.Parameter
    factor: int


class TableCalls(TorchFunctionMode):
    """While active, lookups and projections go through :meth:`on_call`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding or func is functional.linear:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            return self.on_call(func, weight, args, kwargs)
        return func(*args, **kwargs)

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """Return what a call of ``functional.embedding`` or ``functional.linear`` returns."""
        raise NotImplementedError


class TableUses(TableCalls):
    """While active, notes which parameters are used as tables.

    Attributes:
        refused: Why a table cannot be sliced, by its id; empty when it can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[int, str] = {}

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        """Note the table."""
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            reason = _why_not(*args, **kwargs) if func is functional.embedding else ""
            self.refused[id(weight)] = self.refused.get(id(weight)) or reason
        return func(*args, **kwargs)


def _why_not(
    _ids: Any,
    _weight: Any,
    _padding_idx: Any = None,
    max_norm: float | None = None,
    *_norm_type_and_scale: Any,
    sparse: bool = False,
    **_others: Any,
) -> str:
    if max_norm is not None:
        return f"its lookup rescales rows in place (max_norm={max_norm})"
    if sparse or _norm_type_and_scale[2:] == (True,):
        return "its lookup asks for sparse gradients, serialized ones end dense (sparse=True)"
    return ""


def check_blocks(plan: Plan) -> None:
    """Refuse what can be told before anything runs.

    Raises:
        LoweringError: A serialized block has no parameter.
    """
    parameters = {block.name: len(block.parameters) for block in plan.blocks}
    for block in serialized(plan):
        if not parameters[block]:
            raise _no_table(block)


def serialized(plan: Plan) -> dict[str, int]:
    """Return the number of slices by block, for blocks with more than one."""
    return {name: f for stage in plan.stages for name, f in stage.serialize.items() if f > 1}


def find_tables(
    captured: CapturedModel, uses: TableUses, factors: Mapping[str, int]
) -> dict[str, Table]:
    """Return the table of every block that ``factors`` names; ``uses`` was active in the capture.

    Raises:
        LoweringError: A block has no table, a table with fewer rows than slices, or one that
            cannot be sliced.
    """
    names = {id(parameter): name for name, parameter in captured.model.named_parameters()}
    tables = {}
    for program in captured.programs:
        factor = factors.get(program.name, 1)
        if factor == 1:
            continue
        candidates = [p for p in program.module.parameters() if id(p) in uses.refused]
        if not candidates:
            raise _no_table(program.name)
        table = max(candidates, key=len)
        if len(table) < factor:
            raise LoweringError(
                f"block {program.name!r} cannot be serialized into {factor} slices: its table "
                f"{names[id(table)]!r} has {len(table)} rows; use a factor from 1 to {len(table)}"
            )
        reason = uses.refused[id(table)]
        if reason:
            raise LoweringError(
                f"block {program.name!r} cannot be serialized: {reason}; change the module, or "
                "plan without serializing this block"
            )
        tables[program.name] = Table(program.name, table, factor)
    return tables


def fused_projections(
    own: Sequence[Program],
    everywhere: Sequence[Program],
    kept: Iterable[str],
    tables: Mapping[str, Table],
) -> frozenset[str]:
    """Return the serialized blocks whose outputs only the loss of the same stage reads.

    ``own`` are the programs of the stage, ``kept`` the values that the caller gets.
    """
    if LOSS not in {program.name for program in own}:
        return frozenset()
    elsewhere = set(kept)
    elsewhere.update(v for program in everywhere if program.name != LOSS for v in program.inputs)
    return frozenset(
        program.name
        for program in own
        if program.name in tables and not elsewhere.intersection(program.outputs)
    )


def _no_table(block: str) -> LoweringError:
    return LoweringError(
        f"block {block!r} cannot be serialized: it has no table (a two-dimensional parameter used "
        "by functional.embedding or functional.linear); plan without serializing this block"
    )


@dataclass(frozen=True)
class RowShard:
    """The rows of a table that one stage holds.

    Attributes:
        table: The whole table.
        num_slices: How many of its slices these are.
        rows: First row, and the one behind the last.
        ids: Name of the value that is looked up.
        received: Name of the sum of earlier stages' rows; empty in the first one.
        sent: Name of the sum that goes on; empty in the stage of the block.
        padding_idx: Row without gradient.
        scale_grad_by_freq: As in ``functional.embedding``.
    """

    table: Table
    num_slices: int
    rows: tuple[int, int]
    ids: str
    received: str
    sent: str
    padding_idx: int | None
    scale_grad_by_freq: bool

    def look_up(self, ids: Tensor, weight_VH: Tensor, received: Tensor | None) -> Tensor:
        """Return the rows of ``ids`` that this stage holds, added to ``received``.

        Raises:
            IndexError: An id is in no stage's rows.
        """
        num_rows = len(weight_VH)
        if (
            received is None
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < num_rows
        ):
            raise IndexError(
                f"ids from {int(ids.min())} to {int(ids.max())} are looked up in the table of "
                f"block {self.table.block!r}, which has {num_rows} rows"
            )
        found = embedding_serialized(
            ids,
            weight_VH,
            factor=self.num_slices,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            rows=self.rows,
        )
        return found if received is None else received + found


def shard_tables(
    captured: CapturedModel, plan: Plan, tables: Mapping[str, Table]
) -> dict[int, tuple[RowShard, ...]]:
    """Return what every stage holds of tables that several stages hold, by stage.

    Raises:
        LoweringError: The block does not look its table up exactly once, in ids that follow from
            the model inputs alone.
    """
    holders: dict[str, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
    for index, stage in enumerate(plan.stages):
        for block, slices in stage.table_slices.items():
            holders[block].append((index, slices))
    programs = {program.name: program for program in captured.programs}
    row_shards: dict[int, list[RowShard]] = defaultdict(list)
    for block, held in holders.items():
        if len(held) == 1 or block not in programs:
            continue
        table = tables[block]
        lookup = _find_lookup(captured, programs[block], table)
        num_rows = len(table.parameter)
        step = -(-num_rows // table.factor)
        for position, (stage_index, (first, last)) in enumerate(held):
            if first * step >= num_rows:
                raise LoweringError(
                    f"block {block!r} spreads {num_rows} rows over more stages than have any: a "
                    f"stage would start at row {first * step}; use fewer slices"
                )
            row_shards[stage_index].append(
                RowShard(
                    table=table,
                    num_slices=last - first,
                    rows=(first * step, min(last * step, num_rows)),
                    received=f"{block}.rows@{stage_index - 1}" if position else "",
                    sent=f"{block}.rows@{stage_index}" if position < len(held) - 1 else "",
                    **lookup,
                )
            )
    return {index: tuple(found) for index, found in row_shards.items()}


class _Lookups(TableCalls):
    """Notes how a table is looked up."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table
        self.calls: list[dict[str, Any]] = []

    def on_call(self, func: Any, weight: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
        if weight is self.table:
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            self.calls.append(call if func is functional.embedding else {})
        return func(*args, **kwargs)


def _find_lookup(captured: CapturedModel, program: Program, table: Table) -> dict[str, Any]:
    """Run ``program`` without data; return which of its inputs it looks up, and how."""
    seen = _Lookups(table.parameter)
    inputs: list[Any] = []
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for name in program.inputs:
                if name in captured.glue.hosts:
                    inputs.append(captured.glue.hosts[name])
                    continue
                spec = captured.specs[name]
                inputs.append(torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))
            with seen:
                program(*inputs)
    except (RuntimeError, KeyError) as error:
        raise LoweringError(
            f"the table of block {program.name!r} cannot be held by several stages: what the block "
            f"looks up depends on values ({error}); plan without splits"
        ) from error
    calls = [call for call in seen.calls if call]
    ids = [
        n for n, v in zip(program.inputs, inputs, strict=True) if calls and v is calls[0]["input"]
    ]
    if len(seen.calls) != 1 or not ids:
        raise LoweringError(
            f"the table of block {program.name!r} cannot be held by several stages: the block must "
            "use it once, to look up one of its own inputs unchanged; plan without splits"
        )
    if any(ids[0] in other.outputs for other in captured.programs):
        raise LoweringError(
            f"the table of block {program.name!r} cannot be held by several stages: another block "
            f"computes the ids ({ids[0]}); plan without splits"
        )
    padding_idx = calls[0].get("padding_idx")
    if padding_idx is not None:
        padding_idx %= len(table.parameter)
    scale = bool(calls[0].get("scale_grad_by_freq"))
    return {"ids": ids[0], "padding_idx": padding_idx, "scale_grad_by_freq": scale}
