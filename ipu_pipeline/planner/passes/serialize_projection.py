"""Compute output projections in slices.

Changes: ``serialize`` of the stages that run the projections.
Requires: blocks whose table is one of an output projection; without ``blocks``, all that have a
    large one and are no layer.
Guarantees: these blocks, and no others, get ``factor`` slices; 1 makes them whole again. A
    projection that only the loss of the same stage reads is fused with it by the target.

::

    before: 3: h.11 .. loss
    pass:   serialize_projection{factor=16}
    after:  3: h.11 .. loss (1 serialized); serialized: lm_head in 16 slices (stage 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.passes.base import (
    blocks_with_table,
    check_patterns,
    with_slices,
)


@dataclass(frozen=True)
class SerializeProjection:
    """Cut output projections into slices.

    Attributes:
        factor: Number of slices, at least 1.
        blocks: Names, prefixes or patterns; empty: every block with a large table.

    Raises:
        ValueError: A field is out of range.
    """

    name: ClassVar[str] = "serialize_projection"
    factor: int
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count(f"{self.name}: factor", self.factor, "slices")
        check_patterns(self.blocks, self.name)

    def run(self, plan: Plan) -> Plan:
        """Annotate the projections.

        Raises:
            PlanError: A named block has no such table, or none is named and none is large.
        """
        found = blocks_with_table(plan, "projection", self.blocks, self.name)
        return with_slices(plan, {block.name: self.factor for block in found})


PASS = SerializeProjection
