"""The passes of the package: which blocks recompute, are offloaded, or run in slices.

Each writes one kind of annotation into the stages: exactly the chosen blocks have it afterwards,
in execution order, so running it again changes nothing. ``manager.py`` says in which order they
run::

    before: 0: embeddings .. layer.5
    pass:   recompute{blocks=[encoder.layer.*]}
    after:  0: embeddings .. layer.5 (6 recomputed); recomputed: encoder.layer.0-5 (stage 0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import Block
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.plan import Plan, PlannedStage
from ipu_pipeline.ir.select import select_all, unmatched
from ipu_pipeline.planner.options.tables import table_of

_WORDS = ("auto", "all", "none")


@dataclass(frozen=True)
class Recompute:
    """Say which blocks run their forward pass again in the backward pass.

    Blocks that keep nothing from forward to backward are left plain.

    Attributes:
        name: Also the annotation that it writes.
        blocks: ``auto`` (the plan's own choice, the solver's), ``all``, ``none``, or names,
            prefixes and patterns.

    Raises:
        ValueError: It is something else.
    """

    name: ClassVar[str] = "recompute"
    blocks: str | tuple[str, ...] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, str):
            _check_patterns(self.blocks, self.name)
        elif self.blocks not in _WORDS:
            raise ValueError(
                f"{self.name}: blocks is {self.blocks!r}; use auto, all, none, or a list such "
                f"as [{self.blocks}]"
            )

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
            chosen = keeping.intersection(_chosen_blocks(plan, self.blocks, self.name))
        stages = []
        for stage in plan.stages:
            blocks: dict[str, Any] = {self.name: tuple(n for n in stage.blocks if n in chosen)}
            stages.append(replace(stage, **blocks))
        return replace(plan, stages=tuple(stages))


@dataclass(frozen=True)
class Offload(Recompute):
    """Say which blocks let their activations wait for the backward pass in host memory.

    As for those that recompute, with which it composes. It needs GPUs when it runs. The price is
    that of the plan without it: no description of a machine says how fast its host is.
    """

    name: ClassVar[str] = "offload"


@dataclass(frozen=True)
class SerializeProjection:
    """Compute output projections in slices.

    A projection that only the loss of the same stage reads is fused with it by the target.

    Attributes:
        factor: Number of slices, at least 1; 1 makes them whole again.
        blocks: Names, prefixes or patterns; empty: every block with a large table, but no layer.

    Raises:
        ValueError: A field is out of range.
    """

    name: ClassVar[str] = "serialize_projection"
    factor: int
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count(f"{self.name}: factor", self.factor, "slices")
        _check_patterns(self.blocks, self.name)

    def run(self, plan: Plan) -> Plan:
        """Annotate the projections.

        Raises:
            PlanError: A named block has no such table, or none is named and none is large.
        """
        found = _blocks_with_table(plan, "projection", self.blocks, self.name)
        return _with_slices(plan, {block.name: self.factor for block in found})


@dataclass(frozen=True)
class SerializeEmbedding:
    """Look tables up in slices, and spread a table over consecutive stages where that is asked for.

    With ``splits`` every slice is in exactly one stage; without, the table is in the block's stage.

    Attributes:
        factor: Number of slices, at least 1; 1 makes them whole again.
        splits: Slices held by each of the consecutive stages that end with the block's own, as
            ``serialized_embedding_splits_per_ipu`` says; empty: the block's stage holds all.
        blocks: Names, prefixes or patterns; empty: every block with a large table, but no layer.

    Raises:
        ValueError: A field is out of range, or the splits are not ``factor`` slices together.
    """

    name: ClassVar[str] = "serialize_embedding"
    factor: int
    splits: tuple[int, ...] = ()
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_count(f"{self.name}: factor", self.factor, "slices")
        _check_patterns(self.blocks, self.name)
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
        found = [b.name for b in _blocks_with_table(plan, "lookup", self.blocks, self.name)]
        sliced = _with_slices(plan, dict.fromkeys(found, self.factor))
        for name in found:
            sliced = self._with_splits(sliced, name)
        return sliced

    def _with_splits(self, plan: Plan, name: str) -> Plan:
        """Say which stages hold which slices; one split is the block's own stage, as is none."""
        home, splits = plan.stage_of[name], self.splits
        first = home + 1 - len(splits)
        if first < 0:
            raise PlanError(
                f"{self.name}: block {name!r} runs in stage {home}, {len(splits)} splits need "
                f"{len(splits) - 1} stages before it; plan with pinned_stages={{{name!r}: "
                f"{len(splits) - 1}}}, or use fewer splits"
            )
        ranges = list(pairwise(accumulate(splits, initial=0))) if len(splits) > 1 else []
        stages = []
        for index, stage in enumerate(plan.stages):
            held = {key: value for key, value in stage.table_slices.items() if key != name}
            if ranges and first <= index <= home:
                held[name] = ranges[index - first]
            stages.append(
                stage if held == stage.table_slices else replace(stage, table_slices=held)
            )
        return replace(plan, stages=tuple(stages))


def _chosen_blocks(plan: Plan, patterns: Sequence[str], who: str) -> tuple[str, ...]:
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


def _blocks_with_table(plan: Plan, use: str, patterns: Sequence[str], who: str) -> list[Block]:
    """Return the blocks to serialize: those named, else all that have a large table.

    Raises:
        PlanError: A named block has no table for ``use``, or none is named and none has.
    """
    tables = {block.name: table_of(plan.graph, block) for block in plan.blocks}
    able = {name: table for name, table in tables.items() if table and table.use == use}
    if patterns:
        names = _chosen_blocks(plan, patterns, who)
        wrong = [name for name in names if name not in able]
        if wrong:
            raise PlanError(
                f"{who} names {', '.join(wrong)} without a table for a {use}; blocks with one: "
                f"{', '.join(able) or 'none'}"
            )
        return [block for block in plan.blocks if block.name in names]
    large = {name for name, table in able.items() if table.is_large}
    found = [block for block in plan.blocks if block.kind != "layer" and block.name in large]
    if not found:
        raise PlanError(
            f"{who} found no block with a large table for a {use}; name the ones you mean with "
            "blocks=[...]"
        )
    return found


def _with_slices(plan: Plan, factors: Mapping[str, int]) -> Plan:
    """Write the number of slices of some blocks (1: whole) into their stages."""

    def annotated(stage: PlannedStage) -> PlannedStage:
        wanted = {name: factors.get(name, stage.serialize.get(name, 1)) for name in stage.blocks}
        sliced = {name: factor for name, factor in wanted.items() if factor > 1}
        return stage if sliced == stage.serialize else replace(stage, serialize=sliced)

    return replace(plan, stages=tuple(map(annotated, plan.stages)))


def _check_patterns(patterns: object, who: str) -> None:
    """Raise a ``ValueError`` for anything but a tuple of names or patterns."""
    if not isinstance(patterns, tuple) or not all(isinstance(item, str) for item in patterns):
        raise ValueError(f"{who}: blocks is {patterns!r}; give a list of names such as [a,b.*]")
