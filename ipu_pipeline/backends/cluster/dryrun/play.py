"""One rank of a job of any size, played in this process: its real step, on tensors without data.

The model is built from its config on ``meta``, captured, cut into the plan's stages, and those of
the rank run through torch's own schedule class in torch's fake process group: forward and backward
passes, messages, sums of gradients, the optimizer. What is alive is counted operation by operation
(``memory_tally.py``), and what is sent where operations of ``torch.distributed`` are called. No
number of the plan's price enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.cut_plan import cut_plan
from ipu_pipeline.backends.cluster.dryrun.collective_log import CollectiveLog
from ipu_pipeline.backends.cluster.dryrun.memory_tally import (
    ACTIVATIONS,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
    MemoryTally,
)
from ipu_pipeline.backends.cluster.dryrun.messages import AgreedSizes, fake_ranks
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.module import StepInputs
from ipu_pipeline.backends.cluster.pipeline import TrainingPipeline, _NotedStage
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings, dtype_of
from ipu_pipeline.backends.cluster.ranks.heartbeat import Activity
from ipu_pipeline.backends.cluster.sharding import (
    find_ownership,
    sharded,
    share_updated,
    sum_over_ranks,
)
from ipu_pipeline.backends.cluster.tensor_parallel import TensorParallel
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.fused import ReplacedAttention, grouped_without_values
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.master_weights import MasterWeights
from ipu_pipeline.planner.schedules.simulate import plan_shape
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.block_runs import recomputed_blocks
from ipu_pipeline.stages.build import build_stages, place_blocks
from ipu_pipeline.stages.stage import Stage

# So many microbatches per stage show all that more would.
_DEPTHS = 2


class _PlayedActivity(Activity):
    """Tells the tally which pass is running."""

    tally: MemoryTally

    @contextmanager
    def during(self, what: str, stage: Stage | None = None, microbatch: int = -1) -> Iterator[None]:
        kind = ACTIVATIONS if what == "forward pass" else TEMPORARY
        with self.tally.making(kind), super().during(what, stage, microbatch):
            yield


class _NoWaiter:
    """Runs at once what would wait for other ranks."""

    def __init__(self, activity: Activity) -> None:
        self.activity = activity

    def run(self, function: Any) -> Any:
        return function()

    def guarded(self, operation: dist.P2POp) -> dist.P2POp:
        return operation


class _NoRanks:
    def __init__(self, waiter: _NoWaiter) -> None:
        self.waiter = waiter


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - a mask that is drawn again
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001, FBT001, FBT002
) -> Tensor:
    """Be torch's fused operation on ``meta``, as on a device that has one."""
    aten = torch.ops.aten
    if attn_mask is None:
        flash: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )[0]
        return flash
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    shape = (*query.shape[:-1], key.shape[-2])
    efficient: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask.expand(shape), compute_log_sumexp=True, dropout_p=0.0,
        is_causal=is_causal, scale=scale,
    )[0]  # fmt: skip
    return efficient


class _PlayedSlices(TensorParallel):
    """Slices whose modules compute, and call collectives, on tensors without data too."""

    only_shapes = False


def _named(groups: Groups) -> dict[str, dist.ProcessGroup]:
    return {
        "tensor parallel": groups.slices.get_group(),
        "pipeline": groups.pipeline,
        "replicas": groups.replicas,
    }


class _PlayedStage(AgreedSizes, _NotedStage):
    """The engine's stage; what its ranks agree on by votes is known."""


class _PlayedPipeline(TrainingPipeline):
    """The engine's pipeline, whose losses have no values."""

    stage_class = _PlayedStage

    def _choose_backward(self) -> None:
        """Split every backward pass that the engine would try to split."""
        for stage, module in zip(self._stages, self.modules, strict=True):
            code = module.stage
            names = {program.name for program in code.programs}
            whole = code.tables or code.row_shards or code.recompute & names
            if self._untried and code.index and whole:
                stage.dw_builder = lambda: lambda: None
        self._untried = False

    def _losses(self, microbatches: Sequence[Microbatch]) -> dict[int, float]:  # noqa: ARG002
        return {}


@dataclass(frozen=True)
class Played:
    """What one rank did in the play of one optimizer step.

    Attributes:
        rank: Among all ranks of the job.
        replica: Its pipeline.
        position: In its pipeline.
        tensor: Among the ranks that share its stages.
        stages: Its stages.
        microbatches: So many were played.
        peak: Bytes by kind at the moment with most bytes.
        most: Most bytes of every kind at one time.
        collectives: Number and bytes by operation and group.
    """

    rank: int
    replica: int
    position: int
    tensor: int
    stages: tuple[int, ...]
    microbatches: int
    peak: Mapping[str, int]
    most: Mapping[str, int]
    collectives: Mapping[tuple[str, str], tuple[int, int]]


def check_played(plan: Plan) -> None:
    """Refuse what is not played.

    Raises:
        LoweringError: The plan is not for training on GPUs, or divides what is not divided here.
    """
    if plan.machine.devices[0].kernels is None or not plan.graph.training:
        raise LoweringError(
            f"a dry run plays training on GPUs with known kernels, such as h100-x64, and the plan "
            f"is for {'training' if plan.graph.training else 'inference'} on {plan.machine.name}; "
            "use simulate"
        )
    settings, found = GpuSettings.read(plan.settings), []
    found += [f"{n} {getattr(settings, n)}" for n in ("cp", "ep") if getattr(settings, n) > 1]
    if settings.zero_stage > 1:
        found.append(f"zero_stage {settings.zero_stage}")
    if settings.recompute:
        found.append(f"recompute {', '.join(settings.recompute)}")
    if settings.precision in ("float8", "float4"):
        found.append(f"precision {settings.precision}")
    of_weight = 4 if dtype_of(plan.graph) == "float32" else 2
    if settings.engine == "torch" and settings.gradient_bytes not in (None, of_weight):
        found.append(f"gradient_bytes {settings.gradient_bytes}")
    sliced = [name for stage in plan.stages for name, n in stage.serialize.items() if n > 1]
    if sliced:
        found.append(f"serialize of {sliced[0]}")
    found += [f"offload of {s.offload[0]}" for s in plan.stages if s.offload][:1]
    if plan.vocabulary is not None:
        found.append("a vocabulary spread over stages")
    if found:
        raise LoweringError(
            f"the plan has {', '.join(found)}, which a dry run does not play; plan without, or "
            "look at its price with explain"
        )


def play(plan: Plan, model: nn.Module, batch: Mapping[str, Tensor], rank: int) -> Played:
    """Play the step of one rank of a plan.

    Args:
        plan: The plan.
        model: Its model, on ``meta``, in the dtype that the plan was made in.
        batch: One microbatch, on ``meta``.
        rank: Of replica x ranks of a pipeline x ranks that share a stage, the last fastest.
    """
    settings = GpuSettings.read(plan.settings)
    devices = [stage.device for stage in plan.stages]
    numbers = {device: number for number, device in enumerate(dict.fromkeys(devices))}
    positions = tuple(numbers[device] for device in devices)
    width = len(numbers)
    layout = Layout(rank, plan.replicas, width, plan.num_stages, positions, settings.tp)
    captured = capture(model, batch, granularity=plan.granularity)
    blocks = place_blocks(captured, plan)
    kind, shape = plan_shape(plan)
    number = kind.shortened(shape, _DEPTHS * plan.num_stages).num_microbatches
    tally = MemoryTally()
    activity = _PlayedActivity()
    activity.tally = tally
    with fake_ranks(rank, plan.replicas * width * settings.tp), ExitStack() as entered:
        ranks: Any = _NoRanks(_NoWaiter(activity))
        groups = Groups(layout, torch.device("cpu"), ranks)  # of flags and numbers, which are read
        cuts = cut_plan(model, plan, settings.tp)
        _PlayedSlices(model, None, cuts, groups.slices).install()
        stages = build_stages(captured, blocks, recomputed_blocks(None, plan))
        everyone = dist.distributed_c10d._get_default_group()
        log = CollectiveLog({"all ranks": everyone, **_named(groups)})
        for region in (grouped_without_values(), ReplacedAttention(_fused_attention), log, tally):
            entered.enter_context(region)
        _step(plan, settings, model, stages, groups, batch, tally, number)
        return Played(
            rank, layout.replica, layout.position, rank % settings.tp, layout.own_stages,
            number, dict(tally.peak), dict(tally.most), log.found,
        )  # fmt: skip


def _step(
    plan: Plan,
    settings: GpuSettings,
    model: nn.Module,
    stages: Sequence[Stage],
    groups: Groups,
    batch: Mapping[str, Tensor],
    tally: MemoryTally,
    microbatches: int,
) -> None:
    """Run one optimizer step of one rank."""
    own = [p for index in groups.layout.own_stages for p in stages[index].programs]
    modules = [program.module for program in own]
    held = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    trained = [p for p in held if p.requires_grad]
    tally.hold(held, WEIGHTS)
    tally.hold([b for module in modules for b in module.buffers()], WEIGHTS)
    tally.follow(trained)
    ownership = find_ownership(stages, groups.layout)
    if settings.zero_stage:
        everything = list(model.parameters())
        ownership = sharded(ownership, everything, plan.replicas, lambda p: p.requires_grad)
    optimizer = _Optimizer([p for p in trained if ownership.is_updated(p)], settings.optimizer)
    tally.hold(optimizer.state(), OPTIMIZER)
    tally.start()
    groups.make_holders(sorted({s for s in ownership.holders.values() if len(s) > 1}))
    number = microbatches
    parts = [Microbatch(index, batch, plan.micro_batch_size, 1 / number) for index in range(number)]
    cpu, groups.device = groups.device, torch.device("meta")
    pipeline = _PlayedPipeline(
        stages, schedule=plan.schedule, num_microbatches=number, groups=groups
    )
    pipeline.run(StepInputs(parts), 1.0)
    groups.device = cpu
    with tally.making(TEMPORARY):
        sum_over_ranks(model, ownership, groups, for_update=True)
        with_grad = [p for p in trained if p.grad is not None]
        optimizer.step()
        if ownership.updaters:
            share_updated(with_grad, ownership, groups)


class _Optimizer:
    """The plan's optimizer, over float32 copies of the weights in 16 bits as the engine steps them.

    Its kernel is torch's fused one, which makes nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], name: str) -> None:
        kinds: dict[str, Any] = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "sgd": torch.optim.SGD,
            "momentum": partial(torch.optim.SGD, momentum=0.9),
        }
        self._parameters = parameters
        self._optimizer = kinds[name](parameters, lr=1e-3) if parameters else None

    def state(self) -> list[Tensor]:
        """Make what is kept between steps, as a first step does; return all of it."""
        if self._optimizer is None:
            return []
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter)
        self._masters = MasterWeights(self._optimizer)
        with self._masters.in_place():
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        kept = self._optimizer.state.values()
        return [v for state in kept for v in state.values() if isinstance(v, Tensor)]

    def step(self) -> None:
        """Do what a step does besides the kernel."""
        if self._optimizer is not None:
            with self._masters.in_place():
                pass
            self._optimizer.zero_grad(set_to_none=True)
