"""The search over pipelines that a backend prices itself, stage by stage.

Where blocks do not add up to stages (an IPU recomputes whole stages and needs its fullest tile),
the backend gives for every pipeline a quick bound, a tighter one, and the label-setting search over
its own stage prices. Pipelines come in the order of their bounds, until none is below the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from math import inf
from time import monotonic
from typing import Generic, Protocol, TypeVar

from ipu_pipeline.planner.search.label_setting import LabelSettingSearch
from ipu_pipeline.planner.search.stage_price import SearchResult


class SearchablePipeline(Protocol):
    """One pipeline: devices of its stages, and everything about it but the split."""

    @property
    def quick_bound_s(self) -> float:
        """No split takes less seconds per step; costs next to nothing."""
        ...

    def bound_s(self) -> float:
        """A tighter bound, which may take some milliseconds."""
        ...

    def label_search(self, upper_s: float, deadline: float | None) -> LabelSettingSearch:
        """Return the search over its splits, for those below ``upper_s``."""
        ...


Pipeline = TypeVar("Pipeline", bound=SearchablePipeline)


class Quickest(Generic[Pipeline]):
    """Outcome of :func:`quickest`.

    Attributes:
        pipeline: The best pipeline; ``None`` when nothing below the given limit fits.
        found: Its best split.
        lower_bound_s: No split of any pipeline is quicker.
        searched: Pipelines whose splits were searched, with the best split of each.
    """

    def __init__(self, upper_s: float) -> None:
        """Begin with nothing found below ``upper_s``."""
        self.pipeline: Pipeline | None = None
        self.found = SearchResult(0.0)
        self.lower_bound_s = upper_s
        self.searched: list[tuple[Pipeline, SearchResult]] = []

    def note(self, pipeline: Pipeline, found: SearchResult, upper_s: float) -> None:
        """Remember the outcome of one pipeline."""
        self.searched.append((pipeline, found))
        self.lower_bound_s = min(self.lower_bound_s, found.lower_bound)
        if found.objective < upper_s:
            self.pipeline, self.found = pipeline, found


def quickest(
    pipelines: Iterable[Pipeline],
    upper_s: float = inf,
    deadline: float | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Quickest[Pipeline]:
    """Return the quickest split of all ``pipelines`` that takes less than ``upper_s``.

    Args:
        pipelines: To try.
        upper_s: Seconds of a step that is already known.
        deadline: ``time.monotonic()`` at which to stop once there is a split; the bound then says
            what is left open.
        progress: Called with the pipelines that are done, and all of them.
    """
    result: Quickest[Pipeline] = Quickest(upper_s)
    heap = [(item.quick_bound_s, False, number, item) for number, item in enumerate(pipelines)]
    heapify(heap)
    count = len(heap)
    while heap:
        bound_s, tight, number, item = heappop(heap)
        late = deadline is not None and monotonic() > deadline and upper_s < inf
        if bound_s >= upper_s or late:
            result.lower_bound_s = min(result.lower_bound_s, bound_s)
            break
        if not tight:
            heappush(heap, (max(bound_s, item.bound_s()), True, number, item))
            continue
        progress(count - len(heap), count)
        until = deadline if upper_s < inf else None  # a split is needed first
        found = item.label_search(upper_s, until).run(upper_s)
        result.note(item, found, upper_s)
        upper_s = min(upper_s, found.objective)
    result.lower_bound_s = min(result.lower_bound_s, upper_s)
    return result
