"""Look tables up in slices, and spread a table over consecutive stages where that is asked for.

Changes: ``serialize`` of the stages that run the lookups; with ``splits`` also ``table_slices``.
Requires: blocks whose table is one of a lookup; without ``blocks``, all that have a large one.
    With ``splits``: as many consecutive stages as splits, the last of which runs the block.
Guarantees: these blocks, and no others, get ``factor`` slices; 1 makes them whole again. With
    ``splits`` every slice is in exactly one stage; without, the table is in the block's stage.

::

    before: 0: wte .. h.3
    pass:   serialize_embedding{factor=4}
    after:  0: wte .. h.3 (1 serialized); serialized: wte in 4 slices (stage 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.passes.base import (
    blocks_with_table,
    check_patterns,
    with_slices,
)


@dataclass(frozen=True)
class SerializeEmbedding:
    """Cut lookups into slices.

    Attributes:
        factor: Number of slices, at least 1.
        splits: Slices held by each of the consecutive stages that end with the block's own, as
            ``serialized_embedding_splits_per_ipu`` says; empty: the block's stage holds all.
        blocks: Names, prefixes or patterns; empty: every block with a large table.

    Raises:
        ValueError: A field is out of range, or the splits are not ``factor`` slices together.
    """

    name: ClassVar[str] = "serialize_embedding"
    factor: int
    splits: tuple[int, ...] = ()
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count(f"{self.name}: factor", self.factor, "slices")
        check_patterns(self.blocks, self.name)
        whole = isinstance(self.splits, tuple) and all(
            isinstance(part, int) and part > 0 for part in self.splits
        )
        if not whole:
            raise ValueError(
                f"{self.name}: splits is {self.splits!r}; give the slices of each stage, each "
                "from 1 on, such as [2,2]"
            )
        if self.splits and sum(self.splits) != self.factor:
            raise ValueError(
                f"{self.name}: splits {list(self.splits)} are {sum(self.splits)} slices together, "
                f"factor is {self.factor}; make them equal"
            )

    def run(self, plan: Plan) -> Plan:
        """Annotate the lookups.

        Raises:
            PlanError: A named block has no such table, or none is named and none is large; or a
                block has too few stages before it for the splits.
        """
        found = [b.name for b in blocks_with_table(plan, "lookup", self.blocks, self.name)]
        sliced = with_slices(plan, dict.fromkeys(found, self.factor))
        for name in found:
            sliced = _with_splits(sliced, name, self.splits)
        return sliced


def _with_splits(plan: Plan, name: str, splits: Sequence[int]) -> Plan:
    """Say which stages hold which slices; one split is the block's own stage, as is none."""
    home = plan.stage_of[name]
    first = home + 1 - len(splits)
    if first < 0:
        raise PlanError(
            f"{SerializeEmbedding.name}: block {name!r} runs in stage {home}, {len(splits)} splits "
            f"need {len(splits) - 1} stages before it; plan with pinned_stages={{{name!r}: "
            f"{len(splits) - 1}}}, or use fewer splits"
        )
    ranges = list(pairwise(accumulate(splits, initial=0))) if len(splits) > 1 else []
    stages = []
    for index, stage in enumerate(plan.stages):
        held = {key: value for key, value in stage.table_slices.items() if key != name}
        if ranges and first <= index <= home:
            held[name] = ranges[index - first]
        stages.append(stage if held == stage.table_slices else replace(stage, table_slices=held))
    return replace(plan, stages=tuple(stages))


PASS = SerializeEmbedding
