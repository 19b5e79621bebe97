"""Pipelines of other frameworks: a plan as their settings, and their settings as stages.

======================  ==========================================================================
``megatron``            flags of Megatron-LM, with ``--pipeline-model-parallel-layout``
``torchtitan``          ``parallelism`` and ``training`` of a job config, as JSON
``automodel``           ``distributed`` of a NeMo AutoModel recipe, as JSON, which is YAML
``transformers``        a ``DistributedConfig``, as JSON
======================  ==========================================================================

What a format cannot say is refused by name; what its framework does otherwise is a note.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipu_pipeline.backends.cluster.layouts.given_layout import GivenLayout
from ipu_pipeline.backends.cluster.layouts.megatron_layout import (
    LayerLayout,
    blocks_of,
    letters_of,
    parse_layout,
)
from ipu_pipeline.backends.cluster.layouts.module_names import (
    MODULES,
    checked_layout,
    module_names,
    stages_of_modules,
)
from ipu_pipeline.backends.cluster.prices.parallel_sizes import (
    GpuSettings,
    ParallelSizes,
    dtype_of,
    sizes_of,
)
from ipu_pipeline.errors import PlanError, shown
from ipu_pipeline.ir.files import of_file, read_text
from ipu_pipeline.ir.limits import check_count, count_of
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.yaml_text import parse_yaml
from ipu_pipeline.planner.schedules import schedule_kind, schedule_names

_MOST_BYTES = 1_000_000
_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
_NARROW = {"float8": ("--fp8-format", "hybrid"), "float4": ("--fp4-format", "e2m1")}
Written = tuple[str, tuple[str, ...]]  # a file's text, and notes


@dataclass(frozen=True)
class Format:
    """How one framework writes a pipeline down."""

    write: Callable[[Plan, ParallelSizes], Written]
    read: Callable[[str], GivenLayout]


def export_plan(plan: Plan, name: str) -> Written:
    """Return a plan in another framework's format, and notes on what that one does otherwise.

    Raises:
        PlanError: The format cannot say what the plan decides.
    """
    if plan.machine.devices[0].kind != "generic" or plan.machine.shared_memory:
        raise PlanError(
            f"the plan is for {plan.machine.name}; pipelines of other frameworks run on GPUs: plan "
            "for a machine such as h100-x64"
        )
    _refuse_what_no_format_says(plan)
    return FORMATS[name].write(plan, sizes_of(plan))


def read_plan(path: str | Path, name: str) -> GivenLayout:
    """Read a file of another framework.

    Raises:
        PlanError: It is unreadable, or says no pipeline.
    """
    text = read_text(path, f"the {name} file", PlanError, most_bytes=_MOST_BYTES)
    with of_file(path):
        return FORMATS[name].read(text)


def _refuse_what_no_format_says(plan: Plan) -> None:
    if plan.granularity != "layer":
        raise PlanError(
            f"the plan cuts {plan.model.model_class} into blocks of granularity "
            f"{plan.granularity}; other frameworks cut between layers: plan with --granularity "
            "layer"
        )
    if plan.vocabulary is not None:
        raise PlanError(
            "the plan spreads its vocabulary over stages, which no other framework does; plan "
            "without vocabulary"
        )
    for index, stage in enumerate(plan.stages):
        for what, names in (("runs in slices", stage.serialize),
                            ("is spread over stages", stage.table_slices)):  # fmt: skip
            name = next(iter(names), None)
            if name is not None:
                raise PlanError(
                    f"stage {index}: block {name!r} {what}, which no other framework does; plan "
                    "without serialized blocks and spread tables"
                )


def _layers_recompute(plan: Plan, framework: str) -> bool:
    """Whether all layers recompute; some of them is refused."""
    layers = [block.name for block in plan.blocks if block.kind == "layer"]
    again = {name for stage in plan.stages for name in stage.recompute}
    some = [name for name in layers if name in again]
    if some and len(some) != len(layers):
        raise PlanError(
            f"the plan recomputes {len(some)} of {count_of(len(layers), 'layer')}; {framework}'s "
            "settings say all or none: set recompute of every stage to all of its layers, or to "
            "none"
        )
    return bool(some)


def _in_loops(plan: Plan, sizes: ParallelSizes, framework: str, known: Sequence[str]) -> None:
    if plan.schedule not in known:
        raise PlanError(
            f"the plan's schedule is {plan.schedule}; {framework} runs {', '.join(known)}: plan "
            "with one of these"
        )
    order = [list(dict.fromkeys(s.device for s in plan.stages)).index(s.device)
             for s in plan.stages]  # fmt: skip
    expected = schedule_kind(plan.schedule).place(plan.num_stages, sizes.pp)
    if tuple(order) != expected:
        raise PlanError(
            f"the plan has its stages on ranks {order}; {framework} has them on "
            f"{list(expected or ())}: give every stage the device of its turn"
        )


# -- Megatron-LM --------------------------------------------------------------------------------

_MEGATRON_SIZES = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--context-parallel-size": "cp",
    "--expert-model-parallel-size": "ep",
    "--micro-batch-size": "micro_batch",
    "--global-batch-size": "global_batch",
}
_LAYOUT = "--pipeline-model-parallel-layout"


def _write_megatron(plan: Plan, sizes: ParallelSizes) -> Written:
    _in_loops(plan, sizes, "Megatron-LM", ("1f1b", "interleaved"))
    settings, layout = GpuSettings.read(plan.settings), checked_layout(plan)
    if settings.zero_stage > 1:
        raise PlanError(
            f"the plan's zero_stage is {settings.zero_stage}; Megatron-LM pipelines shard the "
            "optimizer's state only: plan with zero_stage 0 or 1, or export to torchtitan"
        )
    values = {
        "tp": sizes.tp, "pp": sizes.pp, "cp": sizes.cp, "ep": sizes.ep,
        "micro_batch": plan.micro_batch_size, "global_batch": plan.total_batch_size,
    }  # fmt: skip
    flags = [f"{_LAYOUT} {shlex.quote(str(layout))}"]
    flags += [f"{flag} {values[size]}" for flag, size in _MEGATRON_SIZES.items()]
    if layout.num_extra_layers:
        flags.append(f"--mtp-num-layers {layout.num_extra_layers}")
    flags += ["--sequence-parallel"] * (sizes.tp > 1)
    flags += ["--use-distributed-optimizer"] * (settings.zero_stage == 1)
    precision = settings.precision or dtype_of(plan.graph)
    if precision != "float32":
        flags.append(f"--{_DTYPES.get(precision, 'bf16')}")
    if precision in _NARROW:
        flags.append(" ".join(_NARROW[precision]))
    if _layers_recompute(plan, "Megatron-LM"):
        flags.append("--recompute-granularity full --recompute-method uniform "
                     "--recompute-num-layers 1")  # fmt: skip
    elif settings.recompute:
        parts = " ".join(settings.recompute)
        flags.append(f"--recompute-granularity selective --recompute-modules {parts}")
    head = f"# {plan.model.model_class}, {count_of(sizes.num_devices, 'GPU')}: dp {sizes.dp}"
    return "\n".join([head, *flags, ""]), ()


def _read_megatron(text: str) -> GivenLayout:
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise PlanError(f"its quotes do not match ({error}); quote the layout: '...'") from error
    if not any(word.startswith("--") for word in words):
        words = [_LAYOUT, "".join(words)]
    words = [part for word in words for part in _split_flag(word)]
    given = {word: words[at + 1 : at + 2] for at, word in enumerate(words) if word[:2] == "--"}
    layouts = given.get(_LAYOUT)
    if not layouts:
        raise PlanError(f"it has no {_LAYOUT}; add it")
    layout = parse_layout(layouts[0])
    sizes = {
        size: _count(given[flag][0] if given[flag] else "", flag, size)
        for flag, size in _MEGATRON_SIZES.items()
        if flag in given
    }
    settings: dict[str, Any] = {"zero_stage": int("--use-distributed-optimizer" in given)}
    for precision, flag in (*_DTYPES.items(), ("float8", "fp8-format"), ("float4", "fp4-format")):
        if f"--{flag}" in given:
            settings["precision"] = precision
    if "--recompute-modules" in given:
        after = words[words.index("--recompute-modules") + 1 :]
        ends = next((n for n, word in enumerate(after) if word[:2] == "--"), len(after))
        settings["recompute"] = after[:ends]
    schedule = "1f1b" if len(layout.stages) == sizes.get("pp") else "interleaved"
    return GivenLayout(
        lambda graph: blocks_of(layout, graph),
        sizes,
        {**settings, "engine": "megatron"},
        schedule if "pp" in sizes else None,
        layout.num_extra_layers,
        recompute=given.get("--recompute-granularity") == ["full"],
    )


def _split_flag(word: str) -> tuple[str, ...]:
    flag, equals, value = word.partition("=")
    return (flag, value) if word.startswith("--") and equals else (word,)


# -- torchtitan ---------------------------------------------------------------------------------

_TITAN_SIZES = {
    "pipeline_parallel_degree": "pp",
    "tensor_parallel_degree": "tp",
    "context_parallel_degree": "cp",
    "expert_parallel_degree": "ep",
    "pipeline_parallel_microbatch_size": "micro_batch",
}


def _write_torchtitan(plan: Plan, sizes: ParallelSizes) -> Written:
    _in_loops(plan, sizes, "torchtitan", tuple(_torch_classes()))
    settings = GpuSettings.read(plan.settings)
    shard = bool(settings.zero_stage) * sizes.dp or 1
    notes = _notes(plan, "torchtitan", "activation checkpointing")
    if settings.zero_stage == 1 and sizes.dp > 1:
        notes.append("torchtitan shards gradients, too (ZeRO 2, not 1): less memory")
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": sizes.dp // shard,
        "data_parallel_shard_degree": shard,
        "fsdp_reshard_after_forward": "always" if settings.zero_stage == 3 else "never",
        **{name: getattr(sizes, size) for name, size in _TITAN_SIZES.items()},
        "pipeline_parallel_schedule": _torch_classes()[plan.schedule],
        MODULES: [list(stage) for stage in module_names(plan, "torchtitan")],
    }
    local = plan.micro_batch_size * plan.num_microbatches
    found = {"parallelism": parallelism, "training": {"local_batch_size": local}}
    return _json(found), tuple(notes)


def _read_torchtitan(text: str) -> GivenLayout:
    raw = _object(_loaded(text), "the file")
    own = _object(raw.get("parallelism"), "parallelism")
    sizes = _counts(own, _TITAN_SIZES)
    degrees = [own.get(f"data_parallel_{name}_degree", 1) for name in ("replicate", "shard")]
    if -1 not in degrees:
        sizes["dp"] = _count(degrees[0], "replicate degree", "dp") * _count(
            degrees[1], "shard degree", "dp"
        )
    local = _object(raw.get("training") or {}, "training").get("local_batch_size")
    if local is not None:
        sizes["microbatches"] = _microbatches(local, sizes.get("micro_batch", 1))
    reshard = own.get("fsdp_reshard_after_forward")
    zero_stage = 0 if degrees[1] == 1 else 3 if reshard == "always" else 2
    schedule = own.get("pipeline_parallel_schedule", "1F1B")
    return GivenLayout(stages_of_modules(own, "torchtitan"), sizes, {"zero_stage": zero_stage},
                    _known_schedule(schedule))  # fmt: skip


# -- NeMo AutoModel -----------------------------------------------------------------------------

_AUTO_SIZES = {f"{name}_size": name for name in ("dp", "tp", "pp", "cp", "ep")}


def _write_automodel(plan: Plan, sizes: ParallelSizes) -> Written:
    _in_loops(plan, sizes, "NeMo AutoModel", tuple(_torch_classes()))
    settings = GpuSettings.read(plan.settings)
    notes = _notes(plan, "AutoModel", "activation_checkpointing" if settings.recompute else "")
    if settings.zero_stage < 2 and sizes.dp > 1:
        notes.append(f"AutoModel's fsdp2 shards gradients, too (ZeRO 2, not "
                     f"{settings.zero_stage}): less memory")  # fmt: skip
    local = plan.micro_batch_size * plan.num_microbatches
    pipeline = {
        "pp_schedule": _torch_classes()[plan.schedule],
        "pp_microbatch_size": plan.micro_batch_size,
        "pp_batch_size": local,
        MODULES: [list(stage) for stage in module_names(plan, "automodel")],
    }
    distributed = {
        "strategy": "fsdp2",
        **{name: getattr(sizes, size) for name, size in _AUTO_SIZES.items()},
        "activation_checkpointing": _layers_recompute(plan, "NeMo AutoModel"),
        "pipeline": pipeline,
    }
    scheduler = {"global_batch_size": plan.total_batch_size, "local_batch_size": local}
    return _json({"distributed": distributed, "step_scheduler": scheduler}), tuple(notes)


def _read_automodel(text: str) -> GivenLayout:
    own = _object(_object(_loaded(text), "the file").get("distributed"), "distributed")
    pipeline = _object(own.get("pipeline"), "distributed.pipeline")
    sizes = _counts(own, _AUTO_SIZES)
    sizes |= _counts(pipeline, {"pp_microbatch_size": "micro_batch"})
    if pipeline.get("pp_batch_size") is not None:
        sizes["microbatches"] = _microbatches(
            pipeline["pp_batch_size"], sizes.get("micro_batch", 1)
        )
    return GivenLayout(stages_of_modules(pipeline, "automodel"), sizes, {"zero_stage": 2},
                    _known_schedule(pipeline.get("pp_schedule", "1f1b")),
                    recompute=own.get("activation_checkpointing") in (True, "full"))  # fmt: skip


# -- transformers -------------------------------------------------------------------------------


def _write_transformers(plan: Plan, sizes: ParallelSizes) -> Written:
    module_names(plan, "automodel")  # the same kind of models
    for name in ("dp", "cp", "vpp"):
        if getattr(sizes, name) > 1:
            raise PlanError(
                f"the plan has {name} {getattr(sizes, name)}; pipelines of transformers have one "
                f"stage on every rank, without data or context parallelism: plan with {name} 1"
            )
    layers = checked_layout(plan)
    even = even_layout(layers.num_layers, sizes.pp)
    if layers != even:
        raise PlanError(
            f"the plan's layout is {layers}; transformers splits evenly, {even}: plan with that, "
            "or export to another format"
        )
    notes = _notes(plan, "transformers", "gradient_checkpointing")
    if plan.num_microbatches > 1:
        notes.append("transformers runs a batch through the stages as one microbatch")
    found = {"tp_size": sizes.tp, "pp_size": sizes.pp, "ep_size": sizes.ep, "fsdp_size": 1}
    return _json(found), tuple(notes)


def _read_transformers(text: str) -> GivenLayout:
    raw = _object(_loaded(text), "the file")
    sizes = _counts(raw, {"tp_size": "tp", "pp_size": "pp", "ep_size": "ep"})
    depth = sizes.get("pp")
    if depth is None:
        raise PlanError("it has no pp_size; give the number of stages")
    return GivenLayout(
        lambda graph: blocks_of(even_layout(letters_of(graph).count("t"), depth), graph),
        {**sizes, "dp": 1},
        schedule="1f1b",
    )


def even_layout(num_layers: int, depth: int) -> LayerLayout:
    """Return the split of transformers: equally many layers, the rest in the last stage."""
    each = num_layers // depth
    counts = [each] * (depth - 1) + [num_layers - each * (depth - 1)]
    stages = ["t" * number for number in counts]
    stages[0] = f"E{stages[0]}"
    stages[-1] += "L"
    return LayerLayout(tuple(stages))


FORMATS: Mapping[str, Format] = {
    "megatron": Format(_write_megatron, _read_megatron),
    "torchtitan": Format(_write_torchtitan, _read_torchtitan),
    "automodel": Format(_write_automodel, _read_automodel),
    "transformers": Format(_write_transformers, _read_transformers),
}


# -- small readers ------------------------------------------------------------------------------


def _torch_classes() -> dict[str, str]:
    kinds = map(schedule_kind, schedule_names())
    return {k.name: k.torch_class.removeprefix("Schedule") for k in kinds if k.torch_class}


def _known_schedule(name: Any) -> str:
    known = {cls.lower(): ours for ours, cls in _torch_classes().items()}
    lower = str(name).lower().replace("interleaved_1f1b", "interleaved1f1b")
    if lower not in known:
        raise PlanError(
            f"its schedule is {shown(name)}; known are {', '.join(_torch_classes().values())}"
        )
    return known[lower]


def _notes(plan: Plan, framework: str, recompute: str) -> list[str]:
    """Return what is set elsewhere in a framework's configuration."""
    settings, notes = GpuSettings.read(plan.settings), []
    if recompute and (_layers_recompute(plan, framework) or settings.recompute):
        notes.append(f"the plan recomputes: set {recompute} of {framework}")
    if settings.precision in _NARROW:
        notes.append(f"the plan's precision is {settings.precision}: set it in {framework}")
    return notes


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def _loaded(text: str) -> Any:
    """Parse JSON or YAML: all JSON is YAML."""
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _object(raw: Any, what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise PlanError(f"{what} must be an object with fields, got {shown(raw)}")
    return raw


_LIMITS = {"pp": "num_stages", "micro_batch": "micro_batch", "microbatches": "num_microbatches",
           "global_batch": "global_batch", "local batch": "global_batch"}  # fmt: skip


def _count(raw: Any, what: str, size: str) -> int:
    number = int(raw) if isinstance(raw, str) and raw.isdecimal() and len(raw) < 10 else raw
    check_count(what, number, _LIMITS.get(size, "num_devices"), error=PlanError)
    return int(number)


def _counts(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    return {ours: _count(raw[theirs], theirs, ours) for theirs, ours in names.items()
            if raw.get(theirs) is not None}  # fmt: skip


def _microbatches(local: Any, micro_batch: int) -> int:
    number, rest = divmod(_count(local, "local batch", "local batch"), micro_batch)
    if rest or not number:
        raise PlanError(
            f"a local batch of {local} does not divide into micro batches of {micro_batch}; "
            "correct one of them"
        )
    return number
