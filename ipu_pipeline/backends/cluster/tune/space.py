"""Every way to run a batch on GPUs: parallel sizes, microbatches, schedule, recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ipu_pipeline.backends.cluster.prices.parallel_sizes import (
    GpuSettings,
    ParallelSizes,
    parts_named,
)
from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.attention import is_attention
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import check_count, count_of
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
        zero_stage: 0 to 3; left out, 1 for replicas of engine megatron.
        schedule: Name.
        recompute: ``none``, ``full`` or parts of layers, separated by commas.
        vocabulary: ``auto``: a vocabulary spread over stages is tried, too.
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
    vocabulary: str | None = None
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
        if self.vocabulary not in (None, "auto"):
            raise ValueError(
                f"vocabulary is {self.vocabulary!r}; tune knows auto, which spreads it over stages "
                "where that is faster; give other shares to plan"
            )
        if self.vocabulary and self.settings.engine != "torch":
            raise ValueError(
                f"engine {self.settings.engine} does not spread the vocabulary over stages; leave "
                "--vocabulary out, or tune for this project's own processes: --engine torch"
            )
        if self.settings.engine == "torch":
            wrong = [name for name in ("tp", "cp", "ep") if (getattr(self, name) or 1) > 1]
            wrong += ["zero_stage"] if self.zero_stage else []
            wrong += ["recompute"] if self.recompute not in (None, "none", "full") else []
            if wrong:
                raise ValueError(
                    f"{', '.join(wrong)}: of this project's own processes (engine torch) tune "
                    "searches pipelines and replicas; leave it out, tune for engine megatron, or "
                    "give tp to plan"
                )

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Sets of parts of layers to recompute that are tried."""
        if self.recompute in ("none", "full") or self.settings.engine == "torch":
            return ((),)
        if self.recompute is None:
            return PARTS
        return (parts_named(self.recompute),)

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
        f"no configuration uses all {count_of(len(machine.devices), 'GPU')} of {machine.name} for "
        f"a global batch of {request.global_batch}{' with ' if fixed else ''}{', '.join(fixed)}: "
        "the batch must divide by replicas x micro batch, tp (at most the GPUs of a node) divides "
        "the heads, ep the experts, and a pipeline needs as many blocks and microbatches as "
        "stages; fix fewer of these, or choose another batch or number of GPUs"
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
    # ZeRO 2 and 3 on request only: Megatron-LM's pipelines shard the optimizer's state.
    zero_stages = [int(shared > 1 and request.settings.engine == "megatron")]
    one_rank = request.schedules[:1] if request.schedule else ("1f1b",)
    searched = request.recompute is None and len(request.parts) > 1
    parts = tuple(dict.fromkeys(_useful(graph))) if searched else request.parts
    for micro_batch in _tried(request.micro_batch, MICRO_BATCHES):
        if per_replica % micro_batch:
            continue
        for schedule in request.schedules if sizes.pp > 1 else one_rank:
            for vpp in _loops(request, schedule, sizes.pp, len(graph.blocks)):
                for zero_stage in _tried(request.zero_stage, zero_stages):
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
