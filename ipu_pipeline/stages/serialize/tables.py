"""Find the table of every serialized block.

A block's table is its parameter with the most rows among the two-dimensional ones that it looks
up (``functional.embedding``) or multiplies with (``functional.linear``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan


@dataclass(frozen=True)
class Table:
    """The parameter that a block reads in slices.

    Attributes:
        block: Name of the block.
        parameter: The table, V rows of H.
        factor: Number of slices.
    """

    block: str
    parameter: nn.Parameter
    factor: int


class TableUses(TorchFunctionMode):
    """While active, notes which parameters are used as tables.

    Attributes:
        refused: Why a table cannot be sliced, by its id; empty when it can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[int, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding or func is functional.linear:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
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
    """Return the table of every block that ``factors`` names.

    Args:
        captured: The captured model.
        uses: Was active while the model ran.
        factors: Slices by block name.

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

    Args:
        own: Programs of the stage.
        everywhere: Programs of all stages.
        kept: Values that the caller gets.
        tables: Tables by block name.
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
