"""Plans for IPUs: which pipelines and programs are tried, what one plan costs, what would fit.

Every pipeline of the search is a number of IPUs (a power of two: PopTorch attaches to nothing
else), perhaps with a last stage back on the first one for tied weights, and one program: with or
without recomputation, from layer or stage inputs, tables in so many slices, optimizer state on or
off the chip. Its split and memory proportions are searched exactly (``pipeline.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from time import monotonic
from typing import Any

from ipu_pipeline.backends.ipu.config.ipu_config import ONE_IPU_OVERLAPS
from ipu_pipeline.backends.ipu.prices.chain import ChainPrices, openers
from ipu_pipeline.backends.ipu.prices.chip import chip_of
from ipu_pipeline.backends.ipu.prices.layout import one_ipu_groups
from ipu_pipeline.backends.ipu.prices.memory import saved_bytes
from ipu_pipeline.backends.ipu.prices.operations import may_serialize, slices_problem
from ipu_pipeline.backends.ipu.prices.pipeline import IPUPipeline, best_prediction, closest
from ipu_pipeline.backends.ipu.prices.predict import DEFAULT_SETTINGS, partition_of
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.spread import splits_of, spread_graphs
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.options.tables import table_of
from ipu_pipeline.planner.options.vocabulary_shares import shares
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.search.constraints import Constraints, layer_rule
from ipu_pipeline.planner.search.from_graph import build_slots, device_groups
from ipu_pipeline.planner.search.infeasible import InfeasibleError
from ipu_pipeline.planner.search.priced import quickest
from ipu_pipeline.planner.search.result import Partition

FACTORS = (1, 2, 4, 8)
PROPORTIONS = (0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
_EVERYTHING_S = 30.0  # for a split under any remedy


@dataclass(frozen=True)
class ProgramChoices:
    """What may be chosen about a program besides its split; one value each fixes it.

    Attributes:
        recompute: Whether every stage but the last is recomputed.
        checkpoint_layers: Whether layers' inputs are kept, too.
        embedding_factors: Slices of a large table that is looked up.
        projection_factors: Slices of a large output projection.
        offchip: Whether optimizer state is in streaming memory.
        proportions: Memory proportions that an IPU may get, rising; empty: as in the settings.
    """

    recompute: tuple[bool, ...] = (True, False)
    checkpoint_layers: tuple[bool, ...] = (True, False)
    embedding_factors: tuple[int, ...] = FACTORS
    projection_factors: tuple[int, ...] = FACTORS
    offchip: tuple[bool, ...] = (False, True)
    proportions: tuple[float, ...] = ()

    @classmethod
    def fixed(cls, settings: IPUSettings) -> ProgramChoices:
        """Leave only the split to choose."""
        return cls(
            (settings.recompute,),
            (settings.checkpoint_layers,),
            (settings.embedding_factor,),
            (settings.projection_factor,),
            (settings.optimizer_offchip,),
        )


@dataclass(frozen=True)
class IPUPlanning:
    """Searches and prices pipelines of one graph.

    Attributes:
        chain: Prices of the blocks.
        settings: The program, where it is not to be chosen.
        choices: What is to be chosen.
    """

    chain: ChainPrices
    settings: IPUSettings
    choices: ProgramChoices = field(default_factory=ProgramChoices)

    @classmethod
    def of(
        cls,
        graph: BlockGraph,
        machine: Machine,
        settings: IPUSettings = DEFAULT_SETTINGS,
        choices: ProgramChoices | None = None,
    ) -> IPUPlanning:
        """Return what plans ``graph`` on the IPUs of ``machine``; the mode is the graph's.

        Raises:
            PlanError: The machine's devices are no IPUs.
        """
        run = replace(settings, training=graph.training)
        chip = chip_of(machine).without(run.num_io_tiles)
        return cls(ChainPrices(graph, chip), run, choices or ProgramChoices())

    @property
    def graph(self) -> BlockGraph:
        """The model."""
        return self.chain.graph

    def search(self, machine: Machine, constraints: Constraints) -> Partition:
        """Return the quickest split of all pipelines and programs.

        Raises:
            PartitionError: The constraints leave no pipeline to try.
            InfeasibleError: Nothing fits; the message says what would.
        """
        limit = constraints.time_limit_s
        deadline = limit and monotonic() + limit
        found = self.pipelines(machine, constraints)
        best = quickest(found, deadline=deadline)
        if best.pipeline is None:
            # PopTorch rounds other numbers of IPUs up, and leaves the rest idle.
            others = self._pipelines(machine, constraints, powers=False)
            best = quickest(others, deadline=deadline)
        prediction = best_prediction(best)
        if prediction is None:
            raise self.explain(machine, constraints)
        ipus = {name: stage.ipu for stage in prediction.layout.stages for name in stage.blocks}
        settings = splits_of(self.graph, ipus, prediction.settings)
        return partition_of(replace(prediction, settings=settings), best.lower_bound_s)

    def costs(self, machine: Machine) -> GraphCosts:
        """Return the price of every block alone."""
        graph, settings, chain = self.graph, self.settings, self.chain
        share = settings.proportion(0)
        times = chain.times(replace(settings, accumulation=2), share)
        blocks = {
            block.name: BlockCost(
                (
                    BlockChoice(
                        times.forward_s[i + 1] - times.forward_s[i],
                        times.backward_s[i + 1] - times.backward_s[i],
                        stash_bytes=saved_bytes(block, settings) if graph.training else 0,
                        workspace_bytes=chain.working(settings, share, i, i + 1),
                    ),
                ),
                _weights(graph, block, settings),
            )
            for i, block in enumerate(graph.blocks)
        }
        return GraphCosts(blocks, "ipu", (1.0,) * len(machine.devices))

    # ---- what is tried

    def pipelines(
        self, machine: Machine, constraints: Constraints, *, or_none: bool = False
    ) -> list[IPUPipeline]:
        """Return every pipeline with every program that the constraints leave.

        Raises:
            PartitionError: There is none, and ``or_none`` does not allow it.
        """
        found = list(self._pipelines(machine, constraints, powers=True))
        found = found or list(self._pipelines(machine, constraints, powers=False))
        if not found and not or_none:
            raise PartitionError(self._nothing_to_try(machine, constraints))
        return found

    def _pipelines(
        self, machine: Machine, constraints: Constraints, *, powers: bool
    ) -> Iterator[IPUPipeline]:
        graph = self.graph
        groups = _device_groups(graph, constraints)
        costs = GraphCosts({}, "ipu", (1.0,) * len(machine.devices))
        for replicas, devices in self._layouts(machine, constraints):
            num_ipus = max(devices) + 1
            starts = self._starts_on(devices, constraints)
            count = constraints.num_microbatches
            if len(devices) > len(starts) - 1 or count < _least_microbatches(len(devices), graph):
                continue
            if powers and num_ipus & (num_ipus - 1):
                continue
            rule = None
            if constraints.layers_per_ipu is not None:
                rule = layer_rule(graph, constraints.layers_per_ipu, devices)
            slots = build_slots(costs, machine, constraints, devices, graph, count)
            for program in self.programs(num_ipus, replicas, count, constraints):
                yield IPUPipeline(
                    self.chain, program, slots, starts, self.choices.proportions, groups, rule
                )

    def _starts_on(self, devices: Sequence[int], constraints: Constraints) -> tuple[int, ...]:
        """Return :meth:`starts` without those that would divide what belongs together."""
        index = self.graph.block_index
        state = [sum(1 << index[n] for n in item.blocks) for item in self.graph.state]
        found = _uncut(self.starts(constraints), state)
        if len(set(devices)) == len(devices):  # groups on one IPU are in one stage
            return _uncut(found, _device_groups(self.graph, constraints))
        return found

    def starts(self, constraints: Constraints) -> tuple[int, ...]:
        """Positions of the blocks that may begin a stage, and the number of blocks."""
        uncut = {self.graph.block_index[name] for name in constraints.forbidden_cuts}
        found = [start for start in openers(self.graph) if start not in uncut]
        return (*found, len(self.graph.blocks))

    def programs(
        self, num_ipus: int, replicas: int, microbatches: int, constraints: Constraints
    ) -> Iterator[IPUSettings]:
        """Yield the settings of every program over ``num_ipus`` IPUs."""
        training, many = self.graph.training, num_ipus > 1
        base = replace(
            self.settings,
            num_ipus=num_ipus,
            replicas=replicas,
            training=training,
            accumulation=microbatches if training else 1,
            device_iterations=self.settings.device_iterations if training else microbatches,
            proportions=tuple(self.settings.proportion(ipu) for ipu in range(num_ipus)),
            sharded=self.settings.sharded and replicas > 1,
            pipelined=many,
            block_slices=self._slices(constraints),
            stage_starts=(),
        )
        asked = {"always": (True,), "never": (False,)}
        again = asked.get(str(constraints.recompute), self.choices.recompute)
        again = again if many and training else (False,)
        places = self.choices.offchip if base.state_bytes and training else (False,)
        for recompute, offchip in product(again, places):
            kept = self.choices.checkpoint_layers if recompute else (False,)
            for by_layer, (embedding, projection) in product(kept, self._factors(constraints)):
                yield replace(
                    base,
                    recompute=recompute,
                    optimizer_offchip=offchip,
                    checkpoint_layers=by_layer,
                    embedding_factor=embedding,
                    projection_factor=projection,
                )

    def _slices(self, constraints: Constraints) -> tuple[tuple[str, int], ...] | None:
        asked = constraints.factors(self.graph.block_index)
        if not asked:
            return self.settings.block_slices
        for name, factor in asked.items():
            problem = slices_problem(self.graph, name, factor)
            if problem:
                raise PartitionError(problem)
        return tuple((name, factor) for name, factor in asked.items() if factor > 1)

    def _factors(self, constraints: Constraints) -> list[tuple[int, int]]:
        """Slices of embeddings and projections: those that divide every table."""
        if constraints.serialize or not constraints.allow_serialize:
            return [(1, 1)]
        given = (self.choices.embedding_factors, self.choices.projection_factors)
        rows: tuple[list[int], list[int]] = ([], [])
        for block in self.graph.blocks:
            table = table_of(self.graph, block)
            if table is not None and may_serialize(self.graph, block):
                rows[block.kind != "embedding"].append(table.rows)
        embedding, projection = (
            [f for f in factors if all(size % f == 0 for size in sizes)]
            if sizes or len(factors) == 1
            else [1]
            for sizes, factors in zip(rows, given, strict=True)
        )
        return [*product(embedding, projection)]

    def _layouts(
        self, machine: Machine, constraints: Constraints
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield replicas and the IPU of every stage."""
        available = len(machine.devices)
        wanted, returning = constraints.num_stages, len(_device_groups(self.graph, constraints))
        returning = returning if shares(self.graph) else min(returning, 1)
        replicas = constraints.replicas
        if constraints.stage_devices is not None:
            if (max(constraints.stage_devices) + 1) * replicas <= available:
                yield replicas, constraints.stage_devices
            return
        most = min(available // replicas, len(self.graph.blocks))
        most = min(most, 1) if self.settings.num_io_tiles else most
        for ipus in range(1, most + 1):
            if wanted in (None, ipus):
                yield replicas, tuple(range(ipus))
            for back in range(1, min(ipus, returning + 1)):  # shares of a table come back in turn
                if wanted in (None, ipus, ipus + back):
                    yield replicas, (*range(ipus), *range(back))
            if self._ties_a_decoder and wanted in (None, ipus):
                for last in range(1, ipus - 1):
                    yield replicas, (*range(last + 1), 0, *range(last + 1, ipus), 0)

    @property
    def _ties_a_decoder(self) -> bool:
        """Whether weights are shared by blocks in front of, between and behind layers."""
        kinds = [block.kind for block in self.graph.blocks]
        layers = [position for position, kind in enumerate(kinds) if kind == "layer"]
        index = self.graph.block_index
        return any(
            kinds[index[name]] != "layer" and layers[0] < index[name] < layers[-1]
            for group in self.graph.tied_groups
            for name in group
            if layers
        )

    def _nothing_to_try(self, machine: Machine, constraints: Constraints) -> str:
        if self.settings.num_io_tiles:
            return ONE_IPU_OVERLAPS
        depth = constraints.num_stages or 1
        count = constraints.num_microbatches
        least = _least_microbatches(depth, self.graph)
        if count < least:
            return (
                f"PopART needs at least {count_of(least, 'microbatch')} per step for the "
                f"{count_of(depth, 'stage')} asked for, got {count}; raise gradient accumulation "
                "or use fewer stages"
            )
        deep = [
            len(devices)
            for _, devices in self._layouts(machine, constraints)
            if len(devices) < len(self._starts_on(devices, constraints))
        ]
        needed = min((_least_microbatches(stages, self.graph) for stages in deep), default=least)
        if count < needed:
            return (
                f"PopART needs at least {count_of(needed, 'microbatch')} per step for the "
                f"{count_of(min(deep), 'stage')} that {count_of(depth, 'IPU')} get here, as what "
                f"shares a parameter is on one IPU; it got {count}: raise gradient accumulation"
            )
        places = len(self.starts(constraints)) - 1
        if places < depth:
            called = [name.split("#")[0] for name in self.graph.block_index if "#" in name]
            again = f" ({called[0]!r} is called again: all between is one stage)" if called else ""
            return (
                f"{count_of(depth, 'stage')} need as many blocks that a module's call begins, the "
                f"model has {places} at the given granularity{again}; ask for fewer stages"
            )
        return (
            f"no pipeline to try: {count_of(constraints.replicas, 'replica')}, "
            f"{constraints.num_stages or 'any number of'} stages, "
            f"{count_of(len(machine.devices), 'IPU')}"
        )

    # ---- when nothing fits

    def explain(self, machine: Machine, constraints: Constraints) -> InfeasibleError:
        """Return the error that says how full the closest pipeline is, and what does fit."""
        until = monotonic() + _EVERYTHING_S
        remedies: dict[str, IPUPlanning] = {
            "keep the optimizer state off chip": self._with(offchip=(True,)),
            "recompute, from the inputs of layers": self._with(
                recompute=(True,), checkpoint_layers=(True,)
            ),
            "lower matmul_proportion": self._with(proportions=PROPORTIONS),
            "serialize embedding and projection": self._with(
                embedding_factors=FACTORS, projection_factors=FACTORS
            ),
            "do all of this: optimizer state off chip, recomputation, slices, a lower "
            "matmul_proportion": self._with(
                offchip=(True,), proportions=PROPORTIONS,
                embedding_factors=FACTORS, projection_factors=FACTORS,
            ),
        }  # fmt: skip
        for graph in [*spread_graphs(self.graph)][-1:]:
            chain = ChainPrices(graph, self.chain.chip)
            remedies["spread the tables over IPUs (vocabulary 'auto')"] = replace(self, chain=chain)
        helps = [
            what
            for what, planning in remedies.items()
            if planning != self and planning._fits(machine, constraints, until)
        ]
        if not helps and constraints.num_stages is not None:
            free = replace(constraints, num_stages=None)
            if self._fits(machine, free, until):
                helps.append("leave the number of IPUs open")
        best = closest(self.pipelines(machine, constraints))
        text = (
            f"no split fits {machine.name}: spread evenly over "
            f"{count_of(best.settings.num_ipus, 'IPU')}, {best.tile_text(best.fullest[1])}; "
        )
        if not helps:
            return InfeasibleError(text + "use more IPUs, a smaller micro batch or sequence length")
        return InfeasibleError(text + f"it fits if you {'; or '.join(helps)}")

    def _with(self, **choices: Any) -> IPUPlanning:
        return replace(self, choices=replace(self.choices, **choices))

    def _fits(self, machine: Machine, constraints: Constraints, until: float) -> bool:
        try:
            found = self.pipelines(machine, constraints)
        except PartitionError:
            return False
        return any(monotonic() <= until and item.fits() for item in found)


def _weights(graph: BlockGraph, block: Block, settings: IPUSettings) -> dict[str, int]:
    """Bytes by parameter: weight, accumulator, and optimizer state on the chip."""
    found = {}
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        per_element: float = settings.element_bytes
        if parameter.trainable and settings.training:
            per_element += settings.element_bytes
            per_element += settings.chip_state_bytes
        found[fqn] = int(parameter.numel * per_element)
    return found


def _uncut(starts: tuple[int, ...], groups: Sequence[int]) -> tuple[int, ...]:
    """Leave out the starts between blocks of one group."""
    spans = [((mask & -mask).bit_length() - 1, mask.bit_length() - 1) for mask in groups]
    return tuple(s for s in starts if not any(first < s <= last for first, last in spans))


def _least_microbatches(num_stages: int, graph: BlockGraph) -> int:
    shape = PipelineShape.of(num_stages, 1, training=graph.training)
    return schedule_kind("popart").least_microbatches(shape)


def _device_groups(graph: BlockGraph, constraints: Constraints) -> tuple[int, ...]:
    """Masks of blocks that must be on one IPU: PopART copies no variable between IPUs."""
    return device_groups(graph, (*constraints.same_device, *one_ipu_groups(graph)))
