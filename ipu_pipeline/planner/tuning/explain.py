"""A tuning result as text: the front, why the best is best, and how another one differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ipu_pipeline.backends.ipu.prices import IPUSettings, Prediction
from ipu_pipeline.ir.text import milliseconds, render_table
from ipu_pipeline.planner.tuning.search import Candidate, Point, free_share
from ipu_pipeline.planner.tuning.tune import TuneResult

_COLUMNS = ("samples/s", "step ms", "free", "IPUs", "micro batch", "accumulation", "layers per IPU",
            "proportions", "kept", "slices", "optimizer state")  # fmt: skip


def result_text(result: TuneResult) -> str:
    """Return the front and the reasons for the best."""
    best = result.best.prediction
    parts = [
        f"{best.samples_per_s:.1f} samples/s predicted for a global batch of "
        f"{result.request.global_batch} on {result.machine.name}: quickest of "
        f"{len(result.front.candidates)} settings",
        front_table(result.front.points),
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


def front_table(points: Sequence[Point]) -> str:
    """Return one row per point of the front."""
    rows = []
    for point in points:
        prediction = point.prediction
        settings = prediction.settings
        rows.append((
            f"{point.samples_per_s:.1f}",
            milliseconds(prediction.time.total_s),
            f"{point.free:.1%}",
            f"{settings.replicas} x {settings.num_ipus}",
            str(prediction.micro_batch),
            str(settings.accumulation),
            _short(settings.layers_per_ipu),
            _short(settings.proportions),
            "layers" if settings.checkpoint_layers else "stages",
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


def _placement(settings: IPUSettings) -> str:
    where = "off chip" if settings.optimizer_offchip else "on chip"
    return f"{where}, sharded" if settings.sharded else where


def parts_of_step(prediction: Prediction) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on."""
    time = prediction.time
    return {
        "main cycles": time.main_s,
        "fill and flush": time.fill_s + time.flush_s,
        "optimizer": time.optimizer_s,
        "state streaming": time.streaming_s,
        "all-reduce": time.all_reduce_s,
        "host": time.host_s,
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
    sizes = [memory.fullest_tile_bytes(best.chip) for memory in best.memory]
    fullest = max(range(len(sizes)), key=sizes.__getitem__)
    settings = best.settings
    text = (
        f"Why this one: {settings.replicas} replicas of {settings.num_ipus} IPUs with a micro "
        f"batch of {best.micro_batch} spend their step on {shares}. Memory: IPU {fullest} is the "
        f"fullest, {result.best.free:.1%} of its fullest tile is free."
    )
    others = [_verdict(result, group) for group in _other_shapes(result)]
    return "\n".join([text, *others])


def _other_shapes(result: TuneResult) -> list[list[Candidate]]:
    """Group the settings by IPUs per replica and micro batch; promising ones that are not best."""
    best = result.best.prediction
    own = (best.settings.num_ipus, best.settings.replicas, best.micro_batch)
    groups: dict[tuple[int, int, int], list[Candidate]] = {}
    for item in result.front.candidates:
        shape = item.shape
        key = (shape.num_ipus, shape.replicas, shape.micro_batch)
        if key != own:
            groups.setdefault(key, []).append(item)
    return sorted(groups.values(), key=lambda group: group[0].bound_s)[:6]


def _verdict(result: TuneResult, group: Sequence[Candidate]) -> str:
    shape = group[0].shape
    batch = result.request.global_batch
    most = batch / group[0].bound_s
    name = f"  {shape.replicas} x {shape.num_ipus} IPUs, micro batch {shape.micro_batch}:"
    reached = min((item.best_s for item in group if item.best_s), default=None)
    if reached:
        return f"{name} slower ({batch / reached:.1f} samples/s found)"
    if most <= result.best.samples_per_s:
        return f"{name} at most {most:.1f} samples/s, memory ignored"
    if all(item.searched for item in group):
        return f"{name} does not fit (it would reach at most {most:.1f} samples/s)"
    return f"{name} nothing that fits is quicker (at most {most:.1f} samples/s, memory ignored)"


def comparison_text(result: TuneResult, name: str, other: Prediction) -> str:
    """Say what the best does better than another configuration, and what differs."""
    best = result.best.prediction
    gain = best.samples_per_s / other.samples_per_s - 1
    lines = [
        f"Compared with {name}: {best.samples_per_s:.1f} against {other.samples_per_s:.1f} "
        f"samples/s ({gain:+.1%}); it {'fits' if other.fits else 'DOES NOT FIT'} "
        f"({free_share(other):.1%} of the fullest tile free, here {result.best.free:.1%})"
    ]
    if other.samples_per_step != best.samples_per_step:
        lines.append(
            f"  its global batch is {other.samples_per_step} (micro batch {other.micro_batch}), "
            f"not {best.samples_per_step}: times per sample are compared"
        )
    lines += [f"  {what}: {there} -> {here}" for what, there, here in differences(other, best)]
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


def differences(other: Prediction, best: Prediction) -> list[tuple[str, str, str]]:
    """Return (what, there, here) for every number that differs."""
    there, here = _facts(other), _facts(best)
    return [(key, str(there[key]), str(here[key])) for key in here if there[key] != here[key]]


def _facts(prediction: Prediction) -> dict[str, Any]:
    settings = prediction.settings
    return {
        "IPUs per replica": settings.num_ipus,
        "replicas": settings.replicas,
        "micro batch": prediction.micro_batch,
        "accumulation": settings.accumulation,
        "device iterations": settings.device_iterations,
        "layers per IPU": _short(settings.layers_per_ipu),
        "proportions": _short(settings.proportions),
        "kept for recomputation": "layers" if settings.checkpoint_layers else "stages",
        "embedding slices": settings.embedding_factor,
        "projection slices": settings.projection_factor,
        "optimizer state": _placement(settings),
        "half first moment": settings.half_first_moment,
        "precision": settings.precision,
    }
