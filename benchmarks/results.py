"""Results as flat rows: one per number. From pytest-benchmark's JSON to CSV, and comparing."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
KINDS = ("measured", "simulated", "predicted")
# Metrics of which more is better; of all others less is.
MORE_IS_BETTER = ("samples_per_s", "ratio_to_eager", "ratio_to_torch")
# Of a contestant that has one of these nothing else is compared: the speed of the machine is
# on both sides of a ratio.
RATIOS = ("ratio_to_eager", "ratio_to_torch")
# Says the same as the seconds beside it.
_TWICE = "samples_per_s"


class ResultsError(ValueError):
    """A results file cannot be read, or not be compared."""


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
    median: float
    low: float
    high: float
    rounds: int
    kind: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the number is of."""
        return (self.group, self.workload, self.contestant, self.metric)


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
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            writer.writerow(
                [f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values()]
            )


def read_csv(path: Path) -> list[Row]:
    """Read what :func:`write_csv` wrote.

    Raises:
        ResultsError: There is no such file, or it is not one of these.
    """
    if not path.is_file():
        raise ResultsError(f"there are no results at {path}; write some with benchmarks.run")
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    names = [field.name for field in fields(Row)]
    if any(list(row) != names for row in found):
        raise ResultsError(f"{path} is no results file; its columns must be {', '.join(names)}")
    try:
        return [_row(row) for row in found]
    except ValueError as error:
        raise ResultsError(f"{path} is no results file: {error}") from None


def _row(texts: Mapping[str, str]) -> Row:
    values: dict[str, Any] = dict(texts)
    for name in ("median", "low", "high"):
        values[name] = float(texts[name])
    return Row(**{**values, "rounds": int(texts["rounds"])})


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
