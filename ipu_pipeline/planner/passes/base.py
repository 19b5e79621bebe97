"""What every pass is, and what passes share: their text, their blocks, writing annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import Block
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.ir.select import select_all, unmatched
from ipu_pipeline.planner.options.tables import table_of


class Pass(Protocol):
    """One decision about how blocks run; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, plan: Plan) -> Plan:
        """Return ``plan`` with this pass's annotations; running it again changes nothing."""
        ...


def chosen_blocks(plan: Plan, patterns: Sequence[str], who: str) -> tuple[str, ...]:
    """Return the blocks that ``patterns`` mean.

    Raises:
        PlanError: A pattern means no block.
    """
    names = [block.name for block in plan.blocks]
    wrong = unmatched(patterns, names)
    if wrong:
        raise PlanError(
            f"{who} names {', '.join(wrong)}, which the plan does not have; its blocks: "
            f"{', '.join(names)}"
        )
    return select_all(patterns, names)


def blocks_with_table(plan: Plan, use: str, patterns: Sequence[str], who: str) -> tuple[Block, ...]:
    """Return the blocks to serialize: those named, else all that have a large table.

    Raises:
        PlanError: A named block has no table for ``use``, or none is named and none has.
    """
    if patterns:
        names = chosen_blocks(plan, patterns, who)
        found = tuple(block for block in plan.blocks if block.name in names)
        wrong = [b.name for b in found if not _has_table(plan, b, use)]
        if wrong:
            able = [b.name for b in plan.blocks if _has_table(plan, b, use)]
            raise PlanError(
                f"{who} names {', '.join(wrong)} without a table for a {use}; blocks with one: "
                f"{', '.join(able) or 'none'}"
            )
        return found
    found = tuple(
        block
        for block in plan.blocks
        if block.kind != "layer" and _has_table(plan, block, use, large=True)
    )
    if not found:
        raise PlanError(
            f"{who} found no block with a large table for a {use}; name the ones you mean with "
            "blocks=[...]"
        )
    return found


def _has_table(plan: Plan, block: Block, use: str, *, large: bool = False) -> bool:
    table = table_of(plan.graph, block)
    return table is not None and table.use == use and (table.is_large or not large)


def with_slices(plan: Plan, factors: Mapping[str, int]) -> Plan:
    """Write the number of slices of some blocks (1: whole) into their stages."""

    def annotated(stage: PlannedStage) -> PlannedStage:
        wanted = {name: factors.get(name, stage.serialize.get(name, 1)) for name in stage.blocks}
        sliced = {name: factor for name, factor in wanted.items() if factor > 1}
        return stage if sliced == stage.serialize else replace(stage, serialize=sliced)

    return replace(plan, stages=tuple(map(annotated, plan.stages)))


def check_patterns(patterns: object, who: str) -> None:
    """Raise a ``ValueError`` for anything but a tuple of names or patterns."""
    if not isinstance(patterns, tuple) or not all(isinstance(item, str) for item in patterns):
        raise ValueError(f"{who}: blocks is {patterns!r}; give a list of names such as [a,b.*]")
