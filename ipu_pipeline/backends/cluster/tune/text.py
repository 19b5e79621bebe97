"""A tuning result for GPUs as text: the front, and what limits the best plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ipu_pipeline.backends.cluster.prices.parallel_sizes import ParallelSizes
from ipu_pipeline.backends.cluster.tune.search import GpuPoint, GpuTuneResult
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.text import render_table

_COLUMNS = ("tokens/s", "step s", "MFU", "GB", "sizes", "batch", "schedule", "recompute")
_SIZES = ("pp", "dp", "tp", "cp", "ep", "vpp")


def result_text(result: GpuTuneResult) -> str:
    """Return the front, the bound and the reasons."""
    best, request = result.best, result.request
    gap, samples = best.plan.gap, best.plan.total_batch_size / best.plan.objective_s
    proven = (
        f"no plan of the {count_of(result.configurations, 'configuration')} is faster than "
        f"{result.bound_s:.4g} s (gap {gap:.1%}; the splits of {result.searched} were searched)"
    )
    if gap < 1e-9:
        tried = count_of(result.configurations, "configuration")
        proven = f"it is the fastest of all plans of the {tried}"
    parts = [
        f"{best.tokens_per_s:,.0f} tokens/s predicted ({samples:.4g} samples/s, "
        f"{best.mfu:.1%} MFU) for a global batch of {request.global_batch} on "
        f"{result.machine.name} in {request.settings.engine}'s program",
        front_table(result),
        f"best: a step takes {best.plan.objective_s:.4g} s; {proven}",
        "\n".join(limits(best)),
    ]
    return "\n\n".join(parts)


def front_table(result: GpuTuneResult) -> str:
    """Return one row per point of the front: GB of the fullest GPU, microbatches x samples."""
    return render_table(_COLUMNS, [_row(point) for point in result.points])


def _row(point: GpuPoint) -> tuple[str, ...]:
    sizes = point.config.sizes
    layers = sum(len(stage.recompute) for stage in point.plan.stages)
    recomputed = [*sizes.recompute, *([count_of(layers, "layer")] if layers else [])]
    if layers == sum(block.kind == "layer" for block in point.plan.graph.blocks):
        recomputed = ["full"]  # parts are within
    return (
        f"{point.tokens_per_s:,.0f}",
        f"{point.plan.objective_s:.4g}",
        f"{point.mfu:.1%}",
        f"{point.memory_bytes / 1e9:.1f}",
        f"{_named(sizes)} zero{sizes.zero_stage}",
        f"{point.config.num_microbatches} x {sizes.micro_batch}",
        f"{point.config.schedule}{' + vocabulary' if point.plan.vocabulary else ''}"
        if sizes.pp > 1
        else "-",
        "+".join(recomputed) or "none",
    )


def _named(sizes: ParallelSizes) -> str:
    """Return the sizes above one: ``pp4 dp8 tp2``."""
    named = ((name, getattr(sizes, name)) for name in _SIZES)
    return " ".join(f"{name}{value}" for name, value in named if value > 1) or "one GPU"


def shares(point: GpuPoint) -> dict[str, float]:
    """Return the seconds of a step by what they go to, as means over the ranks.

    ``compute``: passes; ``collectives``: those within layers; ``copies``: between stages;
    ``bubble``: fill and flush, and waiting for the busiest rank; ``update``: of the weights, with
    what of the reduction of gradients is not hidden.
    """
    step, count = point.step, point.plan.num_microbatches
    pp = step.pricer.sizes.pp
    passes = sum(one.forward_s + one.backward_s + one.softmax_s + one.rows_s for one in step.loads)
    passes *= count / pp
    layers = [b for b in point.plan.graph.blocks if b.kind == "layer"]
    known: dict[int, float] = {}
    within = 0.0
    for block in layers:
        if id(block.forward_ops) not in known:
            known[id(block.forward_ops)] = 2 * step.pricer.exchanged_s(block)
        within += known[id(block.forward_ops)]
    within *= count / pp
    copies = sum(one.copies.forward_s + one.copies.backward_s for one in step.loads) * count / pp
    once_s = step.once_s()
    return {
        "compute": passes - within,
        "collectives": within,
        "copies": copies,
        "bubble": max(0.0, point.plan.objective_s - once_s - passes - copies),
        "update": once_s,
    }


def limits(point: GpuPoint) -> Iterator[str]:
    """Yield sentences that say what limits a plan."""
    found, step_s = shares(point), point.plan.objective_s
    named = {
        "compute": "the passes themselves",
        "collectives": "tensor, context and expert parallel collectives within layers",
        "copies": "copies between stages",
        "bubble": "the bubble (fill, flush, and unequal ranks)",
        "update": "the update and what of the gradients' reduction nothing hides",
    }
    said = [
        f"{named[name]} {seconds / step_s:.1%}"
        for name, seconds in sorted(found.items(), key=lambda item: -item[1])
        if seconds / step_s >= 0.0005
    ]
    yield f"time: {', '.join(said)}"
    device = point.plan.machine.devices[0]
    room = device.memory_bytes - device.reserved_bytes
    layers = sum(len(stage.recompute) for stage in point.plan.stages)
    memory = f"memory: the fullest GPU holds {point.memory_bytes / 1e9:.1f} of {room / 1e9:.1f} GB"
    if layers:
        total = sum(block.kind == "layer" for block in point.plan.graph.blocks)
        memory += f"; it makes {layers} of {count_of(total, 'layer')} recompute"
    yield memory
    rest = {name: seconds for name, seconds in found.items() if name != "compute"}
    worst = max(rest, key=lambda name: rest[name])
    if rest[worst] / step_s < 0.02:
        yield "limited by compute: nothing else takes more than 2 % of the step"
    else:
        yield f"limited by compute, then by {named[worst]}"


def as_json(result: GpuTuneResult) -> dict[str, Any]:
    """Return the figures as JSON data."""
    return {
        "machine": result.machine.name,
        "global_batch": result.request.global_batch,
        "engine": result.request.settings.engine,
        "configurations": result.configurations,
        "searched": result.searched,
        "seconds": result.seconds,
        "bound_s": result.bound_s,
        "front": [_point_json(point) for point in result.points],
        "limits": list(limits(result.best)),
    }


def _point_json(point: GpuPoint) -> dict[str, Any]:
    sizes = point.config.sizes
    own = ("pp", "dp", "tp", "cp", "ep", "vpp", "micro_batch", "zero_stage")
    return {
        "tokens_per_s": point.tokens_per_s,
        "samples_per_s": point.plan.total_batch_size / point.plan.objective_s,
        "step_s": point.plan.objective_s,
        "bound_s": point.plan.lower_bound_s,
        "mfu": point.mfu,
        "memory_bytes": point.memory_bytes,
        **{name: getattr(sizes, name) for name in own},
        "microbatches": point.config.num_microbatches,
        "schedule": point.config.schedule,
        "recompute": list(sizes.recompute),
        "vocabulary": None if point.plan.vocabulary is None else point.plan.vocabulary.rows,
        "recomputed_layers": [len(stage.recompute) for stage in point.plan.stages],
        "blocks": [len(stage.blocks) for stage in point.plan.stages],
        "shares_s": shares(point),
    }
