"""The price of a plan on GPUs, and the prices of blocks that the search minimises it with.

A stage's device is a rank of the pipeline; the GPUs of that rank are its tensor, context and data
parallel group. The search sees one device per rank (:func:`rank_machine`), whose links are as fast
as its share of the residual stream makes them; the price puts the stages of the plan together as a
:class:`~ipu_pipeline.backends.cluster.prices.rank_step.RankStep`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, ParallelSizes, sizes_of
from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankPricer
from ipu_pipeline.backends.cluster.prices.rank_step import BUFFER_BYTES, RankStep
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.text import GIGABYTES
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.options.cost_models import device_speeds
from ipu_pipeline.planner.options.vocabulary_shares import with_shares
from ipu_pipeline.planner.price import (
    PlanPrice,
    counted_costs,
    kept_by_last_stage,
    spread_stages,
    workload_of,
)
from ipu_pipeline.planner.schedules import schedule_kind
from ipu_pipeline.planner.search.given_split import price_stages

_ENDS = ("head", "loss")
# Priced blocks by what their price depends on.
Known = dict[tuple[Any, ...], RankBlock]


@dataclass(frozen=True)
class RankCosts:
    """Prices the blocks of one workload for the ranks of a pipeline.

    Attributes:
        work: What is priced, with the settings of GPUs.

    Raises:
        PlanError: A setting is wrong.
    """

    work: Workload

    @cached_property
    def settings(self) -> GpuSettings:
        """Of the run."""
        return GpuSettings.read(self.work.settings)

    @cached_property
    def sizes(self) -> ParallelSizes:
        """Who shares what; the depth of the pipeline plays no role in the price of a block."""
        micro_batch = max(1, self.work.graph.micro_batch_size)
        return self.settings.sizes(dp=self.work.replicas, micro_batch=micro_batch)

    @cached_property
    def pricer(self) -> RankPricer:
        """Prices of blocks as they run plainly."""
        engine = self.settings.rank_engine(self.work.graph, self.work.machine)
        return RankPricer(self.work.graph, self.work.machine, self.sizes, engine)

    def all(self) -> GraphCosts:
        """Return the ways to run every block, with all that a rank holds for it."""
        graph, machine = self.work.graph, rank_machine(self.work, self.pricer)
        menus, together, in_order = self._menus()
        states = self._states()
        blocks = {
            block.name: BlockCost(menus[block.name], {fqn: states[fqn] for fqn in block.parameters})
            for block in graph.blocks
        }
        return GraphCosts(
            blocks, "analytic", device_speeds(machine), together, in_order, self._updates(),
            ranks=machine, message_overlap=self.pricer.engine.tensor_overlap,
        )  # fmt: skip

    def _menus(
        self,
    ) -> tuple[Mapping[str, tuple[BlockChoice, ...]], tuple[tuple[str, ...], ...], bool]:
        """Ways of every block, blocks that stay together, and whether stashes go in order."""
        graph, sizes = self.work.graph, self.sizes
        if not self.pricer.engine.fused and sizes.cp * sizes.ep == 1:
            found = counted_costs(replace(self.work, graph=self.pricer.as_kept(graph)))
            menus = {name: cost.choices for name, cost in found.blocks.items()}
            if sizes.tp > 1:
                menus = {name: self._timed(name, ways) for name, ways in menus.items()}
            return menus, found.together, found.frees_in_order
        sliced = sorted(name for name, factor in self.work.factors.items() if factor > 1)
        if sliced:
            raise PlanError(
                f"only whole ranks of engine torch run blocks in slices, and the plan serializes "
                f"{sliced[0]!r}; take it out of serialize, or set tp, cp and ep to 1 and engine to "
                "torch"
            )
        ends = tuple(block.name for block in graph.blocks if block.kind in _ENDS)
        places = [graph.block_index[name] for name in ends]
        joined = len(ends) > 1 and places == list(range(places[0], places[0] + len(ends)))
        return self._rank_menus(), (ends,) if joined else (), False

    def _timed(self, name: str, ways: tuple[BlockChoice, ...]) -> tuple[BlockChoice, ...]:
        """Return ways of a block with the seconds that a rank takes for its part of it."""
        own, plain = self.pricer.block(self.work.graph[name]), ways[0]
        return tuple(
            replace(
                way,
                forward_s=own.forward_s + way.forward_s - plain.forward_s,
                backward_s=own.backward_s
                + (own.forward_s if way.recompute else way.backward_s - plain.backward_s),
            )
            for way in ways
        )

    def _rank_menus(self) -> dict[str, tuple[BlockChoice, ...]]:
        ways = ways_of(self.pricer, last_alone=kept_by_last_stage(self.work) == 1)
        return {
            block.name: tuple(
                BlockChoice(way.forward_s, way.backward_s, way.saved_bytes, way.workspace_bytes,
                            recompute=number > 0)
                for number, way in enumerate(own)
            )
            for block, own in zip(self.work.graph.blocks, ways, strict=True)
        }  # fmt: skip

    def _states(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state of every parameter on a rank."""
        probe = Block("")
        return {
            spec.fqn: int(
                self.pricer.state_bytes(
                    self.pricer.parameters(replace(probe, parameters=(spec.fqn,)))
                )
            )
            for spec in self.work.graph.parameters
        }

    def _updates(self) -> dict[str, float]:
        """Seconds of every block's part of the update; a tied weight is its first block's."""
        pricer, first = self.pricer, dict[str, list[str]]()
        for spec in self.work.graph.parameters:
            if spec.blocks:
                first.setdefault(spec.blocks[0], []).append(spec.fqn)
        probe = Block("")
        return {
            name: pricer.update_s(pricer.parameters(replace(probe, parameters=tuple(fqns))))
            for name, fqns in first.items()
        }


def ways_of(
    pricer: RankPricer, *, last_alone: bool = True, known: Known | None = None
) -> Iterator[tuple[RankBlock, ...]]:
    """Yield how a stage runs every block: as the sizes say, and layers also recomputed whole.

    Args:
        pricer: Of the blocks.
        last_alone: As for :func:`in_stage`.
        known: Blocks without recomputation that were priced before, of any sizes.
    """
    sizes, known = pricer.sizes, {} if known is None else known
    plainly = replace(pricer, sizes=replace(sizes, recompute=()))
    whole = replace(pricer, sizes=replace(sizes, recompute=("full",)))
    found: dict[tuple[Any, ...], tuple[RankBlock, ...]] = {}
    for block in pricer.graph.blocks:
        key: tuple[Any, ...] = (
            id(block.forward_ops), id(block.backward_ops), block.kind, block.saved_bytes,
            block.workspace_bytes, block.kept_bytes, len(block.parameters),
        )  # fmt: skip
        if key not in found:
            ep = sizes.ep if any(".experts." in fqn for fqn in block.parameters) else 1
            own = (*key, sizes.micro_batch, sizes.tp, sizes.cp, ep)
            if own not in known:
                known[own] = plainly.block(block)
            ways = [in_stage(block, known[own], last_alone=last_alone)]
            if block.kind == "layer":
                ways = [one.recomputed(block, known[own]) for one in (pricer, whole)]
            found[key] = tuple(gathered(pricer, block, way) for way in ways)
        yield found[key]


def in_stage(block: Block, found: RankBlock, *, last_alone: bool = True) -> RankBlock:
    """Return a priced block as a stage of Megatron holds it.

    Before an embedding runs backward, what its microbatch kept is freed. Head and loss run one
    microbatch at a time where the last stage has one in flight (``last_alone``).
    """
    if block.kind in ("embedding", "other"):
        return replace(found, workspace_bytes=0.0)
    if block.kind in _ENDS and last_alone:
        return replace(
            found, saved_bytes=0.0, workspace_bytes=found.saved_bytes + found.workspace_bytes
        )
    return found


def gathered(pricer: RankPricer, block: Block, found: RankBlock) -> RankBlock:
    """Return a block whose weights or gradients are shared out among the data parallel ranks.

    With stage 3 weights are gathered before each pass of every microbatch, with stage 2 and 3
    gradients are reduced behind each backward pass; both beside what other blocks compute, not
    beside their collectives, so that the weights of two blocks are whole at one time.

    Source: Rajbhandari et al., ZeRO, SC 2020, section 7; FSDP, Zhao et al., VLDB 2023.
    """
    stage = pricer.sizes.zero_stage
    if stage < 2:
        return found
    engine = pricer.engine
    gather_s = pricer.shared_ring_s(found.parameters, engine.weight_bytes) if stage == 3 else 0.0
    reduce_s = pricer.shared_ring_s(found.parameters, engine.gradient_bytes)
    own_s = pricer.exchanged_s(block) if block.kind == "layer" else 0.0
    held = found.parameters.dense + found.parameters.experts
    whole = 2 * engine.weight_bytes + engine.gradient_bytes if stage == 3 else 0
    return replace(
        found,
        forward_s=max(found.forward_s, own_s + gather_s),
        backward_s=max(found.backward_s, own_s + gather_s + reduce_s),
        workspace_bytes=found.workspace_bytes + whole * held,
    )


def rank_machine(work: Workload, pricer: RankPricer) -> Machine:
    """Return the ranks of all pipelines as devices of one machine.

    Every link carries a rank's share of the residual stream; some of the copies of a rank with
    several stages run beside its passes.
    """
    machine, sizes, engine = work.machine, pricer.sizes, pricer.engine
    shared = sizes.tp * sizes.cp
    stride = shared * (1 if engine.ours else sizes.dp)
    loops = schedule_kind(work.schedule).stages_per_device != (1,)
    shown = 1.0 - (engine.pipeline_overlap if loops else 0.0)
    kernels = machine.devices[0].kernels
    speed = shared * (1.0 if kernels is None else kernels.link_share) / shown

    def link(of: Link) -> Link:
        return Link(of.bytes_per_s * speed, of.latency_s * shown)

    boards = machine.board_link
    return replace(
        machine,
        name=f"{machine.name}, {shared} GPUs for each" if shared > 1 else machine.name,
        devices=_rank_devices(machine, shared, stride),
        link=link(machine.link),
        board_link=None if boards is None else link(boards),
        devices_per_board=machine.devices_per_board and max(1, machine.devices_per_board // stride),
    )


def _rank_devices(machine: Machine, shared: int, stride: int) -> tuple[Device, ...]:
    """Return the device of every rank: the least of its group in memory and speed."""
    count = len(machine.devices) // shared
    same = all(
        one.memory_bytes == machine.devices[0].memory_bytes
        and one.reserved_bytes == machine.devices[0].reserved_bytes
        and one.flops_per_s == machine.devices[0].flops_per_s
        for one in machine.devices
    )
    if same:
        first = machine.devices[0]
        one = replace(first, name="its GPUs", reserved_bytes=first.reserved_bytes + BUFFER_BYTES)
        return (one,) * count
    ranks = len(machine.devices) // stride
    groups = [machine.devices[rank * stride : (rank + 1) * stride] for rank in range(ranks)]
    found = []
    for group in groups:
        room = min(one.memory_bytes - one.reserved_bytes for one in group) - BUFFER_BYTES
        slowest = min(group, key=lambda one: one.peak_flops_per_s("float32"))
        found.append(replace(slowest, reserved_bytes=max(0, slowest.memory_bytes - max(0, room))))
    return tuple(found) * (count // ranks)


def rank_step_of(plan: Plan) -> RankStep:
    """Return a plan as a pipeline of ranks.

    Raises:
        PlanError: The plan's settings are wrong, or ask for more devices than there are.
    """
    return _priced_ranks(plan)[0]


def _priced_ranks(plan: Plan) -> tuple[RankStep, Machine, str]:
    """Return the pipeline, its ranks as devices, and what limits it."""
    sizes, work = sizes_of(plan), workload_of(plan)
    rank_costs = RankCosts(work)
    costs = rank_costs.all()
    assert costs.ranks is not None
    found = price_stages(replace(plan, machine=costs.ranks), costs)
    pricer, (spread, _) = replace(rank_costs.pricer, sizes=sizes), with_shares(plan)
    loads = found.halved(whole=pricer.engine.ours).loads
    deferred = [  # the first stage, which sends no gradient, computes all of them later
        sum(pricer.deferred_bytes(spread.graph[name]) for name in stage.blocks)
        if number and load.weights_s and pricer.engine.ours
        else 0
        for number, (stage, load) in enumerate(zip(spread.stages, loads, strict=True))
    ]
    step = RankStep(
        pricer=pricer,
        loads=loads,
        parameters=tuple(pricer.parameters(_joined(work.graph, s.blocks)) for s in spread.stages),
        schedule=plan.schedule,
        num_microbatches=plan.num_microbatches,
        update_s=found.once_s,
        spread=spread_stages(plan),
        deferred=tuple(deferred),
    )
    return step, costs.ranks, found.split.binding


def _joined(graph: BlockGraph, blocks: tuple[str, ...]) -> Block:
    """Return a block with all parameters of some blocks, each once."""
    names = dict.fromkeys(fqn for name in blocks for fqn in graph[name].parameters)
    return Block("", parameters=tuple(names))


def rank_price(plan: Plan) -> PlanPrice:
    """Return the price of a plan on GPUs: seconds of its step, and bytes of every stage and rank.

    Raises:
        PlanError: As :func:`rank_step_of`.
    """
    step, ranks, binding = _priced_ranks(plan)
    loads = []
    for load, held in zip(step.loads, step.parameters, strict=True):
        widened = round(step.pricer.widened_bytes(held)) - load.in_flight * load.stash_bytes
        space = BUFFER_BYTES + max(load.workspace_bytes, widened)
        loads.append(replace(load, workspace_bytes=space))
    once_s = step.once_s()
    return PlanPrice(
        stages=tuple(loads),
        step_s=step.step_s(),
        once_s={"update, reduction": once_s} if once_s else {},
        misfits=_misfits(step, ranks),
        binding=binding,
        recompute=tuple(stage.recompute for stage in plan.stages),
    )


def _misfits(step: RankStep, ranks: Machine) -> tuple[str, ...]:
    """Say which ranks hold more than their GPUs have."""
    found = []
    for rank, needed in enumerate(step.rank_bytes):
        device = ranks.devices[step.loads[step.of_ranks[rank][0]].device]
        room = device.memory_bytes - device.reserved_bytes + BUFFER_BYTES
        if needed.total > room:
            found.append(
                f"a GPU of rank {rank} of the pipeline needs {GIGABYTES(needed.total)} GB of "
                f"{GIGABYTES(room)} GB"
            )
    return tuple(found)
