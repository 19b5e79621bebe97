"""Results as tables: one for every group and kind of number, so that kinds never share a column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.results import Row

# What is shown of a group, in this order; other metrics stay in the CSV.
COLUMNS = {
    "throughput": ("samples_per_s", "ratio_to_eager"),
    "memory": ("peak_mb", "total_mb"),
    "planning": ("seconds",),
    "solver": ("seconds",),
    "kernels": ("seconds", "ratio_to_torch"),
}
TITLES = {
    "samples_per_s": "samples/s",
    "ratio_to_eager": "times eager (quartiles)",
    "ratio_to_torch": "times torch (quartiles)",
    "peak_mb": "largest process, MB",
    "total_mb": "all processes, MB",
    "seconds": "seconds",
    "mean_error_percent": "mean error",
    "worst_error_percent": "worst error",
    "wrong_fits_percent": "ran, but predicted not to fit",
}
_WITH_QUARTILES = ("ratio_to_eager", "ratio_to_torch")


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        group: Group of the numbers.
        kind: Kind of all its numbers.
        header: Titles of the columns.
        lines: Texts of the cells.
        rows: What the numbers are from.
    """

    group: str
    kind: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]


def sections(rows: Sequence[Row]) -> Iterator[Section]:
    """Yield a table per group and kind, in the order of the rows."""
    for group, kind in dict.fromkeys((row.group, row.kind) for row in rows):
        own = [row for row in rows if (row.group, row.kind) == (group, kind)]
        metrics = COLUMNS.get(group, tuple(dict.fromkeys(row.metric for row in own)))
        shown = [row for row in own if row.metric in metrics]
        found = {row.key[1:]: row for row in shown}
        lines = [
            (*place, *(_cell(found.get((*place, metric))) for metric in metrics))
            for place in dict.fromkeys((row.workload, row.contestant) for row in shown)
        ]
        titles = (TITLES.get(metric, metric) for metric in metrics)
        yield Section(group, kind, ("workload", "contestant", *titles), tuple(lines), tuple(shown))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    digits = ".2g" if 0 < row.median < 0.1 else ",.2f" if row.median < 100 else ",.0f"
    text = format(row.median, digits)
    if row.metric in _WITH_QUARTILES:
        return f"{text} ({row.low:.2f} to {row.high:.2f})"
    return f"{text} {row.unit}" if row.unit.startswith("%") else text


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the tables on a terminal."""
    for section in sections(rows):
        table = Table(title=f"{section.group} ({section.kind})", title_justify="left")
        for number, title in enumerate(section.header):
            table.add_column(title, justify="left" if number < 2 else "right")
        for line in section.lines:
            table.add_row(*line)
        console.print(table)


def markdown(section: Section) -> str:
    """Return a table as Markdown."""
    head = "| " + " | ".join(section.header) + " |\n"
    rule = "|---|---|" + "---:|" * (len(section.header) - 2) + "\n"
    return head + rule + "".join("| " + " | ".join(line) + " |\n" for line in section.lines)
