"""Every way to run a batch on GPUs: parallel sizes, microbatches, schedule, recomputation.

A :class:`GpuConfiguration` says everything but the split. :class:`ChainProfile` holds what its
blocks cost a rank, equal blocks once, and gives it a lower bound without a search:

* a rank has at least its share of all microbatches' passes: ``G T / pp`` for passes of T seconds;
* 1f1b with G > pp: ``(G + pp - 1) T / pp``. The paths through the steady part of every stage
  (:mod:`ipu_pipeline.planner.schedules.kinds.one_f_one_b`) are equally long where the stages are
  equal, and a mean of them with weights above 0 counts every stage alike;
* to both comes the least update of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any

from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, ParallelSizes
from ipu_pipeline.backends.cluster.prices.rank import RankBlock, RankParameters, RankPricer
from ipu_pipeline.backends.cluster.prices.rank_plan import gathered, in_stage
from ipu_pipeline.backends.cluster.prices.rank_step import BUFFER_BYTES
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind

MICRO_BATCHES = (1, 2, 4, 8)
# Parts of layers that are recomputed together, the cheapest ones first.
PARTS = (
    (),
    ("layernorm", "moe_act", "mla_up_proj"),
    ("layernorm", "moe_act", "mla_up_proj", "mlp"),
)
# Context parallelism is tried where a rank still has so many tokens of a sequence.
_LEAST_TOKENS = 8192
_LOOPS = (2, 3, 4, 6, 8)
_SCHEDULES = {"megatron": ("1f1b", "interleaved"), "torch": ("1f1b", "interleaved", "zbv")}


@dataclass(frozen=True, kw_only=True)
class GpuRequest:
    """What the user fixes; everything left at ``None`` is searched.

    Attributes:
        global_batch: Samples of one optimizer step over all replicas.
        micro_batch: Samples of one microbatch.
        replicas: Data parallel copies.
        pp: Ranks of a pipeline.
        tp: Ranks that share every product.
        cp: Ranks that share the tokens of a sequence.
        ep: Ranks that share the experts.
        vpp: Stages of a rank.
        zero_stage: 0 to 3.
        schedule: Name.
        recompute: ``none``, ``full`` or parts of layers, separated by commas.
        settings: What all configurations have in common: engine, precision, optimizer, ...
    """

    global_batch: int
    micro_batch: int | None = None
    replicas: int | None = None
    pp: int | None = None
    tp: int | None = None
    cp: int | None = None
    ep: int | None = None
    vpp: int | None = None
    zero_stage: int | None = None
    schedule: str | None = None
    recompute: str | None = None
    settings: GpuSettings = field(default_factory=lambda: GpuSettings(engine="megatron"))

    def __post_init__(self) -> None:
        check_count("global_batch", self.global_batch)
        for name in ("micro_batch", "replicas", "pp", "tp", "cp", "ep", "vpp"):
            value = getattr(self, name)
            if value is not None:
                limit = name if name in ("micro_batch", "replicas") else "num_devices"
                check_count(name, value, limit)
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.schedule is not None:
            schedule_kind(self.schedule)
        GpuSettings.read({"recompute": list(self.parts[0])})
        if self.settings.engine == "torch":
            wrong = [name for name in ("tp", "cp", "ep") if (getattr(self, name) or 1) > 1]
            wrong += ["zero_stage"] if self.zero_stage else []
            wrong += ["recompute"] if any(self.parts[0]) else []
            if wrong:
                raise ValueError(
                    f"{', '.join(wrong)}: this project's own processes (engine torch) share no "
                    "tensors, tokens or experts; leave it out, or plan for engine megatron"
                )

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Sets of parts of layers to recompute that are tried."""
        if self.recompute in ("none", "full") or self.settings.engine == "torch":
            return ((),)
        if self.recompute is None:
            return PARTS
        return (tuple(part.strip() for part in self.recompute.split(",")),)

    @property
    def schedules(self) -> tuple[str, ...]:
        """Schedules that are tried where a pipeline has several ranks."""
        return (self.schedule,) if self.schedule else _SCHEDULES[self.settings.engine]


@dataclass(frozen=True, kw_only=True)
class GpuConfiguration:
    """One way to run the batch, but for the split.

    Attributes:
        sizes: Who shares what, with parts of layers that are recomputed.
        schedule: Name.
        num_microbatches: Of one step of one pipeline.
    """

    sizes: ParallelSizes
    schedule: str
    num_microbatches: int

    def settings(self, base: GpuSettings) -> dict[str, Any]:
        """Return what a plan keeps of it, with what all have in common."""
        own = {name: getattr(self.sizes, name) for name in ("tp", "cp", "ep", "zero_stage")}
        found = {name: value for name, value in own.items() if value != (name != "zero_stage")}
        if self.sizes.recompute:
            found["recompute"] = list(self.sizes.recompute)
        plain = GpuSettings()
        for name in ("precision", "optimizer", "engine", "fused_loss", "gradient_bytes", "dropout"):
            if getattr(base, name) != getattr(plain, name):
                found[name] = getattr(base, name)
        return found

    @cached_property
    def shape(self) -> PipelineShape:
        """Stages and their ranks."""
        stages = self.sizes.pp * self.sizes.vpp
        placed = schedule_kind(self.schedule).place(stages, self.sizes.pp)
        return PipelineShape(stages, self.num_microbatches, placed or ())

    def runs(self) -> bool:
        """Whether the schedule can run it."""
        kind, shape = schedule_kind(self.schedule), self.shape
        if not shape.devices or (kind.torch_needs_depth and self.num_microbatches < self.sizes.pp):
            return False
        return not kind.problem(shape)


def configurations(
    request: GpuRequest, graph: BlockGraph, machine: Machine
) -> list[GpuConfiguration]:
    """Return every configuration of the set (``graph`` of any micro batch).

    Raises:
        PartitionError: None uses all GPUs and divides the batch.
    """
    found = [
        one
        for sizes in _sizes(request, graph, machine)
        for one in _of_sizes(request, graph, sizes)
        if one.runs()
    ]
    if not found:
        raise PartitionError(_nothing(request, machine))
    return found


def _nothing(request: GpuRequest, machine: Machine) -> str:
    fixed = [
        f"{name} {getattr(request, name)}"
        for name in ("micro_batch", "replicas", "pp", "tp", "cp", "ep", "vpp", "schedule")
        if getattr(request, name) is not None
    ]
    return (
        f"no configuration uses all {len(machine.devices)} GPUs of {machine.name} for a global "
        f"batch of {request.global_batch}{' with ' if fixed else ''}{', '.join(fixed)}: the batch "
        "must divide by replicas x micro batch, tp (at most the GPUs of a node) divides the heads, "
        "ep the experts, and a pipeline needs as many blocks and microbatches as stages; fix fewer "
        "of these, or choose another batch or number of GPUs"
    )


def _sizes(request: GpuRequest, graph: BlockGraph, machine: Machine) -> Iterator[ParallelSizes]:
    count, depth = len(machine.devices), len(graph.blocks)
    node = machine.devices_per_board or count
    heads, experts, length = model_sizes(graph)
    if request.settings.engine == "torch":
        heads = experts = length = 1
    for tp in _tried(request.tp, _divisors(heads, min(node, count))):
        for cp in _tried(request.cp, _powers(max(1, length // _LEAST_TOKENS))):
            for pp in _tried(request.pp, _divisors(count, depth)):
                dp, rest = divmod(count, tp * cp * pp)
                if rest or request.replicas not in (None, dp) or request.global_batch % dp:
                    continue
                ranks = dp * cp * tp
                for ep in _tried(request.ep, [n for n in _divisors(experts, ranks)
                                              if ranks % n == 0]):  # fmt: skip
                    if ranks % ep == 0 and experts % ep == 0:
                        yield ParallelSizes(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep)


def _of_sizes(
    request: GpuRequest, graph: BlockGraph, sizes: ParallelSizes
) -> Iterator[GpuConfiguration]:
    per_replica, shared = request.global_batch // sizes.dp, sizes.dp * sizes.cp
    stages = [1, 3] if shared > 1 and request.settings.engine == "megatron" else [0]
    stages = stages[:1] if sizes.pp > 1 else stages
    one_rank = request.schedules[:1] if request.schedule else ("1f1b",)
    searched = request.recompute is None and len(request.parts) > 1
    parts = tuple(dict.fromkeys(_useful(graph))) if searched else request.parts
    for micro_batch in _tried(request.micro_batch, MICRO_BATCHES):
        if per_replica % micro_batch:
            continue
        for schedule in request.schedules if sizes.pp > 1 else one_rank:
            for vpp in _loops(request, schedule, sizes.pp, len(graph.blocks)):
                for zero_stage in _tried(request.zero_stage, stages):
                    for recompute in parts:
                        yield GpuConfiguration(
                            sizes=replace(
                                sizes, vpp=vpp, micro_batch=micro_batch, zero_stage=zero_stage,
                                recompute=recompute,
                            ),
                            schedule=schedule,
                            num_microbatches=per_replica // micro_batch,
                        )  # fmt: skip


def _useful(graph: BlockGraph) -> Iterator[tuple[str, ...]]:
    """Yield the sets of :data:`PARTS` with the parts that layers of this model may have."""
    absent = set() if model_sizes(graph)[1] > 1 else {"moe_act"}
    if not any("kv_a_proj" in spec.fqn for spec in graph.parameters):
        absent.add("mla_up_proj")
    for parts in PARTS:
        yield tuple(part for part in parts if part not in absent)


def _loops(request: GpuRequest, schedule: str, pp: int, blocks: int) -> list[int]:
    kind = schedule_kind(schedule)
    if kind.stages_per_device == (1,):
        counts = [1]
    elif kind.place(3 * pp, pp) is None:
        counts = list(kind.stages_per_device)
    else:
        counts = [request.vpp] if request.vpp else list(_LOOPS)
    return [n for n in counts if request.vpp in (None, n) and pp * n <= blocks]


def _tried(fixed: int | None, found: Any) -> list[int]:
    return [fixed] if fixed is not None else list(found)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def model_sizes(graph: BlockGraph) -> tuple[int, int, int]:
    """Return the heads that ranks can share, the experts, and the tokens of a sequence."""
    heads, experts = 0, 1
    for block in graph.blocks:
        for op in block.forward_ops:
            if is_attention(op):
                own = min(shape[1] for shape in op.shapes[:3] if len(shape) == 4)
                heads = own if not heads else min(heads, own)
            if "grouped" in op.name and len(op.shapes[0]) == 3:
                experts = max(experts, op.shapes[0][0])
    shape = graph.inputs[0].shape if graph.inputs else (1, 1)
    return max(1, heads), experts, shape[1] if len(shape) == 2 else 1


# -- prices of a configuration -----------------------------------------------------------------


@dataclass(frozen=True)
class ChainProfile:
    """What every block costs a rank, in execution order; equal blocks are one object.

    Attributes:
        plain: Blocks as they run plainly, but for parts that are recomputed.
        again: The same with whole layers recomputed.
        parameters: All weights.
    """

    plain: tuple[RankBlock, ...]
    again: tuple[RankBlock, ...]
    parameters: RankParameters

    @cached_property
    def total_s(self) -> float:
        """Seconds of one microbatch's passes through all blocks."""
        return sum(one.forward_s + one.backward_s for one in self.plain)

    @cached_property
    def saved_bytes(self) -> float:
        """Bytes that one microbatch keeps in all blocks."""
        return sum(one.saved_bytes for one in self.plain)

    @cached_property
    def layers(self) -> tuple[tuple[float, float], ...]:
        """Seconds per byte and bytes that recomputing every whole layer saves, cheapest first."""
        pairs = zip(self.plain, self.again, strict=True)
        saved = [
            (other.backward_s - plain.backward_s, plain.saved_bytes - other.saved_bytes)
            for plain, other in pairs
            if plain is not other and plain.saved_bytes > other.saved_bytes
        ]
        return tuple(sorted((seconds / size, size) for seconds, size in saved))

    def recomputed_s(self, num_bytes: float) -> float:
        """Return the least seconds by which recomputation saves so many bytes of a microbatch.

        Infinite where all layers do not save as many; parts of layers count.
        """
        found = 0.0
        for slope, size in self.layers:
            if num_bytes <= 0:
                return found
            found += slope * min(size, num_bytes)
            num_bytes -= size
        return found if num_bytes <= 0 else inf

    def bound_s(self, config: GpuConfiguration, pricer: RankPricer, capacity: float) -> float:
        """Return a bound of the step over all splits; infinite where nothing fits.

        All ranks together keep one microbatch of every block at least.
        """
        sizes, count = config.sizes, config.num_microbatches
        state = pricer.state_bytes(self.parameters)
        if state > sizes.pp * capacity:
            return inf
        more_s = self.recomputed_s(state + self.saved_bytes - sizes.pp * capacity)
        passes = count / sizes.pp
        if config.schedule == "1f1b" and count > sizes.pp:
            passes = (count + sizes.pp - 1) / sizes.pp
        total_s = passes * (self.total_s + more_s)
        return total_s + pricer.update_s(self.parameters) / sizes.pp

    def estimate_s(self, config: GpuConfiguration, pricer: RankPricer, capacity: float) -> float:
        """Return the seconds of a step if all stages were equal; infinite where they do not fit."""
        sizes, count = config.sizes, config.num_microbatches
        held = self.parameters.times(1 / sizes.pp)
        flying = in_flight(config, 0) / sizes.vpp
        space = max(one.workspace_bytes for one in self.plain)
        over = pricer.state_bytes(held) + flying * self.saved_bytes / sizes.pp + space - capacity
        more_s = self.recomputed_s(over * sizes.pp / flying)
        each_s = (self.total_s + more_s) / sizes.pp
        once_s = pricer.update_s(held) + max(0.0, pricer.reduction_s(held) - each_s / 2)
        return (count + (sizes.pp - 1) / sizes.vpp) * each_s + once_s


def in_flight(config: GpuConfiguration, rank: int) -> int:
    """Return about how many stages' microbatches a rank keeps at one time."""
    pp, vpp, count = config.sizes.pp, config.sizes.vpp, config.num_microbatches
    if config.schedule == "gpipe":
        return vpp * count
    if vpp == 1:
        kept = pp - rank
    elif schedule_kind(config.schedule).place(3 * pp, pp) is None:
        kept = 2 * pp  # in a V: all ranks alike
    else:
        kept = (vpp - 1) * pp + 2 * (pp - 1 - rank) + 1
    return min(kept, vpp * count)


class Profiles:
    """Prices of configurations of one model, by the sizes that matter to a block."""

    def __init__(
        self, graphs: Mapping[int, BlockGraph], machine: Machine, settings: GpuSettings
    ) -> None:
        """Price ``graphs`` (by micro batch) on ``machine``."""
        self._graphs, self._machine = graphs, machine
        self._engines = {size: settings.rank_engine(graph) for size, graph in graphs.items()}
        self._known: dict[tuple[Any, ...], ChainProfile] = {}
        self._blocks: dict[tuple[Any, ...], RankBlock] = {}
        rooms = (one.memory_bytes - one.reserved_bytes for one in machine.devices)
        # Bytes of a GPU that stages can use.
        self.capacity = float(min(rooms) - BUFFER_BYTES)

    def pricer(self, config: GpuConfiguration) -> RankPricer:
        """Return the prices of a configuration's blocks."""
        size = config.sizes.micro_batch
        return RankPricer(self._graphs[size], self._machine, config.sizes, self._engines[size])

    def of(self, config: GpuConfiguration) -> ChainProfile:
        """Return what the blocks of a configuration cost."""
        sizes = config.sizes
        key: tuple[Any, ...] = (sizes.micro_batch, sizes.tp, sizes.cp, sizes.ep, sizes.recompute)
        if sizes.zero_stage >= 2:
            key = (*key, sizes.zero_stage, sizes.dp, sizes.pp)
        if key not in self._known:
            self._known[key] = self._profile(self.pricer(config))
        return self._known[key]

    def _profile(self, pricer: RankPricer) -> ChainProfile:
        whole = replace(pricer, sizes=replace(pricer.sizes, recompute=("full",)))
        known: dict[tuple[Any, ...], tuple[RankBlock, RankBlock]] = {}
        rows, held = [], RankParameters()
        for block in pricer.graph.blocks:
            key = (id(block.forward_ops), id(block.backward_ops), block.kind, block.saved_bytes,
                   len(block.parameters))  # fmt: skip
            if key not in known:
                alone = self._alone(pricer, block, key)
                plain = again = gathered(pricer, block, in_stage(block, alone))
                if block.kind == "layer":
                    plain = gathered(pricer, block, pricer.recomputed(block, alone))
                    again = gathered(whole, block, whole.recomputed(block, alone))
                known[key] = plain, again
            rows.append(known[key])
            held += known[key][0].parameters
        return ChainProfile(tuple(row[0] for row in rows), tuple(row[1] for row in rows), held)

    def _alone(self, pricer: RankPricer, block: Block, key: tuple[Any, ...]) -> RankBlock:
        """Return a block without recomputation, which only its own sizes matter to."""
        sizes = pricer.sizes
        ep = sizes.ep if any(".experts." in fqn for fqn in block.parameters) else 1
        key = (*key, sizes.micro_batch, sizes.tp, sizes.cp, ep)
        if key not in self._blocks:
            plainly = replace(pricer, sizes=replace(sizes, recompute=()))
            self._blocks[key] = plainly.block(block)
        return self._blocks[key]
