"""Write ``docs/checks/predictions.md`` from the figures of ``gpu_accuracy`` and ``ipu_accuracy``.

python -m benchmarks.gpu_accuracy --json > gpu.json
python -m benchmarks.ipu_accuracy --json > ipu.json
python -m benchmarks.predictions_page gpu.json ipu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.numbers_page import replaced
from benchmarks.results import ResultsError
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.files import read_text, write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checks" / "predictions.md"
Figures = Mapping[str, Any]


def _percent(errors: Sequence[float]) -> str:
    """Return mean and worst absolute error."""
    sizes = [abs(error) for error in errors]
    return f"{mean(sizes):.1%} | {max(sizes):.1%}" if sizes else " | "


def _gpus(figures: Figures) -> Iterable[str]:
    yield "**GPUs: step time and memory of a rank against published runs**\n"
    yield "| source | runs | time: mean error | worst | memory: runs | mean error | worst |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    rows = sorted(figures["rows"], key=lambda row: str(row["source"]))
    groups = [(source, list(found)) for source, found in groupby(rows, lambda row: row["source"])]
    for source, found in [*groups, ("**all**", rows)]:
        times = [row["time_error"] for row in found if "time_error" in row]
        memory = [row["memory_error"] for row in found if "memory_error" in row]
        yield (f"| {source} | {len(found)} | {_percent(times)} | {len(memory)} | "
               f"{_percent(memory)} |")  # fmt: skip
    yield (
        f"\nRank correlation of predicted and published times (Spearman): "
        f"{figures['spearman']:.3f}. {len(figures['fitted'])} of the runs were fitted; the others "
        f"are {figures['time_mean_of_rows_not_fitted']:.1%} off on average. Not judged: "
        f"{len(figures['not_judged'])} runs, each with the reason that the benchmark prints.\n"
    )


def _ipus(figures: Figures) -> Iterable[str]:
    yield "**IPUs: throughput against published figures**\n"
    yield "| published run | model | published samples/s | predicted | error |"
    yield "|---|---|---:|---:|---:|"
    for row in figures["throughput"]:
        yield (f"| `{row['id']}` | {row['model']} | {row['published']:,.0f} | "
               f"{row['predicted']:,.0f} | {row['error']:+.1%} |")  # fmt: skip
    judged = figures["judged"]
    yield (
        f"\nMean error {figures['mean_abs_error']:.1%}, worst {figures['worst_abs_error']:.1%}. Of "
        f"{judged['fits']} configurations that ran, {figures['fits_share']:.0%} are predicted to "
        f"fit; of {judged['misfits']} that ran out of memory, {figures['misfits_share']:.0%} are "
        "predicted not to."
    )


def section(gpus: Figures, ipus: Figures) -> str:
    """Return what stands between the marks of the page."""
    return "\n".join([*_gpus(gpus), *_ipus(ipus)]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions_page")
    parser.add_argument("gpus", type=Path)
    parser.add_argument("ipus", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(argv)
    found = section(
        *(read_json(path, "the figures", ResultsError) for path in (given.gpus, given.ipus))
    )
    text = read_text(given.page, "the page", ResultsError)
    write_text(given.page, replaced(text, found))


if __name__ == "__main__":
    main()
