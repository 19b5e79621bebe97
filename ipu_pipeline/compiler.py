"""The flow on one screen: capture, find the backend, solve, plan; then lower the plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.capture import CapturedModel, capture, model_identity
from ipu_pipeline.capture.captured import keep_for_reuse
from ipu_pipeline.capture.from_config import dtype_for, in_dtype
from ipu_pipeline.capture.inputs import ready_batch
from ipu_pipeline.capture.patches import original_model
from ipu_pipeline.capture.python_state import same_random_numbers
from ipu_pipeline.errors import CaptureError, LoweringError, PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.plan import Granularity, Plan
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.backend import (
    Backend,
    Workload,
    backend_named,
    backend_names,
    backend_of,
    find_machine,
)
from ipu_pipeline.planner.options.vocabulary import known_shares, vocabulary_rows
from ipu_pipeline.planner.options.vocabulary_shares import shares
from ipu_pipeline.planner.passes.manager import PassManager
from ipu_pipeline.planner.price import make_plan, priced, schedule_problem
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline.planner.search.parallel import check_depth
from ipu_pipeline.stages.executable import Executable, ExecutionOptions

logger = logging.getLogger(__name__)


@same_random_numbers()
def plan(  # noqa: PLR0913 - the public door: keyword options of one decision
    model: nn.Module,
    example_batch: Mapping[str, Any],
    *,
    machine: str | Machine = "local",
    num_stages: int | None = None,
    microbatches: int | None = None,
    replicas: int | None = None,
    schedule: str | None = None,
    costs: str = "analytic",
    granularity: Granularity = "layer",
    config: IPUConfig | None = None,
    constraints: Constraints | None = None,
    passes: str = "",
    batch_axes: Mapping[str, int | None] | None = None,
    settings: Mapping[str, Any] | None = None,
    vocabulary: Literal["auto", "even"] | Sequence[float] | None = None,
) -> Plan:
    """Find the fastest split of ``model`` over ``machine``, with a bound on how good it is.

    Args:
        model: In training mode, and returning a loss for ``example_batch``; or in evaluation mode,
            for ``compile(training=False)``. It may live on the ``meta`` device when ``costs`` is
            ``analytic``.
        example_batch: Keyword arguments of one microbatch (axis 0: micro batch), labels included
            in training mode.
        machine: ``local`` (this machine, measured), a known name such as ``pod16``, a machine
            file, or a description.
        num_stages: Pipeline depth; ``None``: the config's, else the best for the machine.
        microbatches: Microbatches per optimizer step of one replica, of all where replicas are
            searched; ``None``: the config's, else what the machine's backend takes, at least 8.
        replicas: Copies of the pipeline; ``None``: the config's, on GPUs the fastest number of
            them, else 1.
        schedule: One that the machine's backend lists: ``1f1b``, ``gpipe``, ``interleaved``,
            ``zbv``, ... or ``popart`` (the one that IPUs run); ``None``: the backend's first.
        costs: ``analytic`` (counted operations) or ``profiled`` (measured on this machine).
        granularity: How fine the blocks are: ``layer``, ``sublayer`` or ``op``.
        config: An IPU configuration; its ``layers_per_ipu`` is respected to the letter.
        constraints: Further limits; arguments that are given replace its fields of the same
                meaning.
        passes: Passes over the solved plan, such as ``serialize_projection{factor=16},
            recompute{blocks=all}``; the predictions are those of the annotated plan.
        batch_axes: Axis of samples by input (``{"position_ids": 1, "class_weights": None}``;
            ``None``: every microbatch gets it whole), kept in the plan. Of other inputs it is
            found before the first batch is cut, by running the model on two samples.
        settings: On GPUs, fields of ``Plan.settings``: ``precision`` (of ``None``: that of 16-bit
            weights or of the config, else bfloat16 with float32 weights in the optimizer; that
            of the weights, where they have values), ``optimizer``, ``tp``, ...
        vocabulary: Spread output projection, loss and input embeddings over the stages by rows of
            the vocabulary: ``"even"``, or the share of every stage (``[1, 1, 2]``); ``"auto"``:
            shares that make the step shortest, where that is faster; ``None``: blocks are whole.
            On IPUs only ``"auto"``: rows of large tables on several IPUs, one after another.

    Raises:
        CaptureError: The model cannot be captured.
        PartitionError: No split satisfies the constraints, or what the passes made of it does not
            fit.
        PlanError: A pass cannot be applied, or the vocabulary cannot be spread.
        ValueError: An argument is out of range.
    """
    manager = PassManager.parse(passes)
    limited = constraints or Constraints()
    depth = depth_of(_said(num_stages, limited, "num_stages"), config)
    shares = known_shares(limited.vocabulary if vocabulary is None else vocabulary)
    asked = replace(limited, num_stages=depth, vocabulary=shares)
    model = original_model(model)
    begin = time.monotonic()
    captured = _captured(model, example_batch, machine, costs, granularity, settings)
    check_depth(captured.graph, depth or 1)
    described = find_machine(machine, depth and depth * (replicas or limited.replicas))
    backend = _backend_for(captured, described, costs, settings)
    limits = _limits(asked, captured.graph, described, config, microbatches, replicas, schedule)
    work = Workload(
        captured.graph,
        described,
        limits.schedule,
        limits.num_microbatches,
        limits.replicas,
        {**backend.settings(captured.graph, config, limits), **(settings or {})},
        measured_seconds(captured, ready_batch(example_batch), described, costs),
        limits.factors(captured.graph.block_index),
    )
    given = backend.placement(work) if constraints is None else None
    if given is not None:
        split, work = given
    else:
        layers = _layers(captured.graph, config, depth) or limits.layers_per_ipu
        limits = replace(limits, layers_per_ipu=layers)
        free = constraints is None and replicas is None
        split, work = backend.search(work, limits, any_replicas=free)
    made = make_plan(model_identity(model), work, split, captured.granularity)
    made = replace(made, batch_axes=dict(batch_axes or {}))
    made = _after_passes(_fitting(_with_shares(made, limits.vocabulary)), manager)
    logger.info("planned in %.2f s: %d stages on %s, %s, %d microbatches, step %.6g s, gap %.2f %%",
                time.monotonic() - begin, made.num_stages, made.machine.name, made.schedule,
                made.num_microbatches, made.objective_s, 100 * made.gap)  # fmt: skip
    return made


def _with_shares(made: Plan, wanted: Literal["auto", "even"] | Sequence[float] | None) -> Plan:
    """Spread the vocabulary where the split is the backend's own and has no shares."""
    if wanted is None or wanted == "auto" or made.vocabulary or shares(made.graph):
        return made
    rows = vocabulary_rows(made.graph, made.num_stages, wanted)
    return priced(replace(made, vocabulary=rows, decision_digest=""))


def _backend_for(
    captured: CapturedModel, machine: Machine, costs: str, settings: Mapping[str, Any] | None
) -> Backend:
    """Return the backend of a machine, if it can price the model so and run it.

    Raises:
        CaptureError: Its glue would have to be run again.
        ValueError: It has no such costs, or the settings are not for the machine.
    """
    if settings and machine.devices[0].kernels is None:
        raise ValueError(
            f"settings ({', '.join(settings)}) are for GPUs with known kernels, such as h100-x64, "
            f"and {machine.name} has none; leave them out, or plan with another machine"
        )
    backend = backend_of(machine)
    backend.check_costs(costs)
    frozen = captured.glue.unsteady or captured.glue.frozen
    if frozen and not backend.replays_glue:
        raise CaptureError(frozen)
    return backend


def _said(argument: Any, limits: Constraints, name: str) -> Any:
    """Return an argument; where it was left out, what the constraints say besides their default."""
    said = getattr(limits, name)
    return argument if argument is not None or said == getattr(Constraints, name) else said


def _limits(
    limits: Constraints,
    graph: BlockGraph,
    machine: Machine,
    config: IPUConfig | None,
    microbatches: int | None,
    replicas: int | None,
    schedule: str | None,
) -> Constraints:
    """Return ``limits`` with the numbers of the run: those given, the config's, or defaults."""
    backend = backend_of(machine)
    replicas = _said(replicas, limits, "replicas")
    microbatches = _said(microbatches, limits, "num_microbatches")
    schedule = _said(schedule, limits, "schedule")
    if replicas is None:
        replicas = 1 if config is None else config.replicas(inference=not graph.training)
    if microbatches is None:
        microbatches = (
            backend.default_microbatches(machine, limits.num_stages, replicas)
            if config is None
            else config.accumulation()
        )
    name = schedule or backend.schedules[0]
    wrong = schedule_problem(machine, name)
    if wrong:
        raise ValueError(wrong)
    return replace(limits, num_microbatches=microbatches, replicas=replicas, schedule=name)


def _captured(
    model: nn.Module,
    batch: Mapping[str, Any],
    machine: str | Machine,
    costs: str,
    granularity: Granularity,
    settings: Mapping[str, Any] | None,
) -> CapturedModel:
    """Capture a model, on GPUs in the dtype of their products, and keep it for ``compile``."""
    logger.info("capturing %s", type(model).__name__)
    begin = time.monotonic()
    counted, counted_batch = model, batch
    if _for_gpus(machine, model, costs):
        dtype = dtype_for(model, (settings or {}).get("precision"))
        counted, counted_batch = in_dtype(model, batch, dtype)
    captured = capture(counted, counted_batch, granularity=granularity)
    if counted is model:
        keep_for_reuse(captured)
    logger.info("%d blocks captured in %.2f s; looking at machine %s",
                len(captured.graph.blocks), time.monotonic() - begin,
                machine if isinstance(machine, str) else machine.name)  # fmt: skip
    return captured


def _for_gpus(machine: str | Machine, model: nn.Module, costs: str) -> bool:
    """Whether steps are priced by what the kernels of GPUs reach."""
    if isinstance(machine, str) and machine in backend_names():
        return False
    kernels = find_machine(machine, None).devices[0].kernels
    return kernels is not None and model.training and costs == "analytic"


@same_random_numbers()
def compile(
    model: nn.Module,
    plan: Plan,
    *,
    target: str = "local",
    optimizer: torch.optim.Optimizer | None = None,
    batch_axes: Mapping[str, int | None] | None = None,
    **options: Any,
) -> Executable:
    """Turn a plan into an executable for ``target``.

    Args:
        model: The model that the plan was made for, with its weights, or on ``meta``: each process
            then gets those of its own stages (``weights``).
        plan: From :func:`plan` or ``Plan.load``.
        target: ``local``, ``distributed`` (in processes that torchrun starts) or ``poptorch``.
        optimizer: Any ``torch.optim`` optimizer over ``model.parameters()``.
        batch_axes: As for :func:`plan`; they replace those of the plan.
        **options: Fields of :class:`~ipu_pipeline.stages.executable.ExecutionOptions`:
            ``precision``, ``loss_scaling``, ``max_grad_norm``, ``seed``, ``schedule``, ...;
            ``training=False`` for inference: no optimizer, ``eval_step`` only, and the plan may
            come from a model in evaluation mode and a batch without labels.

    Raises:
        PlanError: The plan was made for another model, or is invalid.
        LoweringError: The target cannot run the plan.
        ValueError: An option is unknown or out of range, or there is an optimizer and nothing to
            train.
    """
    model = original_model(model)
    _check_is_plan(plan)
    plan = replace(plan, batch_axes={**plan.batch_axes, **(batch_axes or {})})
    verify_plan(plan)
    plan.check_model(model_identity(model))
    unknown = sorted(set(options) - set(ExecutionOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(ExecutionOptions.__dataclass_fields__)
        raise ValueError(f"unknown option {', '.join(unknown)}; known options: {known}")
    execution = ExecutionOptions(**options)
    if optimizer is not None and not execution.training:
        raise ValueError("training=False leaves nothing to an optimizer; pass one of the two only")
    begin = time.monotonic()
    backend = backend_named(target)
    if shares(plan.graph) and backend is not backend_of(plan.machine):
        raise LoweringError(
            f"rows of one table are on several IPUs in this plan, which {target!r} does not do; "
            "plan without serialized_embedding_splits_per_ipu and "
            "serialized_projection_splits_per_ipu"
        )
    made = backend.lower(model, plan, optimizer, execution)
    logger.info("compiled %s for %s in %.2f s", type(model).__name__, target,
                time.monotonic() - begin)  # fmt: skip
    return made


def _check_is_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise ValueError(
            f"the plan is a {type(plan).__name__}; give one of ipu_pipeline.plan(model, batch), or "
            "of a file: ipu_pipeline.Plan.load(path)"
        )


def depth_of(num_stages: int | None, config: IPUConfig | None) -> int | None:
    """Return the pipeline depth, ``None``: the best.

    Raises:
        ValueError: ``num_stages`` is not the configuration's.
    """
    if config is None or (config.ipus_per_replica is None and config.layers_per_ipu == (-1,)):
        return num_stages
    depth = config.num_ipus()
    if num_stages not in (None, depth):
        raise ValueError(
            f"num_stages is {num_stages}, but the IPU configuration has {count_of(depth, 'IPU')} "
            "in a replica; leave num_stages out, or change layers_per_ipu and ipus_per_replica"
        )
    return depth


def _layers(
    graph: BlockGraph, config: IPUConfig | None, depth: int | None
) -> tuple[int, ...] | None:
    """Return the layers of each device that the configuration asks for; ``None``: no wish."""
    if config is None or depth is None or config.layers_per_ipu == (-1,):
        return None
    return config.resolve_layers(sum(block.kind == "layer" for block in graph.blocks))


def measured_seconds(
    captured: CapturedModel, batch: Mapping[str, Any], machine: Machine, costs: str
) -> dict[str, tuple[float, float]]:
    """Return measured seconds by block; nothing where they are computed."""
    if costs == "analytic":
        return {}
    from ipu_pipeline.backends.local.measure import profile_blocks

    return profile_blocks(captured, batch, num_devices=len(machine.devices))


def _fitting(made: Plan) -> Plan:
    if made.misfits:
        raise PartitionError(
            f"the plan does not fit: {'; '.join(made.misfits)}; move layers to other devices, "
            "lower the micro batch, recompute or serialize more blocks, or let the solver choose"
        )
    return made


def _after_passes(made: Plan, manager: PassManager) -> Plan:
    """Return the plan as the passes annotate it, with its own price.

    Raises:
        PartitionError: It does not fit.
    """
    if not manager.passes:
        return made
    annotated = priced(replace(manager.run(made), decision_digest=""))
    try:
        return _fitting(annotated)
    except PartitionError as error:
        raise PartitionError(f"the plan after the passes {manager}: {error}") from error
