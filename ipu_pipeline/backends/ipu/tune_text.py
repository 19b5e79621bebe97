"""A tuning result as text: the front, why the best is best, and how another one differs."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from ipu_pipeline.backends.ipu.prices import IPUSettings, Prediction
from ipu_pipeline.backends.ipu.prices.layout import layers_of
from ipu_pipeline.backends.ipu.prices.pipeline import IPUPipeline
from ipu_pipeline.backends.ipu.tune import TuneResult
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.ir.text import milliseconds, render_table

_COLUMNS = ("samples/s", "step ms", "free", "IPUs", "micro batch", "accumulation", "layers per IPU",
            "proportions", "kept", "slices", "optimizer state")  # fmt: skip


def result_text(result: TuneResult) -> str:
    """Return the front and the reasons for the best."""
    best = result.best.prediction
    parts = [
        f"{best.samples_per_s:.1f} samples/s predicted for a global batch of "
        f"{result.request.global_batch} on {result.machine.name}: quickest of "
        f"{len(result.front.pipelines)} settings",
        front_table(result),
        why(result),
    ]
    notes = []
    if not result.front.complete:
        notes.append("the time limit ended the search for points with more free memory")
    cut = [point for point in result.front.points if point.bound_s < point.prediction.time.total_s]
    notes += [
        f"{point.samples_per_s:.1f} samples/s is not proven to be the most with {point.free:.1%} "
        f"free: some setting has too many splits; at most "
        f"{result.request.global_batch / point.bound_s:.1f} is possible"
        for point in cut
    ]
    return "\n\n".join([*parts, *notes])


def front_table(result: TuneResult) -> str:
    """Return one row per point of the front."""
    rows = []
    for point in result.front.points:
        prediction = point.prediction
        settings = prediction.settings
        rows.append((
            f"{point.samples_per_s:.1f}",
            milliseconds(prediction.time.total_s),
            f"{point.free:.1%}",
            f"{settings.replicas} x {settings.num_ipus}",
            str(prediction.micro_batch),
            str(settings.accumulation),
            _short(result.settings(point).layers_per_ipu),
            _short(settings.proportions),
            _kept(settings),
            f"{settings.embedding_factor}/{settings.projection_factor}",
            _placement(settings),
        ))  # fmt: skip
    return render_table(_COLUMNS, rows)


def _short(values: Sequence[float]) -> str:
    """Write ``2 3x6 4`` for a list with repeated values."""
    runs: list[list[float]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return " ".join(f"{v:g}" if n == 1 else f"{v:g}x{n:g}" for v, n in runs)


def _kept(settings: IPUSettings) -> str:
    """What the forward pass is recomputed from."""
    if not settings.recompute:
        return "everything"
    return "layers" if settings.checkpoint_layers else "stages"


def _placement(settings: IPUSettings) -> str:
    where = "off chip" if settings.optimizer_offchip else "on chip"
    return f"{where}, sharded" if settings.sharded else where


def parts_of_step(prediction: Prediction) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on."""
    time = prediction.time
    return {
        "main cycles": time.main_s,
        "fill and flush": time.fill_s + time.flush_s,
        **time.once_s,
    }


def why(result: TuneResult) -> str:
    """Say what the best step is spent on, what limits it, and what the other shapes reach."""
    best = result.best.prediction
    total = best.time.total_s
    shares = ", ".join(
        f"{seconds / total:.0%} {name}"
        for name, seconds in parts_of_step(best).items()
        if seconds >= 0.005 * total
    )
    settings = best.settings
    text = (
        f"Why this one: {count_of(settings.replicas, 'replica')} of "
        f"{count_of(settings.num_ipus, 'IPU')} with a micro batch of {best.micro_batch} spend "
        f"their step on {shares}. Memory: IPU {best.fullest[1]} is the fullest, "
        f"{result.best.free:.1%} of its fullest tile is free. On the device, "
        f"{settings.recomputation}."
    )
    return "\n".join([text, *_others(result)])


def _others(result: TuneResult) -> list[str]:
    """Say what the promising pipelines reach that are not the best one."""
    best = result.best.prediction
    own = (best.settings.num_ipus, best.settings.replicas, best.micro_batch)
    reached: dict[tuple[int, int, int], float] = {}
    for item, seconds in result.front.searched:
        reached[_key(item)] = min(seconds, reached.get(_key(item), inf))
    bounds: dict[tuple[int, int, int], float] = {}
    for item in result.front.pipelines:
        bounds[_key(item)] = min(item.quick_bound_s, bounds.get(_key(item), inf))
    bounds.pop(own, None)
    batch, lines = result.request.global_batch, []
    for key in sorted(bounds, key=bounds.__getitem__)[:6]:
        name = f"  {key[1]} x {count_of(key[0], 'IPU')}, micro batch {key[2]}:"
        if reached.get(key, inf) < inf:
            lines.append(f"{name} slower ({batch / reached[key]:.1f} samples/s found)")
        else:
            lines.append(
                f"{name} nothing that fits is quicker (at most {batch / bounds[key]:.1f} "
                "samples/s, memory ignored)"
            )
    return lines


def _key(item: IPUPipeline) -> tuple[int, int, int]:
    settings = item.settings
    return settings.num_ipus, settings.replicas, item.chain.graph.micro_batch_size


def comparison_text(result: TuneResult, name: str, other: Prediction) -> str:
    """Say what the best does better than another configuration, and what differs."""
    best = result.best.prediction
    gain = best.samples_per_s / other.samples_per_s - 1
    lines = [
        f"Compared with {name}: {best.samples_per_s:.1f} against {other.samples_per_s:.1f} "
        f"samples/s ({gain:+.1%}); it {'fits' if other.fits else 'DOES NOT FIT'} "
        f"({other.free:.1%} of the fullest tile free, here {result.best.free:.1%})"
    ]
    if other.samples_per_step != best.samples_per_step:
        lines.append(
            f"  its global batch is {other.samples_per_step} (micro batch {other.micro_batch}), "
            f"not {best.samples_per_step}: times per sample are compared"
        )
    there, here = _facts(other), _facts(best)
    lines += [f"  {key}: {there[key]} -> {here[key]}" for key in here if there[key] != here[key]]
    mine, theirs = parts_of_step(best), parts_of_step(other)
    changes = sorted(
        ((mine[part] / best.samples_per_step - theirs[part] / other.samples_per_step, part)
         for part in mine),
        key=lambda change: -abs(change[0]),
    )  # fmt: skip
    shown = ", ".join(f"{part} {seconds * 1e6:+.1f}" for seconds, part in changes if seconds)
    lines.append(f"  microseconds per sample: {shown or 'no difference'}")
    lines += [f"  note on {name}: {note}" for note in other.notes]
    return "\n".join(lines)


def _facts(prediction: Prediction) -> dict[str, Any]:
    settings = prediction.settings
    return {
        "IPUs per replica": settings.num_ipus,
        "replicas": settings.replicas,
        "micro batch": prediction.micro_batch,
        "accumulation": settings.accumulation,
        "device iterations": settings.device_iterations,
        "layers per IPU": _short(layers_of(prediction.graph, prediction.layout)),
        "proportions": _short(settings.proportions),
        "recomputation": settings.recomputation,
        "embedding slices": settings.embedding_factor,
        "projection slices": settings.projection_factor,
        "optimizer state": _placement(settings),
        "half first moment": settings.half_first_moment,
        "precision": settings.precision,
    }
