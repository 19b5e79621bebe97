"""Somebody's split of a model over GPUs, priced as a plan, and ours for the same sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ipu_pipeline.backends.cluster.layouts.exchange import Imported
from ipu_pipeline.backends.cluster.layouts.megatron_layout import EXTRA
from ipu_pipeline.backends.cluster.prices.parallel_sizes import GpuSettings
from ipu_pipeline.errors import PartitionError, PlanError, listed
from ipu_pipeline.ir.codec import to_json
from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.planner.backend import Workload, backend_of
from ipu_pipeline.planner.price import make_plan, priced, step_s
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.search import Constraints, Partition, solve

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

    found = load_config(config)
    if precision is not None or found.dtype is None:
        found.dtype = precision if precision in ("float16", "float32") else "bfloat16"
    built, batch = from_config(found, task, batch_size=micro_batch, seq_length=seq_length)
    with config_named(config):
        return GivenModel(capture(built, batch).graph, model_identity(built))


@dataclass(frozen=True, kw_only=True)
class GivenRun:
    """The sizes of somebody's run.

    Attributes:
        pp: Ranks of a pipeline.
        replicas: Data parallel copies.
        num_microbatches: Of one step of one pipeline.
        schedule: Name of the schedule.
        settings: The others.
        recompute: Whether every layer is recomputed as a whole.
    """

    pp: int
    replicas: int
    num_microbatches: int
    schedule: str
    settings: GpuSettings = field(default_factory=GpuSettings)
    recompute: bool = False

    def work(self, model: GivenModel, machine: Machine) -> Workload:
        """Return what is priced."""
        return Workload(
            model.graph, machine, self.schedule, self.num_microbatches, self.replicas,
            to_json(self.settings),
        )  # fmt: skip

    def devices(self, num_stages: int) -> tuple[int, ...]:
        """Return the rank of every stage.

        Raises:
            PlanError: The schedule does not run so many stages on these ranks.
        """
        kind = schedule_kind(self.schedule)
        devices = kind.place(num_stages, self.pp)
        if devices is None:
            raise PlanError(
                f"schedule {self.schedule} runs {kind.placement}: {num_stages} stages do not fit "
                f"pp {self.pp}; change pp or the schedule"
            )
        wrong = kind.problem(PipelineShape.of(num_stages, self.num_microbatches, devices))
        if wrong:
            raise PlanError(wrong)
        return devices


def given_plan(
    model: GivenModel, machine: Machine, stages: Sequence[Sequence[str]], run: GivenRun
) -> Plan:
    """Return somebody's split as a plan with its price; an empty stage is priced as one.

    Raises:
        PlanError: The schedule does not run it, or the sizes need more GPUs.
    """
    layers = {b.name for b in model.graph.blocks if b.kind == "layer" and run.recompute}
    planned = [
        PlannedStage(device, tuple(blocks), tuple(name for name in blocks if name in layers))
        for device, blocks in zip(run.devices(len(stages)), stages, strict=True)
    ]
    return priced(
        Plan(
            model=model.identity,
            machine=machine,
            stages=tuple(planned),
            graph=model.graph,
            num_microbatches=run.num_microbatches,
            replicas=run.replicas,
            schedule=run.schedule,
            settings=to_json(run.settings),
        )
    )


def imported_plan(given: Imported, model: GivenModel, machine: Machine) -> Plan:
    """Return what a file of another framework says as a plan with its price.

    Raises:
        PlanError: The model, the machine or the schedule do not allow it.
    """
    model = model.with_extra_layers(given.extra_layers)
    stages = given.stages(model.graph)
    empty = [str(number) for number, stage in enumerate(stages) if not stage]
    if empty:
        raise PlanError(
            f"stage {listed(empty)} is empty, which a plan cannot hold; price it with predict "
            "--layout"
        )
    run = given_run(machine, len(stages), given.sizes, given.settings, given.schedule,
                    recompute=given.recompute)  # fmt: skip
    return given_plan(model, machine, stages, run)


def own_plan(model: GivenModel, given: Plan, run: GivenRun, seconds: float = SEARCH_S) -> Plan:
    """Return our split for the sizes of a given plan: the given one if none is faster.

    Raises:
        PartitionError: No split of these sizes fits.
    """
    layers = tuple(block.name for block in model.graph.blocks if block.kind == "layer")
    limits = Constraints(
        stage_devices=run.devices(given.num_stages),
        num_microbatches=run.num_microbatches,
        replicas=run.replicas,
        schedule=run.schedule,
        recompute=layers if run.recompute else "never",
        allow_serialize=False,
        first_split=tuple(stage.blocks for stage in given.stages),
        time_limit_s=seconds,
    )
    try:
        found = _searched(model, given.machine, run, limits)
    except PartitionError:
        if given.misfits or not all(stage.blocks for stage in given.stages):
            raise
        # The given split fills its memory: what more memory would allow is a bound all the same.
        roomy = _with_more_memory(given.machine)
        bound_s = _searched(model, roomy, run, limits).lower_bound
        return replace(given, lower_bound_s=min(bound_s, given.objective_s))
    made = make_plan(model.identity, run.work(model, given.machine), found)
    if given.misfits or made.objective_s <= given.objective_s:
        return made
    return replace(given, lower_bound_s=min(made.lower_bound_s, given.objective_s))


def _searched(model: GivenModel, machine: Machine, run: GivenRun, limits: Constraints) -> Partition:
    backend, work = backend_of(machine), run.work(model, machine)
    limits = backend.rules(model.graph, machine, limits)
    step = partial(step_s, work)
    return solve(model.graph, backend.costs(work), machine, limits, step=step)


def _with_more_memory(machine: Machine) -> Machine:
    devices = [replace(one, memory_bytes=4 * one.memory_bytes) for one in machine.devices]
    return replace(machine, devices=tuple(devices))


def given_run(
    machine: Machine,
    num_stages: int,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    schedule: str | None = None,
    *,
    recompute: bool = False,
) -> GivenRun:
    """Return a run with what is not said derived from the rest.

    Args:
        machine: Where ``dp`` is not said, all of its GPUs work.
        num_stages: Of the layout: ``pp`` times the stages of a rank.
        sizes: Some of ``pp``, ``dp``, ``tp``, ``cp``, ``ep``, ``micro_batch``, ``microbatches``,
            ``global_batch``.
        settings: Fields of :class:`GpuSettings`.
        schedule: ``None``: 1f1b, or interleaved where a rank has several stages.
        recompute: Whether every layer is recomputed as a whole.

    Raises:
        PlanError: The numbers do not divide, or contradict each other.
    """
    if machine.devices[0].kernels is None:
        raise PlanError(
            f"{machine.name} is no machine of GPUs whose kernels are known; layouts are priced on "
            "those, such as h100-x64"
        )
    pp = sizes.get("pp", num_stages)
    if num_stages % pp:
        raise PlanError(
            f"the layout has {num_stages} stages, which pp {pp} does not divide; give a pp that "
            "does, such as the number of ranks of a pipeline"
        )
    ranks = pp * sizes.get("tp", 1) * sizes.get("cp", 1)
    count = len(machine.devices)
    dp = sizes.get("dp", max(1, count // ranks))
    if dp * ranks > count or ("dp" not in sizes and dp * ranks != count):
        raise PlanError(
            f"tp {sizes.get('tp', 1)} x cp {sizes.get('cp', 1)} x pp {pp} x dp {dp} are "
            f"{dp * ranks} GPUs, {machine.name} has {count}; change one of them"
        )
    name = schedule or ("1f1b" if num_stages == pp else "interleaved")
    given = {"zero_stage": 1, **settings}
    given |= {size: sizes[size] for size in ("tp", "cp", "ep") if size in sizes}
    return GivenRun(
        pp=pp,
        replicas=dp,
        num_microbatches=_microbatches(sizes, dp, pp, num_stages),
        schedule=name,
        settings=GpuSettings.read(given),
        recompute=recompute,
    )


def _microbatches(sizes: Mapping[str, int], dp: int, pp: int, num_stages: int) -> int:
    """Return the microbatches of a pipeline's step; not said: a multiple of ``pp``, at least 8."""
    batch, micro = sizes.get("global_batch"), sizes.get("micro_batch", 1)
    if batch is None:
        return sizes.get("microbatches", max(pp * -(-8 // pp), 2 * num_stages // pp * pp))
    number, rest = divmod(batch, dp * micro)
    if rest or not number:
        raise PlanError(
            f"a global batch of {batch} does not divide into dp {dp} x micro batch {micro}; change "
            "one of them"
        )
    if sizes.get("microbatches", number) != number:
        raise PlanError(
            f"a global batch of {batch} is {number} microbatches on dp {dp} x micro batch {micro}, "
            f"got {sizes['microbatches']}; leave one of them out"
        )
    return number
