"""Captures made on demand: one for every batch shape, in training and in evaluation mode."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from ipu_pipeline.capture.captured import CapturedModel, capture, take_kept
from ipu_pipeline.capture.inputs import described
from ipu_pipeline.capture.loss_terms import factored, loss_terms
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.stage import Stage, build_stages
from ipu_pipeline.stages.tables import TableUses, find_tables, serialized, shard_tables
from ipu_pipeline.stages.training import autocast_region

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Signature = tuple[bool, tuple[tuple[str, Hashable], ...]]

# A step needs two shapes (full and short microbatches), training and evaluation alternate.
MAX_SHAPES = 16
logger = logging.getLogger(__name__)


class LRUCache(Generic[K, V]):
    """Makes values on demand and keeps the ``limit`` that were used last, at least 1.

    ``on_drop`` is called with every value that is dropped.
    """

    def __init__(self, limit: int, on_drop: Callable[[V], None] = lambda _: None) -> None:
        self.limit = limit
        self._on_drop = on_drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of ``key``; it is made if it is not there, and then the last used."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.limit:
                self._on_drop(self._values.popitem(last=False)[1])
        self._values.move_to_end(key)
        return self._values[key]

    def drop_where(self, condition: Callable[[K], bool]) -> None:
        """Drop every value whose key meets ``condition``."""
        for key in [key for key in self._values if condition(key)]:
            self._on_drop(self._values.pop(key))


@dataclass(eq=False)
class StageCache:
    """Builds the stages of a plan for the shape of a microbatch, and remembers the last few.

    Args:
        model: The user's model.
        plan: Says which block belongs to which stage.
        precision: Of the steps; captures are made in the same autocast region.
        recompute: Names of the blocks to recompute in the backward pass.
        self_check: Compare every capture with the model before trusting it.
        max_shapes: So many shapes are remembered, those of training and evaluation together.
        on_drop: Called with stages that are forgotten.
    """

    model: nn.Module
    plan: Plan
    precision: str
    _: KW_ONLY
    recompute: frozenset[str]
    self_check: bool
    max_shapes: int = MAX_SHAPES
    on_drop: Callable[[tuple[Stage, ...]], object] = lambda _: None

    def __post_init__(self) -> None:
        self._stages = LRUCache[Signature, tuple[Stage, ...]](self.max_shapes, self._dropped)
        self._warned = False

    def stages_for(self, microbatch: Mapping[str, Any]) -> tuple[Stage, ...]:
        """Return the stages for inputs of this shape, in the model's present mode.

        Raises:
            CaptureError: The model cannot be captured with these inputs.
            LoweringError: A block that the plan serializes has no table for so many slices.
            PlanError: In training mode, its blocks are not those of the plan.
        """
        signature = _signature(self.model, microbatch)
        return self._stages.get(signature, lambda: self._captured(microbatch))

    def _captured(self, microbatch: Mapping[str, Any]) -> tuple[Stage, ...]:
        uses = TableUses()
        with autocast_region(self.precision), uses:
            known = None  # serialized tables are found while a capture runs
            if not serialized(self.plan):
                known = take_kept(self.model, microbatch, self.plan.granularity)
            captured = known or capture(
                self.model,
                microbatch,
                granularity=self.plan.granularity,  # type: ignore[arg-type]
                self_check=self.self_check,
            )
        terms = loss_terms(captured)
        if not serialized(self.plan):  # whose loss is taken apart
            captured, terms = factored(captured, terms)
        if captured.training:
            self._check_blocks([program.name for program in captured.programs])
        blocks = place_blocks(captured, self.plan)
        tables = find_tables(captured, uses, serialized(self.plan))
        row_shards = shard_tables(captured, self.plan, tables)
        return build_stages(captured, blocks, self.recompute, tables, row_shards, terms)

    def _dropped(self, stages: tuple[Stage, ...]) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "microbatches have come in more than %d shapes; the least recently used ones are "
                "forgotten and captured again when they return, which takes longer than a step: "
                "pad to fewer lengths (pad_to_multiple_of)",
                self._stages.limit,
            )
        self.on_drop(stages)

    def _check_blocks(self, found: Sequence[str]) -> None:
        planned = [block.name for block in self.plan.blocks]
        missing = [name for name in planned if name not in found]
        extra = [name for name in found if name not in planned]
        if missing or extra:
            raise PlanError(
                "the model's blocks for this batch are not those of the plan: "
                f"missing {', '.join(missing) or 'none'}; new {', '.join(extra) or 'none'}; make "
                "the plan with an example batch that has the same inputs as the training batches"
            )


def place_blocks(captured: CapturedModel, plan: Plan) -> list[list[str]]:
    """Return the block names of every stage.

    Blocks that the plan does not name (evaluation without labels has other glue) go to the
    latest stage that computes something for them.
    """
    stage_of: dict[str, int] = {}
    producer = {value: p.name for p in captured.programs for value in p.outputs}
    for program in captured.programs:
        sources = [stage_of[producer[name]] for name in program.inputs if name in producer]
        earliest = max(sources, default=0)
        stage_of[program.name] = plan.stage_of.get(program.name, earliest)
    return [
        [name for name, stage in stage_of.items() if stage == index]
        for index in range(plan.num_stages)
    ]


def _signature(model: nn.Module, microbatch: Mapping[str, Any]) -> Signature:
    return model.training, tuple((name, described(value)) for name, value in microbatch.items())
