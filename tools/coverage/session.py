"""One run over many classes: progress on the terminal, a journal to resume from, the files."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.coverage.classes import ModelClass
from tools.coverage.record import Record
from tools.coverage.run import Check, Journal, remembered, run
from tools.coverage.table import write_json, write_markdown

_LIBRARIES = ("torch", "transformers")


def check_all(
    items: list[ModelClass],
    *,
    jobs: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    time_limit_s: float = 60.0,
    check: Check | None = None,
    at_most: int | None = None,
    total: int = 0,
) -> list[Record]:
    """Check ``items``; write ``output`` and the Markdown page beside it.

    Args:
        items: The classes.
        jobs: Processes at a time; ``None`` for one per core.
        output: The JSON file; its journal has the suffix ``.jsonl`` until the run is complete.
        resume: Take over what the journal of an interrupted run holds, if its versions are ours.
        time_limit_s: Of one class.
        check: Another check than one step of training; its page says less.
        at_most: Check so many of those that are left, and write what is known then.
        total: Classes that there are for the check; 0: as many as ``items``.

    Returns:
        What is known, in the order of ``items``.
    """
    versions = installed_versions()
    header: dict[str, Any] = {"versions": versions, "check": check and check.__name__}
    path = None if output is None else output.with_suffix(".jsonl")
    known = remembered(path, header) if path is not None and resume else []
    found = {record.name: record for record in known}
    journal = None if path is None else Journal(path, header, known)
    left = [item for item in items if item.name not in found]
    left = _spread(left, found)[:at_most]
    with _Bar(len(items), known) as bar:

        def done(record: Record) -> None:
            found[record.name] = record
            if journal is not None:
                journal.add(record)
            bar.add(record)

        run(
            left,
            jobs=jobs or os.cpu_count() or 1,
            time_limit_s=time_limit_s,
            done=done,
            check=check,
        )
    records = [found[item.name] for item in items if item.name in found]
    if output is not None and path is not None:
        write_json(output, records, versions)
        name = "" if check is None else check.__name__
        write_markdown(output.with_suffix(".md"), records, versions, name, total or len(items))
        if len(records) == len(items):
            path.unlink()
    return records


def _spread(left: list[ModelClass], found: Mapping[str, Record]) -> list[ModelClass]:
    """Order classes so that what an interrupted run finds is a sample of all architectures."""
    seen = Counter(record.architecture for record in found.values())
    order = []
    for item in sorted(left, key=lambda item: crc32(item.name.encode())):
        order.append((seen[item.architecture], len(order), item))
        seen[item.architecture] += 1
    return [item for *_, item in sorted(order, key=lambda entry: entry[:2])]


def installed_versions() -> dict[str, str]:
    """Return the versions that the records depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


class _Bar(Progress):
    """How many are done, and how they ended."""

    def __init__(self, total: int, known: list[Record]) -> None:
        super().__init__(
            TextColumn("coverage"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[passed]} pass, {task.fields[other]} do not"),
            TimeRemainingColumn(),
        )
        self._results = Counter(record.result for record in known if record.counted)
        self._task = self.add_task("", total=total, passed=0, other=0, completed=len(known))
        self._show()

    def add(self, record: Record) -> None:
        """Count one more."""
        if record.counted:
            self._results[record.result] += 1
        self.advance(self._task)
        self._show()

    def _show(self) -> None:
        passed = self._results["pass"]
        self.update(self._task, passed=passed, other=self._results.total() - passed)
