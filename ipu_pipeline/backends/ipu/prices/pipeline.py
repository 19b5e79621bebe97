"""One IPU pipeline as the search sees it: the step of ``timing.py`` as rows over its stages.

The step is fill, main and flush cycles (rows over IPUs), the copies of every cycle (a row over
links), the update of the IPU with most parameters (``outer_s``), the streaming of optimizer state
(a row over boards), and what no split changes: input, host, latency, one chain of program steps
per tensor. This is the step time itself, but for two things that only make the step longer: copies
over one link by two boundaries, and parameters that several IPUs hold. A split is therefore
priced by ``timing.step_time`` before it is the answer, and the rows are a bound.

Source: as ``timing.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from ipu_pipeline.backends.ipu.prices.chain import ChainPrices, Floats, Holding, PassTimes
from ipu_pipeline.backends.ipu.prices.layout import layout_of
from ipu_pipeline.backends.ipu.prices.memory import add_up, most_bytes
from ipu_pipeline.backends.ipu.prices.predict import Prediction
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import (
    all_reduce_s_per_element,
    input_time,
    optimizer_s_per_element,
    streaming_s_per_element,
)
from ipu_pipeline.planner.options.block_cost import BlockChoice
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.objective import Objective, PacedTerm, StagePrice
from ipu_pipeline.planner.search.constraints import LayerRule
from ipu_pipeline.planner.search.ideals import Lattice, boundaries
from ipu_pipeline.planner.search.label_setting import LabelSettingSearch, Part
from ipu_pipeline.planner.search.priced import Quickest
from ipu_pipeline.planner.search.problem import Problem, Slot

_EQUAL = 1e-12


@dataclass(frozen=True)
class IPUPipeline:
    """Devices of the stages, and the settings of the program (but for layers and proportions).

    Attributes:
        chain: Prices of the blocks.
        settings: The run; replicas, accumulation and IPUs are those of this pipeline.
        slots: Position of every stage.
        starts: Positions of the blocks that may begin a stage, and the number of blocks.
        proportions: Memory proportions that an IPU may get, rising; empty: those of the settings.
        same_device: Masks of the blocks whose stages must be on one IPU.
        rule: Layers of each IPU, where they are given.
        least_free: Share of every tile's memory that must stay free.
    """

    chain: ChainPrices
    settings: IPUSettings
    slots: tuple[Slot, ...]
    starts: tuple[int, ...]
    proportions: tuple[float, ...] = ()
    same_device: tuple[int, ...] = ()
    rule: LayerRule | None = None
    least_free: float = 0.0

    @property
    def devices(self) -> tuple[int, ...]:
        """IPU of every stage."""
        return tuple(slot.device for slot in self.slots)

    @cached_property
    def objective(self) -> Objective:
        """Seconds of a step as rows (module docstring)."""
        run, chain, count = self.settings, self.chain, len(self.slots)
        shape = PipelineShape.of(count, run.num_microbatches, training=run.training)
        base = schedule_kind("popart").objective(shape)
        none = (0,) * count
        rows = list(base.rows)
        input_s = input_time(chain.graph, run, chain.chip) * run.exposed_inputs
        fixed_s = run.num_microbatches * input_s
        if count > 1:
            total = 2 * count - 1 if run.training else count
            cycles = run.num_microbatches + total - 1
            fixed_s += cycles * chain.chip.link_latency_s
            rows.append(PacedTerm(cycles, none, none, 0, tuple(range(count))))
        if run.training:
            tensors = sum(parameter.trainable for parameter in chain.graph.parameters)
            fixed_s += chain.chip.calibration.step_host_s / run.device_iterations
            fixed_s += tensors * chain.chip.calibration.tensor_update_s
        if self._streaming_s:
            boards = tuple(device // chain.chip.ipus_per_board for device in self.devices)
            rows.append(PacedTerm(1, none, none, 1, boards))
        return Objective(tuple(rows), 0, count, fixed_s)

    @cached_property
    def _update_s(self) -> float:
        """Seconds per step and trained element of the fullest IPU."""
        run, chip = self.settings, self.chain.chip
        if not run.training:
            return 0.0
        return optimizer_s_per_element(run, chip) + all_reduce_s_per_element(run, chip)

    @cached_property
    def _streaming_s(self) -> float:
        """Seconds per step and trained element of the fullest board."""
        return streaming_s_per_element(self.settings, self.chain.chip)

    # ---- bounds

    @property
    def quick_bound_s(self) -> float:
        """Every main cycle takes at least the mean load of the IPUs."""
        forward, backward = self._fastest.forward_s[-1], self._fastest.backward_s[-1]
        trained = self.chain.holding(0, len(self.chain.names)).updated
        ipus = self.settings.num_ipus
        return (
            self.objective.fixed_s
            + self.settings.num_microbatches * (forward + backward) / ipus
            + trained / ipus * self._update_s
        )

    @cached_property
    def _fastest(self) -> PassTimes:
        given = self.proportions or tuple(
            self.settings.proportion(ipu) for ipu in range(self.settings.num_ipus)
        )
        return self.chain.times(self.settings, max(given))

    def bound_s(self) -> float:
        """Least load of every row, memory ignored."""
        rows = self._least_rows()
        weights = [row.weight for row in self.objective.rows if row.extra < 0]
        rest = self.quick_bound_s - self.settings.num_microbatches * (
            (self._fastest.forward_s[-1] + self._fastest.backward_s[-1]) / self.settings.num_ipus
        )
        return float(np.dot(rows, weights)) + rest

    def _least_rows(self) -> Floats:
        """Per row over IPUs: the least busiest load of any split, every stage on its own IPU."""
        run, count = self.settings, len(self.slots)
        again = run.recompute and run.training
        key = (id(self._fastest), count, again, self.starts, run.training)
        if key in self.chain.least_rows:
            return self.chain.least_rows[key]
        rows = [row for row in self.objective.rows if row.extra < 0]
        ahead = np.array([row.forward for row in rows], float)
        back = np.array([row.backward for row in rows], float)
        forward, backward = (table[[*self.starts]] for table in self._fastest.arrays)
        last = len(self.starts) - 1
        rest = np.full((last + 1, len(rows)), inf)
        rest[last] = 0.0
        for stage in range(count - 1, -1, -1):
            best = np.full_like(rest, inf)
            repeated = again and stage < count - 1
            for start in range(last if stage else 1):
                f = forward[start + 1 :] - forward[start]
                b = backward[start + 1 :] - backward[start] + (f if repeated else 0.0)
                loads = np.outer(f, ahead[:, stage]) + np.outer(b, back[:, stage])
                best[start] = np.maximum(loads, rest[start + 1 :]).min(axis=0)
            rest = best
        self.chain.least_rows[key] = rest[0]
        return rest[0]

    # ---- the search's side

    @cached_property
    def problem(self) -> Problem:
        """Blocks with their least seconds, in the order of execution."""
        names, times = self.chain.names, self._fastest
        options = tuple(
            (BlockChoice(times.forward_s[i + 1] - times.forward_s[i],
                    times.backward_s[i + 1] - times.backward_s[i]),)
            for i in range(len(names))
        )  # fmt: skip
        preds = tuple((1 << (i - 1)) if i else 0 for i in range(len(names)))
        return Problem(names, preds, options, same_device=self.same_device)

    def label_search(self, upper_s: float, deadline: float | None) -> LabelSettingSearch:
        """Return the search over the splits that take less than ``upper_s``."""
        lattice = Lattice.of_masks(self.problem, ((1 << start) - 1 for start in self.starts))
        return LabelSettingSearch(
            lattice,
            self,  # prices as an option pricer does
            self.slots,
            self.objective,
            boundaries(lattice, self.slots, self.rule),
            deadline,
            (upper_s - self.objective.fixed_s) / self.settings.num_microbatches,
            fits_together=self.fits_together,
            true_s=self.true_s,
        )

    def prices(
        self, done: int, stage: int, slot: Slot, *, shared_pool: bool = False
    ) -> list[StagePrice]:
        """Return the stage at every memory proportion that fits.

        Where no other stage is on its IPU, only the quickest of them counts.
        """
        if stage & slot.forbidden:
            return []
        start = done.bit_count()
        end = start + stage.bit_count()
        found: list[StagePrice] = []
        for proportion, held in self._fitting([(start, end, slot.in_flight)], slot.device):
            price = self._price(start, end, slot, proportion, held)
            if found and price.load_s > found[-1].load_s * (1 + _EQUAL) and not shared_pool:
                break
            found.append(price)
        if shared_pool or not found:
            return found
        return [min(found, key=lambda price: price.memory_bytes)]

    def _pick(self, proportion: float) -> int:
        """Position of a memory proportion among those that an IPU may get."""
        return self.proportions.index(proportion) if self.proportions else 0

    def _price(self, start: int, end: int, slot: Slot, proportion: float, held: int) -> StagePrice:
        run, times = self.settings, self.chain.times(self.settings, proportion)
        forward = times.forward_s[end] - times.forward_s[start]
        backward = times.backward_s[end] - times.backward_s[start]
        if run.training and run.recompute and end < len(self.chain.names):
            backward += forward
        updated = self.chain.holding(start, end).updated
        extra = (self._copy_s(slot, end), updated * self._streaming_s)
        return StagePrice(
            forward,
            backward,
            0.0,
            0.0,
            updated * self._update_s,
            held,
            (self._pick(proportion),),
            extra,
        )

    def _copy_s(self, slot: Slot, end: int) -> float:
        """Seconds of the busier direction of the boundary behind a stage, without latency."""
        stage = slot.index
        if stage == len(self.slots) - 1 or end == len(self.chain.names):
            return 0.0
        chip = self.chain.chip
        speed = chip.link_bytes_per_s(slot.device, self.slots[stage + 1].device)
        sent = max(self.chain.sent_bytes(end, self.settings))
        return sent / (speed * chip.calibration.copy_share)

    @cached_property
    def _most_bytes(self) -> int:
        """Bytes of an IPU whose fullest tile just fits."""
        return most_bytes(self.chain.chip, 1 - self.least_free)

    def _fitting(
        self, stages: Sequence[tuple[int, int, int]], ipu: int
    ) -> Iterator[tuple[float, int]]:
        """Yield the memory proportions with which ``stages`` fit one IPU, and its bytes.

        Args:
            stages: First block, end and microbatches in flight of each.
            ipu: The IPU.
        """
        chain, run = self.chain, self.settings
        holdings = [chain.holding(start, end) for start, end, _ in stages]
        held: Holding = holdings[0] if len(stages) == 1 else chain.joined(holdings)
        least = add_up(
            run,
            held.elements,
            held.trainable,
            held.largest,
            [chain.stage(run, *stage) for stage in stages],
            0,
            held.products,
        )
        others = least.total_bytes - least.temporaries
        if others > self._most_bytes:
            return
        # The quickest first: more memory never slows a matrix product.
        for proportion in self.proportions[::-1] or (run.proportion(ipu),):
            working = max(chain.working(run, proportion, start, end) for start, end, _ in stages)
            total = others + max(working, least.temporaries)
            if total <= self._most_bytes:
                yield proportion, total

    def fits_together(self, parts: Sequence[Part]) -> bool:
        """Whether the stages of one IPU, which have one memory proportion, fit it together."""
        if len(parts) == 1:
            return True
        proportions = {price.picks for _, _, _, price in parts}
        if len(proportions) > 1:
            return False
        stages = [
            (done.bit_count(), done.bit_count() + blocks.bit_count(), self.slots[stage].in_flight)
            for done, blocks, stage, _ in parts
        ]
        chosen, ipu = proportions.pop()[0], self.slots[parts[0][2]].device
        return any(self._pick(share) == chosen for share, _ in self._fitting(stages, ipu))

    def fits(self) -> bool:
        """Whether a narrow search finds a split that fits."""
        search = self.label_search(inf, None)
        search.proof_s = 0.0
        return search.run().objective < inf

    # ---- the price itself

    def true_s(self, reached: Sequence[int], prices: Sequence[StagePrice]) -> float:
        """Seconds of the step with a split; ``inf`` if it does not fit after all."""
        found = self.prediction(reached, prices)
        full = max(memory.total_bytes for memory in found.memory)
        return found.time.total_s if full <= self._most_bytes else inf

    def prediction(self, reached: Sequence[int], prices: Sequence[StagePrice]) -> Prediction:
        """Return what a split does.

        Args:
            reached: Masks of the blocks done after each stage.
            prices: Of the stages; their picks say the memory proportions.
        """
        chosen = dict(zip(self.devices, (price.picks[0] for price in prices), strict=True))
        shares = self.settings.proportions
        if self.proportions:
            ipus = range(self.settings.num_ipus)
            shares = tuple(self.proportions[chosen[ipu]] for ipu in ipus)
        return self._predicted([mask.bit_count() for mask in reached], shares)

    def even(self) -> Prediction:
        """Predict stages with about the same number of parameters."""
        chain, places = self.chain, list(self.starts)
        total, count = chain.holding(0, len(chain.names)).elements, len(self.slots)
        ends: list[int] = []
        for stage in range(1, count):
            later = [place for place in places if place > (ends[-1] if ends else 0)]
            goal = total * stage / count
            ends.append(
                min(
                    later[: max(1, len(later) - (count - stage))],
                    key=lambda place: abs(chain.holding(0, place).elements - goal),
                )
            )
        least = self.proportions[:1] * self.settings.num_ipus or self.settings.proportions
        return self._predicted([*ends, len(chain.names)], least)

    def _predicted(self, ends: Sequence[int], shares: tuple[float, ...]) -> Prediction:
        """Predict stages that end before these blocks, with a memory proportion for every IPU."""
        chain, settings = self.chain, replace(self.settings, proportions=shares)
        stages = [
            (device, chain.names[start:end])
            for device, start, end in zip(self.devices, [0, *ends], ends, strict=False)
        ]
        layout = layout_of(stages, settings.num_ipus)
        return Prediction(chain.graph, layout, settings, chain.chip)


def closest(pipelines: Iterable[IPUPipeline]) -> Prediction:
    """Return the evenly spread split whose fullest tile is the least full: where none fits."""
    return min((item.even() for item in pipelines), key=lambda found: found.fullest[0])


def best_prediction(best: Quickest[IPUPipeline]) -> Prediction | None:
    """Return what the outcome of a search does; ``None`` when nothing fits."""
    if best.pipeline is None:
        return None
    split = best.found.pipelines[0]
    return best.pipeline.prediction(split.boundaries, split.prices)
