"""Every refusal of poptorch and PopART that can be known before lowering.

Each rule is one function that yields messages: the rule, the numbers, the remedy. Sources: the
poptorch contract (sections 1, 2, 3, 5) and PopART's pipelining notes, SDK 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.prices import chip_of, is_ipu
from ipu_pipeline.backends.ipu.prices.layout import one_ipu_groups
from ipu_pipeline.backends.ipu.prices.operations import serialization_factor, slices_problem
from ipu_pipeline.backends.ipu.prices.predict import table_problems
from ipu_pipeline.backends.ipu.settings import PopTorchSettings, evaluation_of
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.plan import Plan

MOST_IPUS = 64  # per process

Rule = Callable[[Plan, PopTorchSettings], Iterator[str]]


def check(plan: Plan, settings: PopTorchSettings, *, several_processes: bool = False) -> None:
    """Refuse what poptorch would refuse.

    Args:
        plan: A plan for IPUs.
        settings: Of the plan.
        several_processes: Whether poprun may start more than one.

    Raises:
        LoweringError: All broken rules, one line each.
    """
    rules = [rule for rule in RULES if rule != _processes or not several_processes]
    found = [message for rule in rules for message in rule(plan, settings)]
    if len(found) == 1:
        raise LoweringError(found[0])
    if found:
        lines = "".join(f"\n  - {message}" for message in found)
        raise LoweringError(f"poptorch cannot run this plan, for {len(found)} reasons:{lines}")


def notes(plan: Plan, settings: PopTorchSettings) -> tuple[str, ...]:
    """Return what poptorch will do otherwise than one may expect, one line each."""
    config = settings.config
    found = [*config.legacy_notes()]
    per_replica = config.num_ipus()
    total = per_replica * plan.replicas
    if not is_power_of_two(total):
        rounded = 1 << total.bit_length()
        found.append(
            f"{total} IPUs ({plan.replicas} x {per_replica}) are no power of two: poptorch takes "
            f"{rounded}, and {rounded - total} of them idle"
        )
    if config.output_mode in ("final", "default") and plan.num_microbatches > 1:
        found.append(
            f"output_mode {config.output_mode!r} gives back the loss of the last of "
            f"{count_of(plan.num_microbatches, 'microbatch')} only; 'all' or 'sum' give their mean"
        )
    return tuple(found)


def is_power_of_two(number: int) -> bool:
    """Tell whether ``number`` is 1, 2, 4, 8, ..."""
    return number > 0 and number & (number - 1) == 0


def merged_stages(plan: Plan) -> int:
    """Return the forward stages that PopART makes: neighbours on one IPU become one."""
    devices = [stage.device for stage in plan.stages]
    return 1 + sum(a != b for a, b in pairwise(devices))


def _machine(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    if not is_ipu(plan.machine):
        yield (
            f"the plan is for {plan.machine.name}, whose devices are no IPUs; make it with "
            "machine='pod16' or another pod"
        )


def _accumulation(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    stages = merged_stages(plan)
    least = 2 * stages - 1
    if not plan.graph.training:
        if plan.num_microbatches < stages > 1:
            yield (
                f"{count_of(plan.num_microbatches, 'microbatch')} in a call of the device are "
                f"below the {stages} forward stages of the pipeline; use "
                f"{count_of(stages, 'microbatch')} or more"
            )
    elif stages > 1 and plan.num_microbatches < least:
        yield (
            f"gradient accumulation {plan.num_microbatches} is below {least} = 2 x {stages} "
            f"forward stages - 1, which the pipeline needs; use {count_of(least, 'microbatch')} or "
            "more"
        )


def _processes(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    per_replica = max(stage.device for stage in plan.stages) + 1
    total = per_replica * plan.replicas
    if total > MOST_IPUS:
        yield (
            f"{count_of(plan.replicas, 'replica')} of {count_of(per_replica, 'IPU')} are {total}, "
            f"one process has at most {MOST_IPUS}; lower the replicas, or emit a bundle and start "
            "several processes (ipu-pipeline launch --print)"
        )


def _ipus(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    yield from devices_problems([stage.device for stage in plan.stages])


def devices_problems(devices: Sequence[int]) -> Iterator[str]:
    """Yield why the stages cannot be on these IPUs."""
    per_replica = max(devices) + 1
    if per_replica > MOST_IPUS:
        yield f"a replica has {per_replica} IPUs, at most {MOST_IPUS} work together; use fewer"
    unused = sorted(set(range(per_replica)) - {*devices})
    if unused:
        yield (
            f"IPU {unused[0]} has no stage although IPU {per_replica - 1} has one; number the "
            "IPUs of a replica from 0 without a gap"
        )


def _evaluation(_: Plan, settings: PopTorchSettings) -> Iterator[str]:
    """What does not fit of another placement for evaluation."""
    found = settings.inference
    for ipu, memory in enumerate(found.memory if found else ()):
        if found and not memory.fits(found.chip):
            yield (
                f"inference: {found.tile_text(ipu)}; move layers to other IPUs in "
                "inference_layers_per_ipu"
            )


def _evaluation_problems(graph: BlockGraph, config: IPUConfig) -> Iterator[str]:
    """What PopART would refuse of another placement for evaluation."""
    found = evaluation_of(graph, config)
    if found is None:
        return
    layout, settings = found
    total = settings.num_ipus * settings.replicas
    if total > MOST_IPUS:
        yield (
            f"inference: {count_of(settings.replicas, 'replica')} of "
            f"{count_of(settings.num_ipus, 'IPU')} are {total}, one process has at most "
            f"{MOST_IPUS}; lower inference_replication_factor"
        )
    empty = set(range(settings.num_ipus)) - {stage.ipu for stage in layout.stages}
    if empty:
        yield (
            f"inference: IPU {min(empty)} has no block; lower inference_ipus_per_replica, or give "
            "it layers in inference_layers_per_ipu"
        )
    for block in graph.blocks:
        problem = slices_problem(graph, block.name, serialization_factor(graph, block, settings))
        if problem:
            yield f"inference: {problem}"


def _tied(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    for group in one_ipu_groups(plan.graph):
        places = {name: plan.stages[plan.stage_of[name]].device for name in group}
        if len(set(places.values())) > 1:
            shown = ", ".join(f"{name} on IPU {ipu}" for name, ipu in places.items())
            yield (
                f"a weight may be used on one IPU only, but {shown} share one; put them on one IPU "
                "(the head in a last stage on the embedding's IPU), or untie them"
            )


def _tables(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    yield from table_problems(plan)


SPREAD_VOCABULARY = (
    "the vocabulary is spread over stages, and PopART runs all IPUs of a pipeline in lock "
    "step, each block on one: no pass of its own, in which every IPU works on one "
    "microbatch's loss, fits between forward and backward pass; plan with vocabulary 'auto' or "
    "'even', or say serialized_embedding_splits_per_ipu: rows of the tables on several IPUs, one "
    "after another"
)


def foreign_problems(plan: Plan) -> Iterator[str]:
    """Say which decisions of a plan IPUs cannot carry out, whatever its settings."""
    if plan.vocabulary is not None:
        yield SPREAD_VOCABULARY
    if any(stage.offload for stage in plan.stages):
        yield (
            "the plan offloads activations to host memory, which GPUs do; leave it out, with the "
            "pass 'offload{blocks=none}'"
        )


def _foreign(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    yield from foreign_problems(plan)


def _order(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    position = {block.name: index for index, block in enumerate(plan.blocks)}
    last, before = -1, ""
    for index, stage in enumerate(plan.stages):
        for name in stage.blocks:
            if position[name] < last:
                yield (
                    f"block {name!r} of stage {index} runs before {before!r} of an earlier stage; "
                    "poptorch's stages follow the order of execution: make the plan with "
                    "execution_order=True, or exchange the two"
                )
                return
            last, before = position[name], name


def config_problems(graph: BlockGraph, config: IPUConfig) -> Iterator[str]:
    """Yield what no plan can be made with: it would not be emitted.

    Raises:
        ConfigError: The layers of another placement for evaluation do not fit the model.
    """
    yield from _evaluation_problems(graph, config)
    if config.device_iterations > 1 and config.output_mode == "default":
        yield (
            f"device_iterations {config.device_iterations} with output_mode 'default' gives back "
            "the last iteration's loss only; name the output mode ('all', 'sum' or 'final')"
        )
    if config.num_io_tiles and graph.training and config.output_mode not in ("all", "sum"):
        yield (
            f"num_io_tiles with output_mode {config.output_mode!r}: PopTorch overlaps host input "
            "under 'all' and 'sum' only; choose one of them"
        )
    outside = [p for p in config.memory_proportions() if not 0 < p <= 1]
    if outside:
        yield f"matmul_proportion {outside[0]} must be above 0 and at most 1; correct it"


def _configuration(plan: Plan, settings: PopTorchSettings) -> Iterator[str]:
    yield from config_problems(plan.graph, settings.config)


def _io_tiles(plan: Plan, settings: PopTorchSettings) -> Iterator[str]:
    tiles = settings.config.num_io_tiles or 0
    held = tiles * chip_of(plan.machine).tile_memory_bytes if tiles else 0
    size = sum(tensor.num_bytes for tensor in plan.graph.inputs)
    if tiles and size > held:
        yield (
            f"the inputs of a microbatch have {size} bytes, {tiles} I/O tiles hold {held}; raise "
            "num_io_tiles, or use a smaller micro batch"
        )


def _scaling(plan: Plan, settings: PopTorchSettings) -> Iterator[str]:
    if settings.config.auto_loss_scaling and not settings.half:
        yield (
            "auto_loss_scaling works on float16 gradients, but the model is in float32; leave it "
            "out, or put the model into float16"
        )
    if plan.schedule != "popart":
        yield (
            f"the plan's schedule is {plan.schedule!r}, IPUs run 'popart'; make the plan with "
            "schedule='popart'"
        )


def _clipping(_: Plan, settings: PopTorchSettings) -> Iterator[str]:
    optimizer = settings.optimizer
    if optimizer.max_grad_norm is not None and optimizer.optimizer in ("LAMB", "RMSprop"):
        yield (
            f"poptorch's {optimizer.optimizer} cannot clip gradients (max_grad_norm "
            f"{optimizer.max_grad_norm}); leave max_grad_norm out, or use AdamW, Adam or SGD"
        )


NO_BATCH = "the plan's inputs have no batch axis; make the plan with an example batch of tensors"


def _batch(plan: Plan, _: PopTorchSettings) -> Iterator[str]:
    if plan.micro_batch_size < 1:
        yield NO_BATCH


RULES: tuple[Rule, ...] = (
    _machine,
    _batch,
    _accumulation,
    _processes,
    _ipus,
    _evaluation,
    _tied,
    _order,
    _tables,
    _foreign,
    _configuration,
    _io_tiles,
    _scaling,
    _clipping,
)
