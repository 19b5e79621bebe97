"""Say which blocks run their forward pass again in the backward pass.

Changes: ``recompute`` of every stage.
Requires: nothing; blocks that keep nothing from forward to backward are left plain.
Guarantees: exactly the chosen blocks recompute, in execution order. ``auto`` keeps the plan's own
    choice (the solver's), ``all`` and ``none`` say so for every block.

::

    before: 0: embeddings .. layer.5
    pass:   recompute{blocks=[encoder.layer.*]}
    after:  0: embeddings .. layer.5 (6 recomputed); recomputed: encoder.layer.0-5 (stage 0)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.passes.base import check_patterns, chosen_blocks

_WORDS = ("auto", "all", "none")


@dataclass(frozen=True)
class Recompute:
    """Choose the blocks that recompute; its name is that of what it changes.

    Attributes:
        blocks: ``auto``, ``all``, ``none``, or names, prefixes and patterns.

    Raises:
        ValueError: It is something else.
    """

    name: ClassVar[str] = "recompute"
    blocks: str | tuple[str, ...] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.blocks, str):
            if self.blocks not in _WORDS:
                raise ValueError(
                    f"{self.name}: blocks is {self.blocks!r}; use auto, all, none, or a list such "
                    f"as [{self.blocks}]"
                )
        else:
            check_patterns(self.blocks, self.name)

    def run(self, plan: Plan) -> Plan:
        """Annotate every stage.

        Raises:
            PlanError: A pattern means no block.
        """
        if self.blocks == "auto":
            return plan
        keeping = {block.name for block in plan.blocks if block.saved_bytes > 0}
        if isinstance(self.blocks, str):
            chosen = keeping if self.blocks == "all" else set()
        else:
            chosen = keeping.intersection(chosen_blocks(plan, self.blocks, self.name))
        stages = []
        for stage in plan.stages:
            blocks: dict[str, Any] = {self.name: tuple(n for n in stage.blocks if n in chosen)}
            stages.append(replace(stage, **blocks))
        return replace(plan, stages=tuple(stages))


PASS = Recompute
