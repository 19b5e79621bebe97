"""Somebody's split of a model over GPUs, priced as a plan, and ours for the same sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ipu_pipeline.backends.cluster.layouts.megatron_layout import EXTRA
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
from ipu_pipeline.errors import PartitionError, PlanError, listed
from ipu_pipeline.ir.codec import to_json
from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec, TensorSpec
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.planner.price import (
    best_split,
    make_plan,
    priced,
    schedule_problem,
    workload_of,
)
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.search import Constraints

SEARCH_S = 15.0  # to find and prove our split


@dataclass(frozen=True)
class GivenModel:
    """A captured model: for one microbatch, and which one it is."""

    graph: BlockGraph
    identity: ModelIdentity

    def with_extra_layers(self, number: int) -> GivenModel:
        """Add multi-token prediction: each a layer like the last but one, a head and a loss.

        transformers has no such modules: a plan of them can be priced and not run.

        Raises:
            PlanError: The model has no layers or no head.

        Source: DeepSeek-AI, DeepSeek-V3, 2024, section 2.2.
        """
        model = self
        for index in range(number):
            model = model._with_one_more(f"{EXTRA}{index}")
        return model

    def _with_one_more(self, name: str) -> GivenModel:
        graph = self.graph
        own = [b for b in graph.blocks if not b.name.startswith(EXTRA)]
        layers = [block for block in own if block.kind == "layer"]
        ends = [block for block in own if block.kind in ("head", "loss")]
        if len(layers) < 2 or not ends:
            raise PlanError(
                f"{graph.model_class} has no layers and head for multi-token prediction; write the "
                "layout without m"
            )
        before = [block.name for block in graph.blocks if block.kind == "layer"][-1]
        tensors, hidden = _tensors_of_one_more(graph, name, before, {b.name for b in ends})
        # The last layer carries the final norm.
        like = layers[-2]
        new = {fqn: f"{name}.{fqn}" for fqn in like.parameters}
        layer = replace(like, name=name, module=None, parameters=tuple(new.values()),
                        inputs=(hidden,), outputs=(f"{name}.hidden",))  # fmt: skip
        copies = [
            replace(block, name=f"{name}.{block.name}", module=None, inputs=(), outputs=())
            for block in ends
        ]
        parameters = [_also_used(spec, copies) for spec in graph.parameters]
        parameters += [
            replace(graph.parameter_by_fqn[fqn], fqn=own_fqn, aliases=(), blocks=(name,))
            for fqn, own_fqn in new.items()
        ]
        place = graph.block_index[before] + 1
        made = replace(
            graph,
            blocks=(*graph.blocks[:place], layer, *graph.blocks[place:], *copies),
            tensors=tuple(tensors),
            parameters=tuple(parameters),
        )
        texts = {own_fqn: self.identity.parameters.get(fqn, "") for fqn, own_fqn in new.items()}
        known = {**self.identity.parameters, **texts}
        return GivenModel(made, replace(self.identity, parameters=known))


def _tensors_of_one_more(
    graph: BlockGraph, name: str, before: str, ends: set[str]
) -> tuple[list[TensorSpec], str]:
    """Return the graph's tensors with those of one more prediction, and which one it reads."""
    found, hidden = [], ""
    for spec in graph.tensors:
        among = tuple(consumer for consumer in spec.consumers if consumer in ends)
        if spec.producer == before and spec.requires_grad and not hidden:
            hidden = spec.name
            own = tuple(f"{name}.{consumer}" for consumer in among)
            read = replace(spec, name=f"{name}.hidden", producer=name, consumers=own)
            spec = replace(spec, consumers=(name, *spec.consumers))
            found.append(read)
        elif spec.producer in ends and among:
            own = tuple(f"{name}.{consumer}" for consumer in among)
            found.append(replace(spec, name=f"{name}.{spec.name}",
                                 producer=f"{name}.{spec.producer}", consumers=own))  # fmt: skip
        found.append(spec)
    return found, hidden


def _also_used(spec: ParameterSpec, copies: Sequence[Block]) -> ParameterSpec:
    users = [block.name for block in copies if spec.fqn in block.parameters]
    return replace(spec, blocks=(*spec.blocks, *users)) if users else spec


def captured_model(
    config: str, task: str | None, micro_batch: int, seq_length: int, precision: str | None = None
) -> GivenModel:
    """Capture a model by the name or path of its config: in bfloat16 unless something else is said.

    Raises:
        CaptureError: There is no such config, or its model cannot be captured.
    """
    from ipu_pipeline.capture import capture, model_identity
    from ipu_pipeline.capture.from_config import config_named, from_config, load_config
    from ipu_pipeline.capture.patches import fused_sinks

    found = load_config(config)
    if precision is not None or found.dtype is None:
        found.dtype = precision if precision in ("float16", "float32") else "bfloat16"
    size: dict[str, Any] = {"batch_size": micro_batch, "seq_length": seq_length}
    built, batch = from_config(found, task, **size, padded=False)
    with config_named(config), fused_sinks(built):
        return GivenModel(capture(built, batch).graph, model_identity(built))


@dataclass(frozen=True)
class GivenLayout:
    """Somebody's split and sizes; what is left out is ``None`` or absent, and derived.

    Attributes:
        stages: From a model's graph to the blocks of every stage; an empty one is priced as one.
        sizes: Some of ``pp``, ``dp``, ``tp``, ``cp``, ``ep``, ``micro_batch``, ``microbatches``,
            ``global_batch``. Without ``dp`` all GPUs work.
        settings: Fields of :class:`GpuSettings`.
        schedule: Name; ``None``: 1f1b, or interleaved where a rank has several stages.
        extra_layers: Multi-token prediction layers.
        recompute: Whether every layer is recomputed as a whole.
    """

    stages: Callable[[BlockGraph], Sequence[Sequence[str]]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    extra_layers: int = 0
    recompute: bool = False

    def with_sizes(self, asked: Mapping[str, int | None]) -> GivenLayout:
        """Replace sizes; one way to say the batch replaces all of them."""
        sizes = dict(self.sizes)
        if asked.get("microbatches") is not None or asked.get("global_batch") is not None:
            sizes.pop("microbatches", None)
            sizes.pop("global_batch", None)
        sizes |= {name: size for name, size in asked.items() if size is not None}
        return replace(self, sizes=sizes)

    def plan(self, model: GivenModel, machine: Machine) -> Plan:
        """Return the split as a plan with its price.

        Raises:
            PlanError: The numbers do not divide or contradict each other, the schedule does not
                run the stages, or the machine's kernels are not known.
        """
        model = model.with_extra_layers(self.extra_layers)
        graph, stages = model.graph, self.stages(model.graph)
        pp, dp = self._ranks(machine, len(stages))
        schedule = self.schedule or ("1f1b" if len(stages) == pp else "interleaved")
        if wrong := schedule_problem(machine, schedule):
            raise PlanError(wrong)
        count = self._microbatches(dp, pp, len(stages))
        layers = {b.name for b in graph.blocks if b.kind == "layer" and self.recompute}
        own = {size: self.sizes[size] for size in ("tp", "cp", "ep") if size in self.sizes}
        settings = GpuSettings.read({"zero_stage": 1, **self.settings, **own})
        devices = _devices(schedule, len(stages), pp, count)
        return priced(
            Plan(
                model=model.identity,
                machine=machine,
                stages=tuple(
                    PlannedStage(device, tuple(blocks), tuple(n for n in blocks if n in layers))
                    for device, blocks in zip(devices, stages, strict=True)
                ),
                graph=graph,
                num_microbatches=count,
                replicas=dp,
                schedule=schedule,
                settings=to_json(settings),
            )
        )

    def _ranks(self, machine: Machine, num_stages: int) -> tuple[int, int]:
        """Return the ranks of a pipeline, and the pipelines."""
        if machine.devices[0].kernels is None:
            raise PlanError(
                f"{machine.name} is no machine of GPUs whose kernels are known; layouts are priced "
                "on those, such as h100-x64"
            )
        sizes, count = self.sizes, len(machine.devices)
        pp = sizes.get("pp", num_stages)
        if num_stages % pp:
            raise PlanError(
                f"the layout has {count_of(num_stages, 'stage')}, which pp {pp} does not divide; "
                "give a pp that does, such as the number of ranks of a pipeline"
            )
        ranks = pp * sizes.get("tp", 1) * sizes.get("cp", 1)
        dp = sizes.get("dp", max(1, count // ranks))
        if dp * ranks > count or ("dp" not in sizes and dp * ranks != count):
            raise PlanError(
                f"tp {sizes.get('tp', 1)} x cp {sizes.get('cp', 1)} x pp {pp} x dp {dp} are "
                f"{count_of(dp * ranks, 'GPU')}, {machine.name} has {count}; change one of them"
            )
        return pp, dp

    def _microbatches(self, dp: int, pp: int, num_stages: int) -> int:
        """Return those of a pipeline's step; not said: a multiple of ``pp``, at least 8."""
        sizes = self.sizes
        batch, micro = sizes.get("global_batch"), sizes.get("micro_batch", 1)
        if batch is None:
            return sizes.get("microbatches", max(pp * -(-8 // pp), 2 * num_stages // pp * pp))
        number, rest = divmod(batch, dp * micro)
        if rest or not number:
            raise PlanError(
                f"a global batch of {batch} does not divide into dp {dp} x micro batch {micro}; "
                "change one of them"
            )
        if sizes.get("microbatches", number) != number:
            raise PlanError(
                f"a global batch of {batch} is {count_of(number, 'microbatch')} on dp {dp} x micro "
                f"batch {micro}, got {sizes['microbatches']}; leave one of them out"
            )
        return number


def _devices(schedule: str, num_stages: int, pp: int, num_microbatches: int) -> tuple[int, ...]:
    """Return the rank of every stage."""
    kind = schedule_kind(schedule)
    devices = kind.place(num_stages, pp)
    if devices is None:
        raise PlanError(
            f"schedule {schedule} runs {kind.placement}: {count_of(num_stages, 'stage')} do not "
            f"fit pp {pp}; change pp or the schedule"
        )
    wrong = kind.problem(PipelineShape.of(num_stages, num_microbatches, devices))
    if wrong:
        raise PlanError(wrong)
    return devices


def imported_plan(given: GivenLayout, model: GivenModel, machine: Machine) -> Plan:
    """Return what a file of another framework says as a plan with its price.

    Raises:
        PlanError: The model, the machine or the schedule do not allow it, or a stage is empty.
    """
    made = given.plan(model, machine)
    empty = [str(number) for number, stage in enumerate(made.stages) if not stage.blocks]
    if empty:
        raise PlanError(
            f"stage {listed(empty)} is empty, which a plan cannot hold; price it with predict "
            "--layout"
        )
    return made


def own_plan(given: Plan, seconds: float = SEARCH_S) -> Plan:
    """Return our split for the sizes of a given plan: the given one if none is faster.

    Raises:
        PartitionError: No split of these sizes fits.
    """
    layers = tuple(block.name for block in given.blocks if block.kind == "layer")
    limits = Constraints(
        stage_devices=tuple(stage.device for stage in given.stages),
        num_microbatches=given.num_microbatches,
        replicas=given.replicas,
        schedule=given.schedule,
        recompute=layers if any(stage.recompute for stage in given.stages) else "never",
        allow_serialize=False,
        first_split=tuple(stage.blocks for stage in given.stages),
        time_limit_s=seconds,
    )
    work = workload_of(given)
    try:
        found = best_split(work, limits)
    except PartitionError:
        if given.misfits or not all(stage.blocks for stage in given.stages):
            raise
        # The given split fills its memory: what more memory would allow is a bound all the same.
        devices = [replace(one, memory_bytes=4 * one.memory_bytes) for one in work.machine.devices]
        roomy = replace(work.machine, devices=tuple(devices))
        bound_s = best_split(replace(work, machine=roomy), limits).lower_bound
        return replace(given, lower_bound_s=min(bound_s, given.objective_s))
    made = make_plan(given.model, work, found)
    if given.misfits or made.objective_s <= given.objective_s:
        return made
    return replace(given, lower_bound_s=min(made.lower_bound_s, given.objective_s))
