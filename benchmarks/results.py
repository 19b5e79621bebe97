"""Results as flat rows: one per number. From pytest-benchmark's JSON to CSV, and comparing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.codec import Count, from_json
from ipu_pipeline.ir.files import read_table, read_text, write_text

FOLDER = Path(__file__).resolve().parent / "results"
# Metrics of which more is better; of all others less is.
MORE_IS_BETTER = ("samples_per_s", "ratio_to_eager", "ratio_to_torch")
# Of a contestant that has one of these nothing else is compared: the speed of the machine is
# on both sides of a ratio.
RATIOS = ("ratio_to_eager", "ratio_to_torch")
# Says the same as the seconds beside it.
_TWICE = "samples_per_s"


class ResultsError(PipelineError):
    """A results file cannot be read, or not be compared."""


Kind = Literal["measured", "simulated", "predicted"]
Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        group: Group of the benchmark: throughput, memory, ...
        workload: What was done.
        contestant: By what.
        metric: What the number is.
        unit: Of the number.
        median: Over the rounds.
        low: Lower quartile.
        high: Upper quartile.
        rounds: How many there were.
        kind: ``measured`` on this machine, ``simulated``, or ``predicted``.
        commit: That was measured; ``-dirty`` at its end: with changes.
        date: Of the run, UTC.
    """

    group: str
    workload: str
    contestant: str
    metric: str
    unit: str
    median: Number
    low: Number
    high: Number
    rounds: Count
    kind: Kind
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the number is of."""
        return (self.group, self.workload, self.contestant, self.metric)


NAMES = [field.name for field in fields(Row)]


def flatten(results: Mapping[str, Any]) -> list[Row]:
    """Return the numbers of pytest-benchmark's JSON.

    Every benchmark of the suite lists them in ``extra_info["metrics"]``; see
    :mod:`benchmarks.suite.replay`.
    """
    commit = results["commit_info"]
    name = str(commit["id"])[:12] + ("-dirty" if commit.get("dirty") else "")
    date = str(results["datetime"])[:10]
    rows = []
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        rows += [
            Row(benchmark["group"], info["workload"], info["contestant"], **metric,
                commit=name, date=date)
            for metric in info["metrics"]
        ]  # fmt: skip
    return rows


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows; numbers have 6 significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(NAMES)
    for row in rows:
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values()])
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`write_csv` wrote.

    Raises:
        ResultsError: There is no such file, or it is not one of these.
    """
    text = read_text(path, "the results", ResultsError)
    table = read_table(text, f"the results file {path}", ResultsError, NAMES)
    rows = [
        from_json(Row, row, f"{path}, line {line}", ResultsError, strict=False)
        for line, row in enumerate(table, start=2)
    ]
    if not rows:
        raise ResultsError(f"{path} holds no result; write some with benchmarks.run")
    return rows


def compare(
    before: Sequence[Row], now: Sequence[Row], threshold_percent: float, *, whole: bool = True
) -> list[str]:
    """Name everything that is worse by more than the threshold.

    Compared are the medians of ratios to eager or torch where there are, else of seconds, MB and
    errors.

    Args:
        before: Of an earlier run.
        now: Of this run.
        threshold_percent: By how much a median may be worse.
        whole: Whether what was measured before and is not now counts, if its workload was run.

    Returns:
        One sentence per regression.

    Raises:
        ResultsError: The two have nothing in common.
    """
    old, new = ({row.key: row for row in _compared(rows)} for rows in (before, now))
    workloads = {key[:2] for key in new}
    common = [key for key in old if key[:2] in workloads and (whole or key in new)]
    if not common:
        raise ResultsError(
            "the two results have no workload in common; compare with a run of the same groups"
        )
    found = []
    for key in common:
        name = ", ".join(key)
        if key not in new:
            found.append(f"{name}: was {old[key].median:.4g} {old[key].unit}, is not measured now")
            continue
        worse = worse_percent(old[key], new[key])
        if worse > threshold_percent:
            found.append(
                f"{name}: was {old[key].median:.4g} {old[key].unit}, is {new[key].median:.4g}: "
                f"{worse:.1f} % worse, allowed are {threshold_percent:g} %"
            )
    return found


def worse_percent(before: Row, now: Row) -> float:
    """Return by how many percent of what it was a median is worse; below 0: better.

    What is in percent itself is worse by its points.
    """
    if before.metric.endswith("_percent"):
        return now.median - before.median
    if before.median == 0:
        return 0.0 if now.median == 0 else float("inf")
    change = 100 * (now.median / before.median - 1)
    return -change if before.metric in MORE_IS_BETTER else change


def _compared(rows: Sequence[Row]) -> list[Row]:
    relative = {row.key[:3] for row in rows if row.metric in RATIOS}
    return [
        row
        for row in rows
        if (row.metric in RATIOS if row.key[:3] in relative else row.metric != _TWICE)
    ]
