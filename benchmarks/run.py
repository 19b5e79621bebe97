"""Run the benchmark suite: ``python -m benchmarks.run``, or ``make bench BENCH_ARGS=...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.results import FOLDER, ResultsError, Row, compare, flatten, read_csv, write_csv
from benchmarks.tables import show
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.codec import read_json
from ipu_pipeline.ir.files import make_folder, write_text

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benchmarks" / "suite"
GROUPS = ("throughput", "memory", "planning", "solver", "stages", "ipu", "kernels")
COMPARED = """\
Compared are medians. Where a contestant has a ratio to eager or to torch, which both were measured
in the same rounds, only that ratio is compared: a slower machine slows both sides. A busy one does
not: contestants of two threads lose more than those of two processes; run on a quiet one. All
else is compared as it is: seconds of capturing, planning and solving, MB, and, by points, errors of
predictions in percent. Seconds are worth comparing on the same quiet machine only. What is not
measured any more counts as a regression, but not with --quick, which leaves out much."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, compare; return the exit code."""
    options = parser().parse_args(argv)
    try:
        check(options)
        before = read_csv(options.compare) if options.compare else None
        rows = measure(options)
    except PipelineError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if options.update:
        whole = options.output_dir / "latest.csv"
        write_csv(updated(read_csv(whole), rows), whole)
    show(rows, Console(width=None if sys.stdout.isatty() else 140))
    return 0 if before is None else report(before, rows, options.threshold, whole=not options.quick)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Run the benchmarks of benchmarks/workloads.yaml and print tables.",
        epilog=COMPARED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", default=[],
                       help=f"groups to run, of: {', '.join(GROUPS)}")  # fmt: skip
    found.add_argument("--quick", action="store_true",
                       help="small workloads and few rounds; some minutes")  # fmt: skip
    found.add_argument("--compare", type=Path, metavar="CSV",
                       help="name what is worse than in an earlier CSV; exit with 1")  # fmt: skip
    found.add_argument("--threshold", type=float, default=10.0, metavar="PERCENT",
                       help="by how much a median may be worse; 10 by default")  # fmt: skip
    found.add_argument("--update", action="store_true",
                       help="with --only: put these groups into latest.csv in place of what it has "
                       "of them; every row keeps its commit and date")  # fmt: skip
    found.add_argument("--output-dir", type=Path, default=FOLDER,
                       help="where the JSON and the CSV go; benchmarks/results by default. They "
                       "are called latest, or, of a part, by its groups and quick")  # fmt: skip
    return found


def measure(options: argparse.Namespace) -> list[Row]:
    """Run the suite and write what it found.

    Raises:
        ResultsError: A benchmark failed; what the others found is written all the same.
    """
    path = options.output_dir / f"{name_of(options.only, quick=options.quick)}.json"
    path.unlink(missing_ok=True)
    code = pytest.main(command(path, options.only, quick=options.quick))
    if not path.is_file():
        raise ResultsError(f"nothing was measured (pytest ended with {code}); see above")
    results = read_json(path, "what pytest-benchmark wrote", ResultsError)
    rows = flatten(results)
    # Every number is a row of the CSV; what it was measured on stays beside it.
    write_text(path, json.dumps({"machine_info": results.get("machine_info")}, indent=1) + "\n")
    write_csv(rows, path.with_suffix(".csv"))
    if code != pytest.ExitCode.OK:
        raise ResultsError(f"a benchmark failed, see above; what was measured is in {path}")
    return rows


def check(options: argparse.Namespace) -> None:
    """Refuse what would end badly, before anything is measured.

    Raises:
        ResultsError: --update has nothing to update, or would with what is no whole group; or
            --threshold is no share.
        OutputError: The folder may not be written.
    """
    if not 0 <= options.threshold <= sys.float_info.max:
        raise ResultsError(f"--threshold must be at least 0 and finite, got {options.threshold}")
    make_folder("--output-dir", options.output_dir)
    if not options.update:
        return
    if not options.only or options.quick:
        raise ResultsError("--update goes with --only, and not with --quick")
    read_csv(options.output_dir / "latest.csv")


def updated(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """Return ``before`` with the groups of ``now`` in place of its own, in the suite's order."""
    measured = {row.group for row in now}
    rows = [*(row for row in before if row.group not in measured), *now]
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


def name_of(only: Sequence[str], *, quick: bool) -> str:
    """Return what results are called: ``latest`` if everything was run."""
    return "-".join([*sorted(only), *(["quick"] if quick else [])]) or "latest"


def command(path: Path, only: Sequence[str], *, quick: bool) -> list[str]:
    """Return pytest's arguments."""
    files = [str(SUITE / f"bench_{group}.py") for group in GROUPS if not only or group in only]
    settings = {
        "python_files": "bench_*.py",
        "python_functions": "bench_*",
        # Tests must not warn or last; what compilers warn of, and long runs, are fine here.
        "filterwarnings": "ignore",
        "timeout": "0",
    }
    overrides = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    flags = ["-v", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return [
        *files, *overrides, *flags, f"--rootdir={ROOT}", "--benchmark-quiet",
        f"--benchmark-json={path}", *(["--suite-quick"] if quick else []),
    ]  # fmt: skip


def report(
    before: Sequence[Row], rows: Sequence[Row], threshold: float, *, whole: bool = True
) -> int:
    """Print what is worse; return the exit code."""
    try:
        found = compare(before, rows, threshold, whole=whole)
    except ResultsError as error:
        found = [str(error)]
    for line in found:
        print(f"regression: {line}")
    if not found:
        print(f"no regression beyond {threshold:g} %")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
