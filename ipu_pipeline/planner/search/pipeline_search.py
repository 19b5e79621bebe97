"""Searches every pipeline that may be tried: the best split of each, the best of all, its bound.

The fast sweep needs stages that do not share devices or memories and a step time with one paced
row; labels search the rest. There the sweep still gives a bound (``relaxed_bound``):

* GPipe: ``max f + max b >= max (f + b)``;
* PopART in training, F > 1 stages, S = 2F-1: fill cycle c and flush cycle c take at least as long
  as pipeline stages c and c+1, both together at least twice the sum of all stages but once the
  first device's: ``(G-S) max + 2 sum``. In inference ``(G-1) max + sum``;
* schedules with several stages per device: the busiest device has at least its share of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from itertools import chain as joined
from math import inf
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.schedules import critical_paths, schedule_kind
from ipu_pipeline.planner.schedules.objective import Path
from ipu_pipeline.planner.search.bottleneck import even_bound, search_tables
from ipu_pipeline.planner.search.constraints import Constraints
from ipu_pipeline.planner.search.from_graph import build_problem
from ipu_pipeline.planner.search.ideal_program import (
    IdealProgram,
    OutOfTimeError,
    StagePositions,
)
from ipu_pipeline.planner.search.ideals import Lattice, TooManyIdeals, boundaries
from ipu_pipeline.planner.search.label_setting import LabelSettingSearch
from ipu_pipeline.planner.search.least_bytes import LeastBytes
from ipu_pipeline.planner.search.looped import LoopedSearch
from ipu_pipeline.planner.search.parallel import (
    CandidatePipeline,
    candidate,
    pipeline_shapes,
)
from ipu_pipeline.planner.search.problem import Problem, bits, joined_groups, mask_of
from ipu_pipeline.planner.search.result import Partition, to_partition
from ipu_pipeline.planner.search.stage_costs import StageCostTable
from ipu_pipeline.planner.search.stage_price import (
    MOST_CANDIDATES,
    OptionPricer,
    SearchResult,
)
from ipu_pipeline.planner.search.step_bound import (
    is_even,
    least_fullest,
    least_path_s,
    longest_path_bound,
)

LABEL_LIMIT = 4000
# Without a time limit, the label-setting searches of one problem prove for so many seconds, and so
# long are other pipelines with several stages per device tried once there is a split.
PROOF_S = 10.0


class Engine:
    """Searches the candidates of one problem; remembers lattices and stage prices."""

    def __init__(self, built: Problem, constraints: Constraints) -> None:
        """Search ``built``, at most for ``constraints.time_limit_s``."""
        self.problem, self._constraints = built, constraints
        limit_s = constraints.time_limit_s
        self._deadline = monotonic() + limit_s if limit_s else None
        self._kind = schedule_kind(constraints.schedule)
        self._options = {split: OptionPricer(built, split_passes=split) for split in (False, True)}
        self._least_bytes = LeastBytes(built)
        self._proof_s = inf if constraints.time_limit_s else PROOF_S
        self._lattices: dict[tuple[tuple[int, ...], bool], Lattice | None] = {}
        self._rows: dict[int, StageCostTable] = {}

    def is_fast(self, candidate: CandidatePipeline) -> bool:
        """Whether the sweep solves this candidate exactly."""
        steps = self.problem.exchanges or any(self.problem.outer)
        return self._kind.name == "1f1b" and candidate.apart and not steps

    def may_fit(self, candidate: CandidatePipeline) -> bool:
        """Whether the least bytes of a pipeline with own memories leave a split."""
        if not self._least_bytes.is_least_of_all:
            return True
        groups = self.problem.together + self.problem.same_device
        slots = candidate.slots
        if candidate.shape.own_devices:
            if candidate.rule is None and self._least_bytes.packs(slots, groups):
                return True
            split = self._least_bytes.split(slots, candidate.rule, groups)
            return split is not None and split.fits(slots)
        # The least sum over all devices, as if they had one memory.
        pooled = [replace(slot, pool=0) for slot in slots]
        split = self._least_bytes.split(pooled, candidate.rule, self.problem.together)
        room = sum({slot.pool: slot.capacity for slot in slots}.values())
        return split is not None and sum(split.device_bytes.values()) <= room

    def at_once(self, candidate: CandidatePipeline) -> float:
        """Bound over all splits of this depth that needs no search.

        Where stages visit the devices several times it is one of the replay.
        """
        if self.has_loops(candidate):
            return self._replay_s(candidate, critical_paths(self._kind, candidate.shape))
        weights = self._relaxed_weights(candidate)
        return even_bound(self.problem, candidate.slots, candidate.depth, *weights)

    def _replay_s(self, candidate: CandidatePipeline, paths: Sequence[Path]) -> float:
        """Bound of every replay: of a device's work, and of each dependency path.

        Blocks are not divided: the busiest device has what any packing of them leaves to it.
        """
        seconds = [option.total_s for option in self.problem.fastest]
        groups = joined_groups((*self.problem.together, *self.problem.same_device))
        alone = self.problem.everything & ~sum(groups)
        parts = [sum(seconds[n] for n in bits(mask)) for mask in groups]
        parts += [seconds[n] for n in bits(alone)]
        speed, shape = max(slot.speed for slot in candidate.slots), candidate.shape
        busiest = least_fullest(parts, shape.num_devices)
        path_s = least_path_s(self.problem, paths, speed)
        return max(shape.num_microbatches * busiest / speed, path_s)

    def step_bound(
        self, candidates: Sequence[CandidatePipeline], upper: float, *, uniform: bool
    ) -> float | None:
        """Bound of the replay over all splits; ``None``: the closed form's is one.

        Args:
            candidates: They differ in depth only (``uniform``), or it is one.
            upper: Seconds of a step that is known.
            uniform: As for :meth:`sweep`.
        """
        kind, first = self._kind, candidates[0].shape
        forward_only = kind.any_devices and not first.training
        if kind.lock_stepped or (first.own_devices and (kind.exact_apart or forward_only)):
            return None  # the closed form is the replay
        paths, least = {}, {}
        for item in candidates:
            speed = max(slot.speed for slot in item.slots)
            once_s = sum(self.problem.outer) / speed / item.shape.num_devices
            paths[item.depth] = critical_paths(kind, item.shape)
            least[item.depth] = self._replay_s(item, paths[item.depth]) + once_s
        open_paths = {depth: paths[depth] for depth in paths if least[depth] < upper}
        lower = min((least[depth] for depth in least if depth not in open_paths), default=inf)
        if not open_paths:
            return lower
        at_once = min(least[depth] for depth in open_paths)
        deepest = max((c for c in candidates if c.depth in open_paths), key=_depth)
        apart = deepest.apart and all(map(is_even, joined(*open_paths.values())))
        lattice = self._lattice(deepest, chain=False) if apart else None
        if lattice is None:
            return min(lower, at_once)
        speed = max(slot.speed for slot in deepest.slots)
        once_s = sum(self.problem.outer) / speed / deepest.depth
        layout = _layout(lattice, deepest, uniform=uniform)
        found = longest_path_bound(
            self._rows_of(lattice), layout, open_paths, max(0.0, upper - once_s), self._deadline
        )
        return min(lower, max(at_once, found + once_s))

    def run_labels(self, candidate: CandidatePipeline, upper: float) -> SearchResult:
        """Best split of one candidate under any schedule."""
        chain = self._lattice(candidate, chain=True)
        full = self._lattice(candidate, chain=False)
        found, lower, begin = [], 0.0, monotonic()
        if chain is not None:
            found.append(self._label_search(candidate, chain, upper).run(upper))
            upper = min(upper, found[-1].objective)
        if full is not None and len(full) == len(chain or ()):
            lower = found[-1].lower_bound
        elif full is not None and len(full) <= LABEL_LIMIT:
            found.append(self._label_search(candidate, full, upper).run(upper))
            lower = found[-1].lower_bound
        if any(options.thinned for options in self._options.values()):
            lower = 0.0
        self._proof_s = max(0.0, self._proof_s - (monotonic() - begin))
        if lower < upper:
            lower = max(lower, min(self.relaxed_bound(candidate, upper), upper))
        best = SearchResult.of(lower, (item for result in found for item in result.pipelines))
        return replace(best, lower_bound=min(lower, best.objective))

    def has_loops(self, candidate: CandidatePipeline) -> bool:
        """Whether the schedule itself puts several stages on every device."""
        return not candidate.shape.own_devices and not self._kind.any_devices

    def run_loops(self, candidate: CandidatePipeline, upper: float) -> SearchResult:
        """Good splits of a pipeline whose stages visit the devices several times."""
        bound, chain = self.at_once(candidate), self._lattice(candidate, chain=True)
        if not self.may_fit(candidate):
            return SearchResult(inf)
        if bound >= upper or chain is None or (self._proof_s <= 0 and upper < inf):
            return SearchResult(bound)
        begin = monotonic()
        search = LoopedSearch(
            chain,
            self._options[False],
            candidate.slots,
            self._kind,
            candidate.shape,
            boundaries(chain, candidate.slots, candidate.rule),
            self._least_bytes,
            self._deadline,
        )
        found = search.run(self._first_splits(candidate, chain))
        self._proof_s -= monotonic() - begin
        return SearchResult.of(bound, found)

    def _first_splits(
        self, candidate: CandidatePipeline, chain: Lattice
    ) -> Iterator[tuple[int, ...]]:
        """A known split, that whose largest stage is smallest, and the least demanding one."""
        known = self._constraints.first_split
        if len(known) == candidate.depth and all(known):
            index = {name: number for number, name in enumerate(self.problem.names)}
            yield tuple(accumulate(mask_of(index[name] for name in stage) for stage in known))
        layout = _layout(chain, candidate.set_apart(), uniform=False)
        tables = [(self._rows_of(chain), layout)]
        found = search_tables(tables, [candidate.depth], (1, 0)).pipelines
        yield from (item.boundaries for item in found[:1])
        if found:  # the most even of all splits that fit like this
            depths = [candidate.depth]
            with suppress(OutOfTimeError):
                table = IdealProgram(*tables[0], _squares, inf, depths, self._deadline).run()
                yield tuple(chain.masks[place] for place in table.path(candidate.depth))
        least = self._least_bytes.split(candidate.slots, candidate.rule, self.problem.together)
        if least is not None:
            yield tuple(accumulate(mask for mask, _ in least.stages))

    def _label_search(
        self,
        candidate: CandidatePipeline,
        lattice: Lattice,
        upper: float,
    ) -> LabelSettingSearch:
        objective = self._kind.objective(candidate.shape)
        return LabelSettingSearch(
            lattice,
            self._options[objective.splits_passes],
            candidate.slots,
            objective,
            boundaries(lattice, candidate.slots, candidate.rule),
            self._deadline,
            self._load_limit_s(candidate, upper),
            self._proof_s,
        )

    def _load_limit_s(self, candidate: CandidatePipeline, upper: float) -> float:
        """Largest load of one stage in any split below ``upper``."""
        pace, spread = self._relaxed_weights(candidate)
        if pace <= 0 or upper == inf:
            return inf
        work = sum(option.total_s for option in self.problem.fastest)
        fastest = max(slot.speed for slot in candidate.slots)
        return max(0.0, upper - spread * work / fastest) / pace

    def relaxed_bound(self, candidate: CandidatePipeline, upper: float) -> float:
        """Bound from the fast search: every stage with its own device and memory."""
        pace, spread = self._relaxed_weights(candidate)
        relaxed = candidate.set_apart(forbidden=0)
        return self.sweep([relaxed], pace, spread, upper, uniform=False).lower_bound

    def _relaxed_weights(self, candidate: CandidatePipeline) -> tuple[float, float]:
        """Weights of the busiest stage and of the sum in a bound (module docstring)."""
        depth, microbatches = candidate.depth, candidate.shape.num_microbatches
        if self._kind.name == "popart" and candidate.shape.training and depth > 1:
            return max(0, microbatches - (2 * depth - 1)), 2
        return microbatches - 1, 1

    def sweep(
        self,
        candidates: Sequence[CandidatePipeline],
        pace: float,
        spread: float,
        upper: float,
        *,
        uniform: bool,
    ) -> SearchResult:
        """Sweep the execution order for a first split, then every order.

        Exact for 1f1b with stages apart: of candidates that differ in depth only (``uniform``), or
        of one.
        """
        depths = sorted(map(_depth, candidates))
        deepest = max(candidates, key=_depth)
        lattices = [self._lattice(deepest, chain=chain) for chain in (True, False)]
        tables = (
            (self._rows_of(lattice), _layout(lattice, deepest, uniform=uniform))
            for lattice in lattices
            if lattice is not None
        )
        found = search_tables(tables, depths, (pace, spread), upper, self._deadline)
        if lattices[1] is None:
            return replace(found, lower_bound=self.at_once(deepest))
        return found

    def _rows_of(self, lattice: Lattice) -> StageCostTable:
        if id(lattice) not in self._rows:
            self._rows[id(lattice)] = StageCostTable(lattice, self._options[False])
        return self._rows[id(lattice)]

    def _lattice(self, candidate: CandidatePipeline, *, chain: bool) -> Lattice | None:
        """Allowed boundaries in execution order, or all; ``None`` if there are too many."""
        groups = self.problem.together
        if candidate.shape.own_devices:
            groups += self.problem.same_device
        if (groups, chain) not in self._lattices:
            self._lattices[groups, chain] = self._uncut(groups, chain=chain)
        return self._lattices[groups, chain]

    def _uncut(self, groups: Sequence[int], *, chain: bool) -> Lattice | None:
        def allowed(mask: int) -> bool:
            return all(mask & group in (0, group) for group in groups)

        if chain:
            order = ((1 << done) - 1 for done in range(self.problem.num_blocks + 1))
            return Lattice.of_masks(self.problem, filter(allowed, order))
        try:
            return Lattice(self.problem, allowed, self._constraints.max_ideals)
        except TooManyIdeals:
            return None


def _layout(lattice: Lattice, candidate: CandidatePipeline, *, uniform: bool) -> StagePositions:
    slots = candidate.slots[::-1]
    if uniform:
        link = next((slot.link_out for slot in slots if slot.link_out is not None), None)
        return StagePositions(tuple(replace(slot, link_in=link, link_out=link) for slot in slots))
    starts = boundaries(lattice, candidate.slots, candidate.rule)
    return StagePositions(slots, starts[-2::-1], uniform=False)


def _squares(
    loads: NDArray[np.float64], behind: NDArray[np.float64], *_: object
) -> NDArray[np.float64]:
    return loads * loads + behind


@dataclass(frozen=True)
class Exploration:
    """What all searches together found.

    Attributes:
        partitions: The best distinct splits, best first.
        engine: What searched them.
        searched: The pipelines that were searched together, and whether they differ in depth only.
        lower_bound: No split is quicker in the closed form; infinite where none is possible.
    """

    partitions: tuple[Partition, ...]
    engine: Engine
    searched: tuple[tuple[Sequence[CandidatePipeline], bool], ...]
    lower_bound: float

    def step_bound(self, upper: float) -> float:
        """Bound of the exact step of any split; ``upper`` is the best one known, in seconds."""
        lower = upper
        for members, together in self.searched:
            found = self.engine.step_bound(members, upper, uniform=together)
            lower = min(lower, self.lower_bound if found is None else found)
        return lower


def search(
    graph: BlockGraph,
    costs: GraphCosts,
    machine: Machine,
    constraints: Constraints,
) -> Exploration:
    """Search all pipelines; the arguments are those of ``solve``.

    Raises:
        PartitionError: A constraint is wrong.
    """
    built = build_problem(graph, costs, machine, constraints)
    engine = Engine(built, constraints)
    partitions: list[Partition] = []
    shapes = pipeline_shapes(graph, machine, constraints)
    if costs.chunks is not None:  # any stage may hold rows
        shapes = [replace(shape, spread=tuple(range(shape.num_stages))) for shape in shapes]
    pipelines = [candidate(graph, costs, machine, constraints, shape, built) for shape in shapes]
    batches = list(_batches(engine, pipelines))
    upper = lower = inf
    for members, together in batches:
        found = _search(engine, members, upper, together=together)
        lower, upper = min(lower, found.lower_bound), min(upper, found.objective)
        for item in found.pipelines:
            winner = next(one for one in members if one.depth == len(item.prices))
            partitions.append(to_partition(item, built, winner.slots, machine, constraints))
    partitions.sort(key=lambda item: item.objective)
    best_ones = tuple(item.with_bound(lower) for item in partitions[:MOST_CANDIDATES])
    return Exploration(best_ones, engine, tuple(batches), lower)


def _batches(
    engine: Engine, pipelines: Sequence[CandidatePipeline]
) -> Iterator[tuple[Sequence[CandidatePipeline], bool]]:
    """Yield what is searched together (True: candidates that differ in depth only)."""
    fast = [item for item in pipelines if engine.is_fast(item) and engine.may_fit(item)]
    if fast and _uniform(max(fast, key=_depth)):
        yield fast, True
        fast = []
    for item in fast:
        yield [item], False
    slow = [(engine.at_once(item), item) for item in pipelines if not engine.is_fast(item)]
    for _, item in sorted(slow, key=lambda pair: pair[0]):
        yield [item], False


def _search(
    engine: Engine, members: Sequence[CandidatePipeline], upper: float, *, together: bool
) -> SearchResult:
    if engine.has_loops(members[0]):
        return engine.run_loops(members[0], upper)
    if engine.is_fast(members[0]):
        pace = members[0].shape.num_microbatches - 1
        return engine.sweep(members, pace, 1, upper, uniform=together)
    bound = engine.relaxed_bound(members[0], upper) if upper < inf else 0.0
    if bound >= upper:
        return SearchResult(bound)
    return engine.run_labels(members[0], upper)


def _uniform(deepest: CandidatePipeline) -> bool:
    """Whether a position's price depends only on how many stages are behind it."""
    slots = deepest.slots
    alike = len({(slot.capacity, slot.speed) for slot in slots}) == 1
    alike = alike and len({slot.link_in for slot in slots[1:]}) <= 1
    return alike and deepest.rule is None and not any(slot.forbidden for slot in slots)


def _depth(candidate: CandidatePipeline) -> int:
    return candidate.depth
