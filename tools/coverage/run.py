"""Check many classes, each in a process of its own, and remember what is done.

A process is forked from a server that has imported torch and transformers once. It has a time
limit and a memory limit; what happens to it happens to its class only. Every result is one line
of a file, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import DatasetError
from ipu_pipeline.ir.codec import parse_json
from ipu_pipeline.ir.files import read_text
from tools.coverage.classes import ModelClass
from tools.coverage.record import Record, Result

TIME_LIMIT_S = 60.0
MEMORY_LIMIT_BYTES = 6 * 10**9
Check = Callable[[ModelClass, Callable[[Result], None]], Record]


@dataclass
class _Job:
    """One running process."""

    item: ModelClass
    process: BaseProcess
    connection: Connection
    started: float
    fate: Result = "crash"
    record: Record | None = None


def run(
    items: Sequence[ModelClass],
    *,
    jobs: int = 1,
    time_limit_s: float = TIME_LIMIT_S,
    done: Callable[[Record], None] = lambda _: None,
    check: Check | None = None,
) -> list[Record]:
    """Check every class; return the records in the order of ``items``.

    Args:
        items: The classes.
        jobs: Processes at a time.
        time_limit_s: Of one class.
        done: Called with every record as soon as there is one.
        check: What a process runs; :func:`~tools.coverage.check.check_class`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.coverage.check"])
    waiting, running = list(reversed(items)), list[_Job]()
    found: dict[str, Record] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), check))
            for job in _finished(running, time_limit_s):
                running.remove(job)
                found[job.item.name] = record = _end(job, time_limit_s)
                done(record)
    finally:
        for job in running:
            job.process.kill()
            job.process.join()
    return [found[item.name] for item in items]


def remembered(path: Path, header: dict[str, Any]) -> list[Record]:
    """Return the records of an earlier run with the same versions; none when there is none."""
    if not path.exists():
        return []
    try:
        lines = [parse_json(line) for line in _whole_lines(path)]
        if not lines or lines[0] != header:
            return []
        return [Record.from_json(line) for line in lines[1:]]
    except (DatasetError, ValueError) as error:
        raise DatasetError(
            f"{path} cannot be resumed ({error}); delete it, or leave out --resume"
        ) from error


class Journal:
    """The file that remembers: a line that says what it is about, then one line per record.

    Args:
        path: The file.
        header: What the records depend on; a file with another header is begun anew.
        records: Records that are in the file already.
    """

    def __init__(self, path: Path, header: dict[str, Any], records: Iterable[Record] = ()) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [header, *(record.to_json() for record in records)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file; a last one that was cut short is left out."""
    text = read_text(path, "the journal", DatasetError)
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def _start(context: Any, item: ModelClass, check: Check | None) -> _Job:
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, item, check), daemon=True)
    process.start()
    theirs.close()
    return _Job(item, process, ours, time.monotonic())


def _finished(running: list[_Job], time_limit_s: float) -> list[_Job]:
    """Wait for news of any process; return those that are done, dead or too slow."""
    deadline = min(job.started for job in running) + time_limit_s
    ready = wait([job.connection for job in running], max(0.0, deadline - time.monotonic()))
    ended = []
    for job in running:
        alive = job.connection not in ready or _read(job)
        late = time.monotonic() - job.started > time_limit_s
        if not alive or job.record is not None or late:
            ended.append(job)
    return ended


def _read(job: _Job) -> bool:
    """Take what the process has sent; return whether it can send more."""
    try:
        while job.record is None and job.connection.poll():
            message = job.connection.recv()
            if isinstance(message, dict):
                job.record = Record.from_json(message)
            else:
                job.fate = message
    except (EOFError, OSError):
        return False
    return True


def _end(job: _Job, time_limit_s: float) -> Record:
    """Stop the process; return its record, or one that says what became of it."""
    if job.record is None and job.process.is_alive() and not job.connection.closed:
        job.process.join(timeout=0.5)  # it may have died a moment ago
    late = job.process.is_alive()
    job.process.kill()
    job.process.join()
    job.connection.close()
    if job.record is not None:
        return job.record
    seconds = time.monotonic() - job.started
    reason = f"longer than {time_limit_s:g} s" if late else f"exit code {job.process.exitcode}"
    kind: Result = "timeout" if late else "crash"
    if job.fate == "eager-fails":
        kind, reason = job.fate, f"the model alone: {kind}, {reason}"
    item = job.item
    return Record(item.name, item.architecture, item.task, kind, reason, seconds=round(seconds, 2))


def _child(connection: Connection, item: ModelClass, check: Check | None) -> None:
    """Check one class and send its record; messages before that say what silence would mean."""
    _limit_memory()
    logging.disable(logging.CRITICAL)
    from tools.coverage.check import check_class

    with contextlib.redirect_stdout(None), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # C++ writes there directly
        record = (check or check_class)(item, connection.send)
    connection.send(record.to_json())
    connection.close()


def _limit_memory() -> None:
    """Allow so much more address space than the imports have taken."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_LIMIT_BYTES,) * 2)
