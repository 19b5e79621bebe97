"""Batches of every size: which microbatches a replica runs, in which runs of torch's schedule.

A batch is cut as the local target cuts it: full microbatches, and perhaps a short last one. Torch
fixes the shapes of a run, so the short one is a run of its own. Losses are weighted by samples,
random numbers are keyed by the position in the batch: both targets compute the same thing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from ipu_pipeline.backends.cluster.doing import Doing
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.pipeline import TrainingPipeline
from ipu_pipeline.backends.cluster.schedules import schedule_for
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.captures import LRUCache, StageCache
from ipu_pipeline.stages.stage import Stage

# One shape has a pipeline per number of microbatches; each keeps the buffers of its messages.
MAX_PIPELINES = 16
logger = logging.getLogger(__name__)
T = TypeVar("T")


def dealt(parts: Sequence[T], layout: Layout) -> list[T]:
    """Return the parts of this process's replica: neighbours, as evenly as possible.

    The last replica gets the last part, which may be short, and never more than the others. A
    replica gets none when there are fewer parts than replicas.
    """
    first, end = (
        -(-len(parts) * index // layout.num_replicas)
        for index in (layout.replica, layout.replica + 1)
    )
    return list(parts[first:end])


def captured(parts: Sequence[Microbatch], cache: StageCache) -> dict[int, tuple[Stage, ...]]:
    """Return the stages for the microbatches of a whole batch, by their number of samples.

    Every process captures all shapes, also one that only another replica runs: what cannot be
    captured is then refused by all of them, and nobody waits for the one that refuses.
    """
    return {part.num_samples: cache.stages_for(part.inputs) for part in (parts[0], parts[-1])}


class Pipelines:
    """The pipelines of this process, made on demand for a shape and a number of microbatches.

    Args:
        schedule: Name of the schedule of whole batches.
        groups: The processes.
        doing: Notes what is being done.
        limit: So many pipelines are kept.
    """

    def __init__(
        self, schedule: str, groups: Groups, doing: Doing, limit: int = MAX_PIPELINES
    ) -> None:
        self._schedule = schedule
        self._groups = groups
        self._doing = doing
        # The key's stages are kept with the pipeline, so that their id stays theirs.
        self._made = LRUCache[tuple[int, int], tuple[Sequence[Stage], TrainingPipeline]](limit)
        self._said = False

    def __len__(self) -> int:
        return len(self._made)

    def run(
        self,
        parts: Sequence[Microbatch],
        stages: Mapping[int, Sequence[Stage]],
        inputs: Mapping[str, Any],
        loss_scaling: float,
    ) -> float:
        """Run the forward and backward passes of this replica's microbatches.

        Args:
            parts: Those of the whole batch.
            stages: From :func:`captured`.
            inputs: Fields of ``StepInputs``.
            loss_scaling: Factor of the loss before the backward pass.

        Returns:
            This replica's part of the loss on the rank of the loss, else 0.
        """
        total = 0.0
        for size, found in groupby(dealt(parts, self._groups.layout), lambda p: p.num_samples):
            run = list(found)
            total += self._pipeline(stages[size], len(run)).run(run, inputs, loss_scaling)
        return total

    def drop(self, stages: Sequence[Stage]) -> None:
        """Forget the pipelines of stages that the cache has forgotten."""
        self._made.drop_where(lambda key: key[0] == id(stages))

    def clear(self) -> None:
        """Forget all pipelines."""
        self._made.drop_where(lambda _: True)

    def _pipeline(self, stages: Sequence[Stage], num_microbatches: int) -> TrainingPipeline:
        key = (id(stages), num_microbatches)
        return self._made.get(key, lambda: (stages, self._make(stages, num_microbatches)))[1]

    def _make(self, stages: Sequence[Stage], num_microbatches: int) -> TrainingPipeline:
        layout = self._groups.layout
        schedule = schedule_for(
            self._schedule, layout.num_stages, layout.num_ranks, num_microbatches
        )
        if schedule != self._schedule and not self._said and layout.position == 0:
            self._said = True
            logger.warning(
                "schedule %s cannot run a number of microbatches that a short batch has (%d); it "
                "runs with %s then, which computes the same",
                self._schedule,
                num_microbatches,
                schedule,
            )
        return TrainingPipeline(
            stages,
            layout=layout,
            schedule=schedule,
            num_microbatches=num_microbatches,
            groups=self._groups,
            doing=self._doing,
        )
