"""Chooses how to search a pipeline: the fast sweep where it is exact, labels everywhere else.

The sweep needs stages that do not share devices or memories and a step time with one paced row.
For the other cases it still gives a bound (``relaxed_bound``): own devices, own memories, and

* GPipe: ``max f + max b >= max (f + b)``;
* PopART in training, F > 1 stages, S = 2F-1: fill cycle c is at least as long as pipeline stage
  c, a flush cycle c as stage c+1, so both together take at least twice the sum of all stages but
  once the first device's, and the step at least ``(G-S) max + 2 sum``. In inference the first
  microbatch through all stages and G-1 more on the busiest give ``(G-1) max + sum``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from ipu_pipeline.planner.search.build import Built
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.ideals import Lattice, TooManyIdeals
from ipu_pipeline.planner.search.labels import Found, LabelSearch
from ipu_pipeline.planner.search.layers_per_ipu import LayerRule
from ipu_pipeline.planner.search.objective import least_microbatches, make_objective
from ipu_pipeline.planner.search.paced import PacedSearch
from ipu_pipeline.planner.search.positions import boundaries
from ipu_pipeline.planner.search.pricing import Pricer
from ipu_pipeline.planner.search.problem import Slot
from ipu_pipeline.planner.search.rows import Rows
from ipu_pipeline.planner.search.shapes import Shape
from ipu_pipeline.planner.search.sweep import Layout

LABEL_LIMIT = 4000


@dataclass(frozen=True)
class Candidate:
    """One pipeline to try, with its positions.

    Attributes:
        shape: Replicas, microbatches, devices.
        slots: Stage positions.
        rule: Given layers per device, if any.
    """

    shape: Shape
    slots: tuple[Slot, ...]
    rule: LayerRule | None = None


class Engine:
    """Searches the candidates of one problem; remembers lattices and stage prices."""

    def __init__(
        self,
        built: Built,
        constraints: Constraints,
        *,
        training: bool,
        deadline: float | None = None,
        masks: Sequence[int] | None = None,
    ) -> None:
        """Search ``built``; ``masks`` limits the boundaries (to price a given split)."""
        self.problem = built.problem
        self._constraints, self._training, self._deadline = constraints, training, deadline
        self._masks = masks
        self._pricers = {
            split: Pricer(built.problem, split_passes=split) for split in (False, True)
        }
        self._lattices: dict[tuple[tuple[int, ...], bool], Lattice | None] = {}
        self._rows: dict[int, Rows] = {}

    def is_fast(self, candidate: Candidate) -> bool:
        """Whether the sweep solves this candidate exactly."""
        single = self._constraints.schedule in ("1f1b", "maxload")
        steps = self.problem.exchanges or any(self.problem.outer)
        own = candidate.shape.own_devices and len({s.pool for s in candidate.slots}) == len(
            candidate.slots
        )
        return single and own and not steps

    def run_fast(self, candidates: Sequence[Candidate], upper: float, *, uniform: bool) -> Found:
        """Best of candidates that differ in depth only (``uniform``), or of one candidate."""
        microbatches = candidates[0].shape.num_microbatches
        pace, spread = (1, 0) if self._constraints.schedule == "maxload" else (microbatches - 1, 1)
        return self._sweep(candidates, pace, spread, upper, uniform=uniform)

    def at_once(self, candidate: Candidate) -> float:
        """Bound over all splits of this depth that needs no search."""
        depth, microbatches = len(candidate.slots), candidate.shape.num_microbatches
        pace, spread = self._relaxed_weights(depth, microbatches)
        lattice = Lattice.of_masks(self.problem, (0, self.problem.everything))
        layout = Layout(candidate.slots)
        search = PacedSearch(Rows(lattice, self._pricers[False]), layout, (depth,), pace, spread)
        return search.at_once()

    def run_labels(self, candidate: Candidate, upper: float) -> Found:
        """Best split of one candidate under any schedule."""
        chain = self._lattice(candidate, chain=True)
        full = self._lattice(candidate, chain=False)
        best = again = Found(inf, 0.0)
        if chain is not None:
            if upper == inf and self._deadline is not None:
                best = self._label_search(candidate, chain, upper).run_narrow()
                upper = best.objective
            again = self._label_search(candidate, chain, upper).run(upper)
            best = again if again.objective < best.objective else best
            upper = min(upper, best.objective)
        if full is not None and len(full) == len(chain or ()):
            found = again
        elif full is None or len(full) > LABEL_LIMIT:
            found = Found(inf, 0.0)
        else:
            found = self._label_search(candidate, full, upper).run(upper)
        lower = found.lower_bound
        if lower < upper:
            lower = max(lower, min(self.relaxed_bound(candidate, upper), upper))
        winner = found if found.objective <= best.objective else best
        return replace(winner, lower_bound=min(lower, winner.objective))

    def _label_search(self, candidate: Candidate, lattice: Lattice, upper: float) -> LabelSearch:
        objective = make_objective(
            self._constraints.schedule,
            len(candidate.slots),
            candidate.shape.num_microbatches,
            training=self._training,
        )
        return LabelSearch(
            lattice,
            self._pricers[objective.splits_passes],
            candidate.slots,
            objective,
            boundaries(lattice, candidate.slots, candidate.rule),
            self._deadline,
            self._load_limit_s(candidate, upper),
        )

    def _load_limit_s(self, candidate: Candidate, upper: float) -> float:
        """Largest load of one stage in any split below ``upper``."""
        pace, spread = self._relaxed_weights(len(candidate.slots), candidate.shape.num_microbatches)
        if pace <= 0 or upper == inf:
            return inf
        work = sum(option.total_s for option in self.problem.fastest)
        fastest = max(slot.speed for slot in candidate.slots)
        return max(0.0, upper - spread * work / fastest) / pace

    def relaxed_bound(self, candidate: Candidate, upper: float) -> float:
        """Bound from the fast search: every stage with its own device and memory."""
        depth, microbatches = len(candidate.slots), candidate.shape.num_microbatches
        pace, spread = self._relaxed_weights(depth, microbatches)
        slots = tuple(
            replace(s, device=i, pool=i, forbidden=0) for i, s in enumerate(candidate.slots)
        )
        devices = tuple(range(depth))
        relaxed = replace(
            candidate, slots=slots, shape=replace(candidate.shape, stage_devices=devices)
        )
        return self._sweep([relaxed], pace, spread, upper, uniform=False, grouped=False).lower_bound

    def _relaxed_weights(self, depth: int, microbatches: int) -> tuple[int, int]:
        """Weights of the busiest stage and of the sum in a bound (module docstring)."""
        if self._constraints.schedule == "maxload":
            return 1, 0
        if self._constraints.schedule == "popart" and self._training and depth > 1:
            total = least_microbatches("popart", depth, training=self._training)
            return microbatches - total, 2
        return microbatches - 1, 1

    def _sweep(
        self,
        candidates: Sequence[Candidate],
        pace: float,
        spread: float,
        upper: float,
        *,
        uniform: bool,
        grouped: bool = True,
    ) -> Found:
        """Sweep the execution order for a first split, then every order."""
        depths = sorted(len(candidate.slots) for candidate in candidates)
        deepest = max(candidates, key=lambda candidate: len(candidate.slots))
        best, lower, known = Found(inf, 0.0), 0.0, 0
        for chain in (True, False):
            lattice = self._lattice(deepest, chain=chain, grouped=grouped)
            if lattice is None or len(lattice) == known:
                continue
            known = len(lattice)
            rows = self._rows_of(lattice)
            layout = _layout(lattice, deepest, uniform=uniform)
            deadline = None if chain and upper == inf else self._deadline
            search = PacedSearch(rows, layout, depths, pace, spread, upper, deadline)
            search.run()
            if search.best is not None:
                upper = search.best.objective
                best = Found(upper, 0.0, search.best.boundaries, search.best.prices)
            lower = search.lower_bound
        if self._lattice(deepest, chain=False, grouped=grouped) is None:
            lower = search.at_once()
        return replace(best, lower_bound=lower)

    def _rows_of(self, lattice: Lattice) -> Rows:
        if id(lattice) not in self._rows:
            self._rows[id(lattice)] = Rows(lattice, self._pricers[False])
        return self._rows[id(lattice)]

    def _lattice(
        self, candidate: Candidate, *, chain: bool, grouped: bool = True
    ) -> Lattice | None:
        """Allowed boundaries in execution order, or all; ``None`` if there are too many."""
        groups = self.problem.together
        if grouped and candidate.shape.own_devices:
            groups += self.problem.same_device
        key = (groups, chain)
        if key not in self._lattices:
            self._lattices[key] = self._make_lattice(_uncut(groups), chain=chain)
        return self._lattices[key]

    def _make_lattice(self, allowed: Callable[[int], bool], *, chain: bool) -> Lattice | None:
        order = [(1 << done) - 1 for done in range(self.problem.num_blocks + 1)]
        masks = order if self._masks is None else self._masks
        if chain or self._masks is not None:
            return Lattice.of_masks(self.problem, filter(allowed, masks))
        try:
            return Lattice(self.problem, allowed, self._constraints.max_ideals)
        except TooManyIdeals:
            return None


def _uncut(groups: Sequence[int]) -> Callable[[int], bool]:
    return lambda mask: all(mask & group in (0, group) for group in groups)


def _layout(lattice: Lattice, candidate: Candidate, *, uniform: bool) -> Layout:
    slots = candidate.slots[::-1]
    if uniform:
        link = next((slot.link_out for slot in slots if slot.link_out is not None), None)
        return Layout(tuple(replace(slot, link_in=link, link_out=link) for slot in slots))
    starts = boundaries(lattice, candidate.slots, candidate.rule)
    return Layout(slots, starts[-2::-1], uniform=False)
