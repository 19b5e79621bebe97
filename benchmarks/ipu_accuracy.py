"""How right the IPU model is: ``python -m benchmarks.ipu_accuracy [--configs F ...] [--json]``.

Reads any files of the shared format. Published speeds (grades A and B) are compared with
predictions; grade C rows are lower bounds of the device's speed; configurations that ran must be
predicted to fit, those that ran out of memory must not. Rows that cannot be judged are listed with
the reason. Leave-one-model-out fits the constants without each model's rows and predicts these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ipu_architectures import architecture, capture_architecture
from benchmarks.ipu_fit import SHARED, fit
from benchmarks.ipu_observations import Observation, judged, load_observations, predict_row
from benchmarks.ipu_rows import Raw, UnjudgeableRowError, load_rows, misfit_row, read_row
from ipu_pipeline.backends.ipu.prices import DEFAULT_CALIBRATION, chip_named

GIBIBYTE = 2**30
LEFT_OUT_ITERATIONS = 60


def accuracy(
    configs: str | Path, throughput: str | Path, does_not_fit: str | Path, *, leave_out: bool = True
) -> dict[str, Any]:
    """Return every figure of the report; shares are between 0 and 1.

    Args:
        configs: Configurations that ran.
        throughput: Measured speeds, joined by ``config_id``.
        does_not_fit: Configurations that ran out of memory.
        leave_out: Whether to refit without each model (some seconds per model).
    """
    observations, unjudged = load_observations(configs, throughput)
    speeds = [_speed(observation) for observation in judged(observations)]
    bounds = [_bound(observation) for observation in observations if observation.grade == "C"]
    fitting = [_fits(raw, misfit=False) for raw in load_rows(configs)]
    failing = [_fits(raw, misfit=True) for raw in load_rows(does_not_fit)]
    errors = [abs(speed["error"]) for speed in speeds]
    return {
        "mean_abs_error": sum(errors) / len(errors) if errors else None,
        "worst_abs_error": max(errors, default=None),
        "spearman": spearman(
            [speed["predicted"] for speed in speeds], [speed["published"] for speed in speeds]
        ),
        "fits_share": _share(fitting, wanted=True),
        "misfits_share": _share(failing, wanted=False),
        "judged": {
            "throughput": len(speeds),
            "fits": sum("fits" in row for row in fitting),
            "misfits": sum("fits" in row for row in failing),
        },
        "leave_one_model_out": _leave_one_out(judged(observations)) if leave_out else None,
        "calibration": asdict(DEFAULT_CALIBRATION),
        "throughput": speeds,
        "lower_bounds": bounds,
        "wrongly_not_fitting": [row for row in fitting if row.get("fits") is False],
        "out_of_memory": [row for row in failing if "fits" in row],
        "assumptions": [row for row in fitting if row.get("assumptions")],
        "not_judged": {
            "throughput": unjudged,
            "fits": [row for row in fitting if "reason" in row],
            "misfits": [row for row in failing if "reason" in row],
        },
    }


def _speed(observation: Observation) -> dict[str, Any]:
    predicted = observation.predicted_items_per_s()
    return {
        "id": observation.id,
        "model": observation.model,
        "grade": observation.grade,
        "published": observation.items_per_s,
        "predicted": round(predicted, 2),
        "error": round(predicted / observation.items_per_s - 1, 4),
    }


def _bound(observation: Observation) -> dict[str, Any]:
    prediction = observation.predict()
    predicted = prediction.samples_per_s * observation.packing
    time = prediction.time
    outside = time.update_s + time.host_s
    return {
        "id": observation.id,
        "published": observation.items_per_s,
        "predicted": round(predicted, 2),
        "holds": predicted >= observation.items_per_s,
        "limited_by": (
            f"{outside / time.total_s:.0%} of the step is update and host, "
            f"{(time.fill_s + time.flush_s) / time.total_s:.0%} fill and flush: "
            f"{observation.row.settings.accumulation} microbatches per update"
        ),
    }


def _fits(raw: Raw, *, misfit: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"id": raw.get("id")}
    try:
        row = misfit_row(raw) if misfit else read_row(raw)
        graph = capture_architecture(architecture(row))
        hardware = f"{raw.get('hardware_target')} {raw.get('hardware')}".lower()
        if "mk1" in hardware or "gc2 " in hardware:
            raise UnjudgeableRowError("first generation (GC2): not described")
        prediction, note = predict_row(row, graph, chip_named("ipu-gc200"))
    except UnjudgeableRowError as error:
        return {**found, "reason": str(error)}
    chip = prediction.chip
    fullest = max(memory.fullest_tile_bytes(chip) for memory in prediction.memory)
    found["fits"] = prediction.fits
    found["fullest_tile_share"] = round(fullest / chip.tile_memory_bytes, 3)
    if note or row.assumptions:
        found["assumptions"] = [*row.assumptions, *filter(None, [note])]
    published = raw.get("per_ipu_memory_gib")
    if isinstance(published, list):
        sizes = [memory.total_bytes / GIBIBYTE for memory in prediction.memory]
        found["per_ipu_gib_published"] = published
        found["per_ipu_gib_predicted"] = [round(size, 3) for size in sizes]
        pairs = zip(sizes, published, strict=False)
        found["per_ipu_worst_abs_error"] = round(max(abs(a / b - 1) for a, b in pairs), 4)
    return found


def _share(rows: Sequence[Raw], *, wanted: bool) -> float | None:
    verdicts = [row["fits"] is wanted for row in rows if "fits" in row]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _leave_one_out(observations: Sequence[Observation]) -> dict[str, Any]:
    """Refit without each model (sizes are models of their own) and predict what was left out."""
    models = sorted({observation.model for observation in observations})
    found: dict[str, Any] = {"models": {}}
    errors: list[float] = []
    for model in models:
        rest = [o for o in observations if o.model != model]
        if not rest:
            continue
        constants = fit(rest, DEFAULT_CALIBRATION, LEFT_OUT_ITERATIONS)
        own = [
            abs(o.predicted_items_per_s(constants) / o.items_per_s - 1)
            for o in observations
            if o.model == model
        ]
        found["models"][model] = {"mean_abs_error": round(sum(own) / len(own), 4), "rows": len(own)}
        errors += own
    found["mean_abs_error"] = sum(errors) / len(errors) if errors else None
    found["worst_abs_error"] = max(errors, default=None)
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; equal values share their mean rank. ``None`` below two different values."""
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    spread = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (a, b)]
    if not all(spread):
        return None
    together = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return float(together / (spread[0] * spread[1]) ** 0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def text(report: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    lines = [f"{'run':44s} {'published':>10s} {'predicted':>10s} {'error':>7s}"]
    for speed in report["throughput"]:
        lines.append(
            f"{speed['id'][:44]:44s} {speed['published']:10.1f} {speed['predicted']:10.1f} "
            f"{speed['error']:+7.1%}"
        )
    for bound in report["lower_bounds"]:
        verdict = "bound holds" if bound["holds"] else "BOUND BROKEN"
        lines.append(
            f"{bound['id'][:44]:44s} >{bound['published']:9.1f} {bound['predicted']:10.1f} "
            f"{verdict} ({bound['limited_by']})"
        )
    for key in ("mean_abs_error", "worst_abs_error", "spearman", "fits_share", "misfits_share"):
        value = report[key]
        lines.append(f"{key}: {'-' if value is None else f'{value:.4f}'}")
    lines.append(f"leave one model out: {json.dumps(report['leave_one_model_out'])}")
    lines += [f"does not fit, but ran: {row}" for row in report["wrongly_not_fitting"]]
    lines += [f"ran out of memory: {row}" for row in report["out_of_memory"]]
    for kind, rows in report["not_judged"].items():
        lines += [f"not judged ({kind}): {row['id']}: {row['reason']}" for row in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, as text or as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, default=SHARED / "known_good_configs.json")
    parser.add_argument("--throughput", type=Path, default=SHARED / "throughput.json")
    parser.add_argument("--does-not-fit", type=Path, default=SHARED / "does_not_fit.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-leave-out", action="store_true", help="skip leave-one-model-out")
    given = parser.parse_args(arguments)
    report = accuracy(
        given.configs, given.throughput, given.does_not_fit, leave_out=not given.no_leave_out
    )
    print(json.dumps(report) if given.json else text(report))


if __name__ == "__main__":
    main()
