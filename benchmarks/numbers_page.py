"""Write ``docs/checks/numbers.md`` from ``benchmarks/results``: ``-m benchmarks.numbers_page``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, ResultsError, Row, read_csv
from benchmarks.tables import Section, markdown, sections
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.files import read_text, write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checks" / "numbers.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_YET = "Not measured yet: `make bench`, then `python -m benchmarks.numbers_page`.\n"
HEADINGS = {
    "throughput": "Training steps: all contestants interleaved on the same cores, medians",
    "memory": "Peak resident memory of a training step",
    "planning": "Capturing and planning",
    "solver": "The solver alone",
    "kernels": "Our operations against torch's, interleaved",
    "stages": "Predicted against measured seconds of stages on this machine",
    "ipu": "The IPU model against published figures",
}
WORDS = {
    "measured": "measured on the machine below",
    "simulated": "simulated",
    "predicted": "predicted",
}
# Where the words of the kind are not enough.
MORE_WORDS = {
    "ipu": "predicted; nothing was run on an IPU",
    "stages": "errors of the predictions; both sides in one run",
}


def section(folder: Path = FOLDER) -> str:
    """Return what stands between the marks.

    Args:
        folder: Holds ``latest.csv`` and ``latest.json``.

    Raises:
        ResultsError: ``latest.csv`` is no results file.
    """
    if not (folder / "latest.csv").is_file():
        return NOT_YET
    rows = read_csv(folder / "latest.csv")
    path = folder / "latest.json"
    machine = read_json(path, "the results", ResultsError)
    tables = [_table(each) for each in sections(rows)]
    try:
        return "\n".join([*tables, _below(rows, machine["machine_info"])])
    except (KeyError, TypeError) as error:
        raise ResultsError(f"{path} has no machine_info as benchmarks.run writes it") from error


def _table(found: Section) -> str:
    title = HEADINGS.get(found.group, found.group)
    return f"**{title}** ({MORE_WORDS.get(found.group, WORDS[found.kind])})\n\n{markdown(found)}"


def _below(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    dates, commits = (
        ", ".join(sorted({getattr(row, name) for row in rows})) for name in ("date", "commit")
    )
    return (
        f"{machine['cpu']['brand_raw']}, {machine['threads']} cores used in all, Python "
        f"{machine['python_version']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {dates}, commit {commits}. Written by `make bench` and "
        "`python -m benchmarks.numbers_page`; every number with its quartiles is in "
        "`benchmarks/results/latest.csv`.\n"
    )


def replaced(text: str, numbers: str) -> str:
    """Return a page with new numbers between the marks.

    Raises:
        ResultsError: The marks are not there, each once and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ResultsError(f"the page must hold {BEGIN} and after it {END}, each once")
    return f"{before}{BEGIN}\n{numbers}{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numbers_page", description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of latest.csv")
    given = parser.parse_args(argv)
    try:
        text = read_text(given.page, "the page", ResultsError)
        write_text(given.page, replaced(text, section(given.results)))
    except PipelineError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
