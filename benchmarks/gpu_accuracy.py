"""How right the GPU prices are: ``python -m benchmarks.gpu_accuracy [--rows F] [--json]``.

Every published run is captured with few layers, put together as it was split, and priced by the
code of the cluster backend. The summary is about rows of quality A. The constants
(``ipu_pipeline/ir/data/gpus.json``) are fitted to the rows of ``benchmarks/gpu_fit.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_fit import FITTED_ROWS, leave_one_source_out
from benchmarks.gpu_rows import Raw, UnjudgedRowError
from benchmarks.gpu_runs import LATER_RECIPE, Run, read_run
from benchmarks.ipu_accuracy import spearman
from ipu_pipeline.errors import PipelineError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gpu" / "published.json"
UNDER = -0.02  # more than 2 % below what was measured
SUMMARY = (
    "time_mean", "time_worst", "memory_mean", "memory_worst", "memory_under_share",
    "refused_share", "spearman", "judged",
)  # fmt: skip


def accuracy(rows: Sequence[Raw], *, leave_out: bool = True) -> dict[str, Any]:
    """Return the figures over rows of quality A, and what was found for every row.

    Args:
        rows: Published runs.
        leave_out: Whether to fit the constants again without each source.
    """
    found: list[dict[str, Any]] = []
    runs: list[Run] = []
    for raw in rows:
        one, run = _judge(raw)
        found.append(one)
        runs += [run] if run is not None else []
    judged = [row for row in found if "reason" not in row and row["quality"] == "A"]
    times = [row["time_error"] for row in judged if "time_error" in row]
    memory = [row["memory_error"] for row in judged if "memory_error" in row]
    timed = [row for row in judged if "time_error" in row]
    free = [abs(r["time_error"]) for r in timed if r["id"] not in FITTED_ROWS]
    return {
        "time_mean": _mean(times),
        "time_worst": max(map(abs, times), default=None),
        "memory_mean": _mean(memory),
        "memory_worst": max(map(abs, memory), default=None),
        "memory_under_share": _share(error < UNDER for error in memory),
        "refused_share": _share(not row["fits"] for row in judged),
        "spearman": spearman(
            [row["predicted_s"] for row in timed], [row["published_s"] for row in timed]
        ),
        "judged": len(judged),
        # Runs whose recipe was not published with them, and which did not fit with a later one.
        "settings_inferred": sum(LATER_RECIPE in "".join(row["assumptions"]) for row in judged),
        "time_mean_of_rows_not_fitted": _mean(free),
        "fitted": [row["id"] for row in timed if row["id"] in FITTED_ROWS],
        "leave_one_source_out": leave_one_source_out(runs) if leave_out else None,
        "rows": [row for row in found if "reason" not in row],
        "not_judged": [row for row in found if "reason" in row],
    }


def _judge(raw: Raw) -> tuple[dict[str, Any], Run | None]:
    found: dict[str, Any] = {"id": raw.get("id"), "quality": str(raw.get("quality") or "C")[0]}
    try:
        run = read_run(raw)
        found["predicted_s"] = run.step_s()
    except (UnjudgedRowError, PipelineError, ValueError) as error:
        return {"id": found["id"], "quality": found["quality"], "reason": str(error)}, None
    except (KeyError, TypeError) as error:
        reason = f"a field is missing or of a wrong type: {error}"
        return {"id": found["id"], "quality": found["quality"], "reason": reason}, None
    found |= {"source": run.row.source, "assumptions": list(run.row.assumptions)}
    if run.published_s is not None:
        found["published_s"] = run.published_s
        found["time_error"] = found["predicted_s"] / run.published_s - 1
    memory = run.memory_bytes()
    found |= {"predicted_gb": memory / 1e9, "fits": run.fits()}
    if run.row.memory_bytes:
        found["published_gb"] = run.row.memory_bytes / 1e9
        found["memory_error"] = memory / run.row.memory_bytes - 1
    return found, run


def _mean(errors: Sequence[float]) -> float | None:
    return sum(map(abs, errors)) / len(errors) if errors else None


def _share(verdicts: Any) -> float | None:
    given = list(verdicts)
    return sum(given) / len(given) if given else None


def text(report: Mapping[str, Any]) -> str:
    """Return the report for a terminal."""
    lines = [f"{'run':64s} {'time':>7s} {'memory':>7s}"]
    for row in report["rows"]:
        time, memory = row.get("time_error"), row.get("memory_error")
        lines.append(
            f"{row['quality']} {row['id'][:62]:62s} "
            f"{'-' if time is None else f'{time:+.1%}':>7s} "
            f"{'-' if memory is None else f'{memory:+.1%}':>7s}"
            f"{'' if row['fits'] else '  does not fit, but ran'}"
        )
    lines += [f"not judged: {row['id']}: {row['reason']}" for row in report["not_judged"]]
    for key in (
        *SUMMARY,
        "settings_inferred",
        "time_mean_of_rows_not_fitted",
        "leave_one_source_out",
    ):
        value = report[key]
        lines.append(f"{key}: {f'{value:.4f}' if isinstance(value, float) else value}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, as text or as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=SHARED, help="file of the shared format")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-leave-out", action="store_true", help="skip leave-one-source-out")
    given = parser.parse_args(arguments)
    if not given.rows.is_file():
        print(f"skipped: there is no file {given.rows}; give one with --rows")
        return
    raw = json.loads(given.rows.read_text(encoding="utf-8"))
    rows = raw["rows"] if isinstance(raw, dict) else raw
    report = accuracy(rows, leave_out=not given.no_leave_out)
    print(json.dumps(report) if given.json else text(report))


if __name__ == "__main__":
    main()
